"""Time and memory of causal `cog_attention`, forward and backward, beside what a user would run without it.

Peers: x-transformers' `Attend(cog_signed=True)`, the formula in plain torch, on a GPU also two FlexAttention
passes merged by their log-sum-exp; and torch's softmax attention, which computes something else: the floor.
Before anything is timed all must agree, and at every length our last rows must equal the formula in float64.

    python kernels/benchmarks/cog_attention.py --heads 8 --lengths 1024 2048 4096
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import cog_attention
from tenfold.kernels.testing import cog_inputs
from tenfold.kernels.testing.timing import Timing, compare, machine, print_table, require_same, write_csv

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS = "tenfold cog_attention"
FLOOR = "torch SDPA (softmax: the floor)"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula as one writes it down: sign(s) · softmax(|s|) V, with three T×T matrices."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    Tq, Tk = scores.shape[-2:]
    future = torch.ones(Tq, Tk, dtype=torch.bool, device=query.device).triu(1 + Tk - Tq)
    return (scores.sign() * scores.abs().masked_fill(future, -torch.inf).softmax(-1)) @ value


def two_flex_passes() -> Attention:
    """FlexAttention over the positive and over the negative scores, compiled."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)

    def positive(score, b, h, i, j):
        return torch.where(score > 0, score, -torch.inf)

    def negative(score, b, h, i, j):
        return torch.where(score < 0, -score, -torch.inf)

    def past(b, h, i, j):
        return j <= i

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        T = query.shape[2]
        mask = create_block_mask(past, None, None, T, T, device=query.device)
        halves = [
            compiled(query, key, value, score_mod=f, block_mask=mask, return_aux=AuxRequest(lse=True))
            for f in (positive, negative)
        ]
        outs = [out.nan_to_num() for out, _ in halves]  # a row may have no score of that sign
        shares = torch.stack([aux.lse for _, aux in halves]).softmax(0)[..., None].to(query.dtype)
        return shares[0] * outs[0] - shares[1] * outs[1]

    return attention


def peers(device: str) -> dict[str, Attention]:
    """What computes the same; all but FlexAttention hold T×T matrices."""
    found = {"plain torch": plain}
    try:
        from x_transformers.attend import Attend
    except ImportError:
        print("x-transformers is not installed: not compared")
    else:
        attend = Attend(causal=True, cog_signed=True)
        found["x-transformers Attend(cog_signed)"] = lambda query, key, value: attend(query, key, value)[0]
    if device == "cuda":
        found["two FlexAttention passes"] = two_flex_passes()
    return found


def inputs(heads: int, length: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Numbers whose scores are exact and never 0, so that no contender can round one to the other sign."""
    tensors = cog_inputs(1, heads, length, length, dim, device=device)
    for name in ("query", "key"):
        # Halves, but for odd quarters in one place: in sixteenths, every product of two vectors is odd.
        tensors[name] = tensors[name].mul(2).round().div(2)
        tensors[name][..., 0] += 0.25
    return [x.to(dtype).requires_grad_() for x in tensors.values()]


def main() -> None:
    """Check, time, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--scores-mb", type=int, default=300, help="leave out peers that hold T×T scores where one takes more"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all timings there too")
    arguments = parser.parse_args()
    heads, dim, device = arguments.heads, arguments.dim, arguments.device
    dtype = getattr(torch, arguments.dtype)

    print(f"batch 1, heads {heads}, dim {dim}, {arguments.dtype}, {device}, causal; ", end="")
    print(", ".join(f"{name} {value}" for name, value in machine().items() if value != ""))
    same = peers(device)
    rows: list[tuple[dict[str, object], Timing]] = []
    smaller: dict[str, list[Timing]] = {}
    for length in sorted(arguments.lengths):
        leaves = inputs(heads, length, dim, dtype, device)
        grad = torch.randn(leaves[0].shape, device=device).to(dtype)
        fits = heads * length**2 * dtype.itemsize <= arguments.scores_mb * 2**20
        contenders = {OURS: partial(cog_attention, causal=True)}
        contenders |= {name: f for name, f in same.items() if fits or "Flex" in name}

        with torch.no_grad():
            last = leaves[0][:, :, -8:].double(), leaves[1].double(), leaves[2].double()
            ends = {
                OURS: [cog_attention(*leaves, causal=True)[:, :, -8:]],
                "the formula in float64": [plain(*last)],
            }
        require_same(ends, TOLERANCE[dtype])
        require_same({name: training(f, leaves, grad) for name, f in contenders.items()}, TOLERANCE[dtype])

        contenders[FLOOR] = partial(F.scaled_dot_product_attention, is_causal=True)
        for what, call in (("forward", forward), ("forward and backward", training)):
            calls = {name: partial(call, f, leaves, grad) for name, f in contenders.items()}
            timings = compare(calls, rounds=arguments.rounds, device=device)
            print_table(f"T = {length}, {what}", timings, smaller.get(what, ()))
            smaller[what] = timings
            shape = {"pass": what, "heads": heads, "length": length, "dim": dim, "dtype": arguments.dtype}
            rows += [(shape, timing) for timing in timings]
    if arguments.csv:
        write_csv(arguments.csv, rows)


def forward(f: Attention, leaves: list[Tensor], grad: Tensor) -> Tensor:
    """The output alone; `grad` is for `training`."""
    with torch.no_grad():
        return f(*leaves)


def training(f: Attention, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of query, key and value."""
    out = f(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


if __name__ == "__main__":
    main()
