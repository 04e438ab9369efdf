"""Time and memory of `linear_logprob`, forward and backward, beside what a user would write without it.

Peers: `F.linear` + `F.cross_entropy`, which holds all scores, and torch's own `F.linear_cross_entropy` in
chunks. All run in one process, in turn, on the same inputs, and must agree before anything is timed.

    python kernels/benchmarks/linear_logprob.py --rows 4096 --dim 512 --vocab 32000
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import linear_logprob
from tenfold.kernels.testing import peak_memory

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
    """Print median seconds, the median ratio to ours within a round with its spread, and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rows", 4096), ("dim", 512), ("vocab", 32000), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
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
    truth = training(plain)
    for f in peers.values():
        for ours, theirs in zip(training(f), truth, strict=True):
            tolerance = {} if options["dtype"] == torch.float32 else {"rtol": 0.05, "atol": 0.05}
            torch.testing.assert_close(ours.float(), theirs.float(), **tolerance or {"rtol": 1e-4, "atol": 1e-5})
    del truth

    print(
        f"rows {arguments.rows}, dim {arguments.dim}, vocabulary {arguments.vocab}, {arguments.dtype}, ",
        end="",
    )
    print(f"{arguments.device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for what, run in (("forward", forward), ("forward and backward", training)):
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(arguments.rounds):
            for name, f in peers.items():
                seconds[name].append(timed(partial(run, f), arguments.device))
        print(f"\n{what:34}{'seconds':>9}{'of ours':>9}{'lowest to highest':>20}{'peak MB':>9}")
        for name, f in peers.items():
            ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True)]
            peak = peak_memory(partial(run, f), device=arguments.device) / 2**20
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            middle = statistics.median
            print(f"{name:34}{middle(seconds[name]):9.3f}{middle(ratios):9.2f}{spread:>20}{peak:9.0f}")


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
