"""Which implementation of an op runs: chosen by the tensor's device, or by name with `use_backend`."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["reference", "cpu", "triton"]

_forced = threading.local()  # of a thread; a ContextVar is not for torch.compile before torch 2.14


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the ops inside the block on one backend, whatever the tensors' device would choose.

    `reference` is the definition in plain torch, on any device; `cpu` the blocked CPU path; `triton` the
    kernels, on CUDA and ROCm tensors, or on CPU tensors in Triton's interpreter when `TRITON_INTERPRET=1` was
    set before Triton was imported. A backend that cannot run the call raises: nothing falls back.

    Raises:
        ValueError: `name` is not a backend.
    """
    if name not in get_args(Backend):
        raise ValueError(f"name: unknown backend {name!r}; accepted: {', '.join(get_args(Backend))}")
    before = getattr(_forced, "name", None)
    _forced.name = name
    try:
        yield
    finally:
        if before is None:
            del _forced.name
        else:
            _forced.name = before


def choose_backend(tensor: Tensor) -> Backend:
    """The backend for an op whose first argument is `tensor`: the one named by `use_backend`, else by device.

    Without a name: `triton` on CUDA and ROCm, `cpu` on the CPU, `reference` on every other device.

    Raises:
        RuntimeError: the named backend cannot run on the tensor's device.
    """
    device = tensor.device.type
    forced = getattr(_forced, "name", None)
    if forced is None:
        return {"cuda": "triton", "cpu": "cpu"}.get(device, "reference")
    if forced == "cpu" and device not in ("cpu", "meta"):
        raise RuntimeError(f"backend 'cpu' was asked for, but the tensors are on {tensor.device}")
    if forced == "triton" and device not in ("cuda", "meta") and not (device == "cpu" and interpreting()):
        raise RuntimeError(
            f"backend 'triton' was asked for, but the tensors are on {tensor.device}; it runs on CUDA and ROCm "
            "devices, and on the CPU only in Triton's interpreter (TRITON_INTERPRET=1 before the import)"
        )
    return forced


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def architecture(tensor: Tensor) -> str:
    """The chip that holds `tensor` as compilers call it, `sm_90` or `gfx942`; `interpreter` for a CPU tensor."""
    if tensor.device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(tensor.device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return f"sm_{major}{minor}"


def require_tensors(**arguments: object) -> None:
    """Refuse arguments that are no tensors, with a TypeError that names the first."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def refuse_tangents(**tensors: Tensor) -> None:
    """Refuse dual numbers, of `torch.func.jvp` say: torch would drop the tangent of a custom op without a word."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name}: forward-mode differentiation is not supported; use_backend('reference') has it"
            )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors` in the autocast dtype where autocast is on for their device, as torch's own matmuls do."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has none, and the question is an error
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
