"""Compile Triton kernels for chips that are not here, and read back what the compilers made of them.

It needs no GPU and no driver: the wheel of Triton brings `ptxas`, `cuobjdump` and LLVM for AMD. It proves
that a kernel compiles for a chip, fits its registers and shared memory, and is given tensor-core instructions
and wide loads. It proves neither that the values are right nor that the kernel is fast.

The process must not have `TRITON_INTERPRET` set: an interpreted kernel cannot be compiled.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

_KIB = 1024
_SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
_TENSOR_CORE = r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_s?mfmac?_)"
_AMD_BITS = {"ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code for one chip."""

    registers: int  # per thread
    spilled: int  # bytes of registers per thread that went to memory
    shared: int  # bytes per program
    tensor_core: int  # matrix instructions in the code
    loads: dict[int, int]  # loads from global memory in the code, by the bytes each thread moves at once


class Launch(NamedTuple):
    """What `kernel[grid](*args, **kwargs)` was called with."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def shared_limit(target: str) -> int:
    """Bytes of shared memory (LDS on AMD) that one program can have on the chip."""
    return _SHARED[_known(target)] * _KIB


def compile_ahead(
    kernel: Callable[..., None],
    signature: dict[str, str],
    constexprs: dict[str, Any],
    *,
    target: str,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Iterable[str] = (),
) -> Compiled:
    """Compile a `@triton.jit` kernel for a chip.

    Args:
        kernel: the decorated function, not wrapped in `@triton.autotune`.
        signature: Triton's type of each argument not in `constexprs`: `*bf16`, `i32`, `fp32`, `*i1`, …
        constexprs: the arguments that are compiled in. An integer that a launch passes as 1 is one of them:
            Triton compiles it in by itself.
        target: `sm_80`, `sm_86`, `sm_89`, `sm_90`, `sm_100`, `sm_120` or `gfx942`.
        num_warps: of a program.
        num_stages: of its pipeline of loads.
        divisible: arguments that a launch knows to be divisible by 16 (pointers: in bytes); without these hints
            there are no wide loads.

    Raises:
        ValueError: an unknown target, or arguments that are not the kernel's.
        TypeError: the kernel is interpreted or autotuned.
    """
    _check_kernel(kernel)
    names = [*kernel.arg_names]
    if unknown := ({*signature, *constexprs, *divisible} - {*names}):
        raise ValueError(f"{kernel.__name__}: has no arguments {', '.join(sorted(unknown))}; it has {', '.join(names)}")
    if missing := [name for name in names if name not in signature and name not in constexprs]:
        raise ValueError(f"{kernel.__name__}: neither signature nor constexprs has {', '.join(missing)}")
    full = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return _compile(kernel, full, constexprs, hints, target, {"num_warps": num_warps, "num_stages": num_stages})


def compile_launch(launch: Launch, *, target: str) -> Compiled:
    """Compile what a recorded launch would have, on that chip, with the hints of its arguments.

    Raises:
        ValueError, TypeError: as `compile_ahead`.
    """
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, args, kwargs = launch
    _check_kernel(kernel)
    backend = make_backend(_gpu_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs, debug=False)
    options, signature, constexprs, hints = kernel._pack_args(backend, options, bound, specialization, options)
    return _compile(kernel, signature, constexprs, hints, target, options.__dict__)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect the kernel launches of the block in place of running them; their outputs stay as they were."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def _compile(kernel, signature, constexprs, hints, target, options) -> Compiled:
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=hints)
    binary = triton.compile(source, target=_gpu_target(target), options=options)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    return read(binary)


def _check_kernel(kernel: object) -> None:
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"kernel: expected a function under @triton.jit alone, got {type(kernel).__name__}"
            " (with TRITON_INTERPRET=1 set, kernels are interpreted and cannot be compiled)"
        )


def _known(target: str) -> str:
    if target not in _SHARED:
        raise ValueError(f"target: unknown {target!r}; accepted: {', '.join(_SHARED)}")
    return target


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if _known(target).startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def _read_nvidia(binary: Any) -> Compiled:
    usage = _resource_usage(binary.asm["cubin"])
    loads: Counter[int] = Counter()
    ptx = binary.asm["ptx"]
    for vector, bits in re.findall(r"\bld\.global(?:\.[a-zA-Z_0-9:]+?)*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx):
        loads[int(vector or 1) * int(bits) // 8] += 1
    for size in re.findall(
        r"\bcp\.async\.c[ag]\.shared\.global(?:\.[A-Z0-9:_]+)*\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)",
        ptx,
    ):
        loads[int(size, 0)] += 1
    return Compiled(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=binary.metadata.shared,
        tensor_core=len(re.findall(_TENSOR_CORE, ptx)),
        loads=dict(loads),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", printed)}


def _read_amd(binary: Any) -> Compiled:
    code = binary.asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", code, re.MULTILINE)[1])

    loads: Counter[int] = Counter()
    for kind, vector in re.findall(
        r"\b(?:global|buffer)_load_(ubyte|sbyte|ushort|sshort|short|dword)(?:_d16(?:_hi)?)?(?:x(\d))?\b", code
    ):
        loads[_AMD_BITS[kind] * int(vector or 1) // 8] += 1
    return Compiled(
        registers=metadata("vgpr_count"),
        spilled=metadata("private_segment_fixed_size"),
        shared=binary.metadata.shared,
        tensor_core=len(re.findall(_TENSOR_CORE, code)),
        loads=dict(loads),
    )
