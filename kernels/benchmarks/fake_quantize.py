"""Time and memory of `fake_quantize`, scaled per tensor, beside the emulators and casts that users have.

Peers: a cast to the dtype of torch and of ml_dtypes that has the format, torchao's generic converter, gfloat, and
the formula in plain torch (`frexp`, `ldexp`, `round`), eager and compiled. All scale, round and scale back the
same float32 numbers in one process, in turn, and must give the same bits before anything is timed.

    python kernels/benchmarks/fake_quantize.py --format e4m3fn --elements 4194304
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from tenfold.kernels import FloatFormat, fake_quantize
from tenfold.kernels.testing.timing import compare, machine, print_table, require_same, write_csv

Rounder = Callable[[Tensor], Tensor]

TORCH_DTYPES = {"e4m3fn": "float8_e4m3fn", "e5m2ieee": "float8_e5m2", "e8m7ieee": "bfloat16", "e5m10ieee": "float16"}
ML_DTYPES = {
    "e4m3fn": "float8_e4m3fn",
    "e5m2ieee": "float8_e5m2",
    "e3m2": "float6_e3m2fn",
    "e2m3": "float6_e2m3fn",
    "e2m1": "float4_e2m1fn",
}


def plain(format: FloatFormat, x: Tensor) -> Tensor:
    """The definition, as one would write it."""
    exponent = (torch.frexp(x).exponent - 1).clamp(min=format.min_exponent)
    steps = torch.ldexp(x, format.mantissa_bits - exponent)
    return torch.ldexp(steps.round(), exponent - format.mantissa_bits).clamp(-format.max, format.max)


def rounders(format: FloatFormat) -> dict[str, Rounder]:
    """What each peer does to scaled numbers; only those that have the format."""
    found: dict[str, Rounder] = {}
    if name := TORCH_DTYPES.get(str(format)):
        found[f"torch .to({name})"] = lambda x: x.to(getattr(torch, name)).float()
    if kind := ML_DTYPES.get(str(format)):
        import ml_dtypes
        import numpy as np

        found["ml_dtypes"] = lambda x: torch.from_numpy(x.numpy().astype(getattr(ml_dtypes, kind)).astype(np.float32))
    splits = format.specials == "none" and format.mantissa_bits >= 1 and format.exponent_bits >= 2 and format.bits <= 8
    if splits and find_spec("torchao"):
        from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32

        split = format.exponent_bits, format.mantissa_bits
        found["torchao floatx"] = lambda x: _floatx_unpacked_to_f32(_f32_to_floatx_unpacked(x, *split), *split)
    if format.mantissa_bits > 0:
        found["the formula in torch"] = partial(plain, format)
        found["the formula in torch, compiled"] = torch.compile(partial(plain, format), fullgraph=True)
    found["gfloat"] = gfloat_rounder(format)
    return found


def gfloat_rounder(format: FloatFormat) -> Rounder:
    """Its rounding of NumPy arrays, the faster of its two."""
    from gfloat import Domain, FormatInfo, RoundMode, round_ndarray

    info = FormatInfo(
        *(str(format), format.bits, format.mantissa_bits + 1),
        bias=format.bias,
        is_signed=True,
        domain=Domain.Extended if format.specials == "ieee" else Domain.Finite,
        has_nz=True,
        num_high_nans={"none": 0, "nan": 1, "ieee": 2**format.mantissa_bits - 1}[format.specials],
        has_subnormals=True,
        is_twos_complement=False,
    )
    return lambda x: torch.from_numpy(round_ndarray(info, x.numpy(), RoundMode.TiesToEven, sat=True)).float()


def scaled(rounder: Rounder, format: FloatFormat, x: Tensor) -> Tensor:
    """`round(x · S) / S`, with one scale for all."""
    low, high = torch.aminmax(x)
    largest = torch.maximum(-low, high)
    scale = torch.full_like(largest, format.max) / largest
    return rounder(x * scale).div_(scale)


def contenders(format: FloatFormat, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ours first; peers that compute on the CPU only with a tensor that is there."""
    ours = partial(fake_quantize, format=format, scale="tensor")
    found = {"tenfold fake_quantize": ours, "tenfold, compiled": torch.compile(ours, fullgraph=True)}
    for name, rounder in rounders(format).items():
        if device == "cpu" or name not in ("ml_dtypes", "gfloat"):
            found[name] = partial(scaled, rounder, format)
    return found


def main() -> None:
    """Check that all agree, time them at the size and at half of it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="e4m3fn")
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the timings there too")
    arguments = parser.parse_args()

    format = FloatFormat.parse(arguments.format)
    torch.manual_seed(0)
    x = torch.randn(arguments.elements, device=arguments.device)
    peers = contenders(format, arguments.device)
    require_same({name: [f(x)] for name, f in peers.items()}, 0.0)
    what = {"format": str(format), "elements": arguments.elements, "device": arguments.device}
    print(", ".join(f"{name} {value}" for name, value in (what | machine()).items() if value != ""))
    timings = {}
    for size in (arguments.elements // 2, arguments.elements):
        calls = {name: partial(f, x[:size]) for name, f in peers.items()}
        timings[size] = compare(calls, rounds=arguments.rounds, device=arguments.device)
    smaller, full = timings.values()
    print_table(f"{format}, scaled per tensor", full, smaller)
    print("\nmillions of elements a second")
    for timing in full:
        print(f"{timing.contender:34}{arguments.elements / timing.seconds / 1e6:10.1f}")
    if arguments.csv:
        write_csv(arguments.csv, [(what, timing) for timing in full])


if __name__ == "__main__":
    main()
