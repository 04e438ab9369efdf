"""Time of one decoding step of `latent_attention` against context length, beside attention without a latent.

Contenders: our op over a cache in 4 bits, in 8, in the other codes, and of plain latents; torch's SDPA over the keys
and values of the same number of heads, contiguous, without the copy that appending to them costs; and the definition
in plain torch, which unpacks the whole cache. Before anything is timed, ours must equal the definition in float64.
SDPA's keys and values are others: it is timed as what it replaces, not compared.

    python kernels/benchmarks/latent_attention.py --heads 16 --lengths 8192 32768
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import latent_attention, pack_latents, use_backend
from tenfold.kernels.testing import latent_inputs
from tenfold.kernels.testing.timing import Timing, compare, machine, print_table, require_same, write_csv

OURS = "tenfold latent_attention, 4 bits"
FORMATS = {
    OURS: {},
    "… 8 bits": {"bits": 8},
    "… asymmetric 4 bits": {"code": "asymmetric"},
    "… FP4": {"code": "float"},
    "… FP8": {"bits": 8, "code": "float"},
    "… 4 bits without scales": {"scale_dtype": None},
}


def definition(*arguments: object, scale: float) -> Tensor:
    """The reference."""
    with use_backend("reference"):
        return latent_attention(*arguments, scale=scale)


def main() -> None:
    """Check, time, print the tables, the slopes and the floors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("heads", 16), ("dim", 128), ("latent", 512), ("rope", 64), ("batch", 1), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all timings there too")
    arguments = parser.parse_args()
    heads, dim, device = arguments.heads, arguments.dim, arguments.device
    dtype = getattr(torch, arguments.dtype)
    scale = (dim + arguments.rope) ** -0.5
    what = {name: getattr(arguments, name) for name in ("batch", "heads", "dim", "latent", "rope", "dtype", "device")}
    print(", ".join(f"{name} {value}" for name, value in (what | machine()).items() if value != ""))

    rows: list[tuple[dict[str, object], Timing]] = []
    tables: dict[int, list[Timing]] = {}
    for length in sorted(arguments.lengths):
        sizes = arguments.batch, heads, 1, length, arguments.latent
        tensors = latent_inputs(*sizes, rope=arguments.rope, dtype=dtype, device=device)
        queries, plain = (tensors["query_latent"], tensors["query_rope"]), (tensors["latent"], tensors["rope"])
        caches = {name: [pack_latents(x, **options) for x in plain] for name, options in FORMATS.items()}
        wide = [x.double() for x in queries]
        for name, cache in caches.items():
            truth = definition(*wide, *cache, scale=scale)
            require_same(
                {name: [latent_attention(*queries, *cache, scale=scale)], "the definition in float64": [truth]},
                1e-4 if dtype == torch.float32 else 5e-2,
            )
        contenders: dict[str, Callable[[], Tensor]] = {
            name: partial(latent_attention, *queries, *cache, scale=scale)
            for name, cache in (caches | {f"… plain {arguments.dtype}": plain}).items()
        }
        contenders["the definition, 4 bits unpacked"] = partial(definition, *queries, *caches[OURS], scale=scale)
        key, value = torch.randn(2, arguments.batch, heads, length, dim, dtype=dtype, device=device)
        query = torch.randn(arguments.batch, heads, 1, dim, dtype=dtype, device=device)
        contenders["torch SDPA over keys and values"] = partial(F.scaled_dot_product_attention, query, key, value)

        with torch.inference_mode():
            tables[length] = compare(contenders, rounds=arguments.rounds, device=device)
        print_table(f"{length} keys", tables[length])
        stored = sum(x.nbytes for packed in caches[OURS] for x in packed.tensors)
        operations = 2 * arguments.batch * heads * length * (2 * arguments.latent + arguments.rope)
        print(f"floor: ours {stored / 1e6:.1f} MB and {operations / 1e9:.2f} GFLOP", end="; ")
        print(f"SDPA {(key.nbytes + value.nbytes) / 1e6:.1f} MB and {4 * key.numel() / 1e9:.2f} GFLOP")
        rows += [({"length": length} | what, timing) for timing in tables[length]]

    first, *_, last = sorted(tables) if len(tables) > 1 else (None, None)
    if first is not None:
        print(f"\nmicroseconds more for each 1,000 keys more, {first} to {last}: medians, and fastest calls")
        for short, long in zip(tables[first], tables[last], strict=True):
            slopes = ((f(long) - f(short)) / (last - first) * 1e9 for f in (lambda t: t.seconds, lambda t: t.fastest))
            print(f"{short.contender:34}" + "".join(f"{slope:10.1f}" for slope in slopes))
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
