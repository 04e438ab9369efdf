"""Time and memory of `linear_logprob`, forward and backward, beside what a user would write without it.

Peers: `F.linear` + `F.cross_entropy`, which holds all scores, and torch's own `F.linear_cross_entropy` in
chunks. All run in one process, in turn, on the same inputs, and must agree before anything is timed.

    python kernels/benchmarks/linear_logprob.py --rows 4096 --dim 512 --vocab 32000
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import linear_logprob
from tenfold.kernels.testing.timing import compare, machine, print_table, require_same, write_csv

OURS = "tenfold linear_logprob"


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All scores at once."""
    return -F.cross_entropy(F.linear(hidden, weight), target, reduction="none")


def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """An op of torch itself that does not hold all scores, with the options it chooses."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)


def contenders() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What is compared; older versions of torch have no chunked op."""
    found = {OURS: linear_logprob, "F.linear + F.cross_entropy": plain}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy, chunked"] = chunked
    return found


def main() -> None:
    """Check that all agree, time them, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rows", 4096), ("dim", 512), ("vocab", 32000), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the timings there too")
    arguments = parser.parse_args()

    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    torch.manual_seed(0)
    hidden = torch.randn(arguments.rows, arguments.dim, **options).requires_grad_()
    weight = (torch.randn(arguments.vocab, arguments.dim, **options) / arguments.dim**0.5).requires_grad_()
    target = torch.randint(arguments.vocab, (arguments.rows,), device=arguments.device)
    grad = torch.randn(arguments.rows, device=arguments.device)

    def forward(f: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return f(hidden, weight, target)

    def training(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        logp = f(hidden, weight, target)
        return logp.detach(), *torch.autograd.grad(logp, (hidden, weight), grad.to(logp.dtype))

    peers = contenders()
    tolerance = 1e-4 if arguments.dtype == "float32" else 5e-2
    require_same({name: training(f) for name, f in peers.items()}, tolerance)
    what = {name: getattr(arguments, name) for name in ("rows", "dim", "vocab", "dtype", "device")}
    print(", ".join(f"{name} {value}" for name, value in (what | machine()).items() if value != ""))
    rows = []
    for title, run in (("forward", forward), ("forward and backward", training)):
        calls = {name: partial(run, f) for name, f in peers.items()}
        timings = compare(calls, rounds=arguments.rounds, device=arguments.device)
        print_table(title, timings)
        rows += [({"pass": title} | what, timing) for timing in timings]
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
