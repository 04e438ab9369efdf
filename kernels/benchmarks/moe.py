"""Time and memory of a mixture-of-experts layer on our ops, beside transformers' own ways to run its experts.

The layer: a linear router, top-k without a capacity, SwiGLU experts, forward and backward with the gradients
of the inputs, the router and both expert weights. Peers: the experts of transformers' `hunyuan_v1_moe`, run by
its `grouped_mm` and its `eager` implementation after the same softmax and top-k. All run in one process, in
turn, on the same weights, and must agree before anything is timed.

    python kernels/benchmarks/moe.py --tokens 1024 --dim 512 --inner 1024 --experts 16
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import HunYuanMoEV1Config
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1Experts

from tenfold.kernels import expert_swiglu, route_tokens
from tenfold.kernels.moe import compiled
from tenfold.kernels.testing.timing import compare, machine, print_table, require_same, write_csv

OURS = "tenfold"


def ours(x: Tensor, router: Tensor, up: Tensor, down: Tensor, top_k: int) -> Tensor:
    """The layer by our ops; `up` holds gate and value, as transformers stores them."""
    return expert_swiglu(x, up, down, route_tokens(F.linear(x, router), top_k))


def theirs(experts: HunYuanMoEV1Experts, way: str, x: Tensor, router: Tensor, up: Tensor, down: Tensor, top_k: int):
    """The layer by transformers' experts, whose parameters `up` and `down` are."""
    experts.config._experts_implementation = way
    weight, index = F.linear(x, router).softmax(-1, dtype=torch.float32).topk(top_k)
    if top_k > 1:
        weight = weight / weight.sum(-1, keepdim=True)
    return experts(x, index, weight.to(x.dtype))


def main() -> None:
    """Check that all agree, time them, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"tokens": 1024, "dim": 512, "inner": 1024, "experts": 16, "top-k": 1, "rounds": 7}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the timings there too")
    arguments = parser.parse_args()
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    config = HunYuanMoEV1Config(
        hidden_size=arguments.dim, intermediate_size=arguments.inner, num_experts=arguments.experts
    )
    torch.manual_seed(0)
    experts = HunYuanMoEV1Experts(config).to(**options)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(arguments.tokens, arguments.dim, **options).requires_grad_()
    router = (torch.randn(arguments.experts, arguments.dim, **options) / arguments.dim**0.5).requires_grad_()
    leaves = (x, router, experts.gate_up_proj, experts.down_proj)
    grad = torch.randn_like(x)

    def forward(layer: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return layer(*leaves, arguments.top_k)

    def training(layer: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = layer(*leaves, arguments.top_k)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    layers = {OURS: ours} | {f"transformers, {way}": partial(theirs, experts, way) for way in ("grouped_mm", "eager")}
    require_same({name: training(f) for name, f in layers.items()}, 1e-5 if arguments.dtype == "float32" else 5e-2)
    what = {n.replace("-", "_"): getattr(arguments, n.replace("-", "_")) for n in sizes if n != "rounds"}
    what |= {"dtype": arguments.dtype, "device": arguments.device}
    if arguments.device == "cpu":
        what["by"] = "swiglu.c" if compiled.suits(x, experts.gate_up_proj, experts.down_proj) else "torch's libraries"
    products = 6 * arguments.tokens * arguments.top_k * arguments.dim * arguments.inner
    print(", ".join(f"{name} {value}" for name, value in (what | machine()).items() if value != ""))
    rows = []
    for title, run, passes in (("forward", forward, 1), ("forward and backward", training, 3)):
        calls = {name: partial(run, f) for name, f in layers.items()}
        timings = compare(calls, rounds=arguments.rounds, device=arguments.device)
        print_table(title, timings)
        rate = passes * products / timings[0].seconds / 1e9
        print(f"{passes * products / 1e9:.1f} GFLOP of matrix products, by {OURS} at {rate:.0f} GFLOP/s")
        rows += [({"pass": title} | what, timing) for timing in timings]
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
