"""Time and memory of `quant_matmul` beside a product of operands that another emulator has rounded.

Peers: torchao's generic converter and the formula in plain torch, eager and compiled, each with block scales and
`F.linear`; and `F.linear` alone, which rounds nothing: the floor. All run in one process, in turn, on the same inputs,
and those that round must agree before anything is timed.

    python kernels/benchmarks/quant_matmul.py --tokens 512 --width 1024 --out 4096 --format e2m1
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from fake_quantize import plain
from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import FloatFormat, quant_matmul
from tenfold.kernels.testing.timing import compare, machine, print_table, require_same, write_csv


def emulated(rounder: Callable[[Tensor], Tensor], format: FloatFormat, block: int, x: Tensor, weight: Tensor) -> Tensor:
    """Both operands rounded with block scales, then multiplied."""

    def rounded(t: Tensor) -> Tensor:
        blocks = t.float().unflatten(-1, (-1, block))
        largest = blocks.abs().amax(-1, keepdim=True)
        scale = torch.full_like(largest, format.max) / largest
        return (rounder(blocks * scale) / scale).flatten(-2).to(t.dtype)

    return F.linear(rounded(x), rounded(weight))


def contenders(format: FloatFormat, block: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Ours first, the product that rounds nothing last."""
    ours = partial(quant_matmul, a_format=format, b_format=format, scale="block", block_size=block)
    formula = partial(emulated, partial(plain, format), format, block)
    found = {"tenfold quant_matmul": ours, "the formula in torch": formula}
    found["the formula in torch, compiled"] = torch.compile(formula, fullgraph=True)
    splits = format.specials == "none" and format.mantissa_bits >= 1 and format.exponent_bits >= 2 and format.bits <= 8
    if splits and find_spec("torchao"):
        from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32

        split = format.exponent_bits, format.mantissa_bits

        def torchao(x: Tensor) -> Tensor:
            return _floatx_unpacked_to_f32(_f32_to_floatx_unpacked(x, *split), *split)

        found["torchao floatx + F.linear"] = partial(emulated, torchao, format, block)
    return found | {"F.linear, nothing rounded": F.linear}


def main() -> None:
    """Check that all agree, time them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 512), ("width", 1024), ("out", 4096), ("block", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--format", default="e4m3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the timings there too")
    arguments = parser.parse_args()

    format = FloatFormat.parse(arguments.format)
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    torch.manual_seed(0)
    x = torch.randn(arguments.tokens, arguments.width, **options)
    weight = torch.randn(arguments.out, arguments.width, **options) / arguments.width**0.5
    peers = contenders(format, arguments.block)
    rounding = {name: [f(x, weight)] for name, f in peers.items() if f is not F.linear}
    require_same(rounding, 1e-5 if arguments.dtype == "float32" else 2e-2)
    names = ("format", "tokens", "width", "out", "block", "dtype", "device")
    what = {name: getattr(arguments, name) for name in names}
    print(", ".join(f"{name} {value}" for name, value in (what | machine()).items() if value != ""))
    calls = {name: partial(f, x, weight) for name, f in peers.items()}
    timings = compare(calls, rounds=arguments.rounds, device=arguments.device)
    print_table(f"{format} × {format}, blocks of {arguments.block}", timings)
    if arguments.csv:
        write_csv(arguments.csv, [(what, timing) for timing in timings])


if __name__ == "__main__":
    main()
