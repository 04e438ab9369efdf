"""What emulated quantization costs a training step of a transformers Llama, by the operands that are quantized.

The models have the same weights. The reference backend is the definition in plain torch operations, as most emulators
are written, and computes the same bits.

    python packages/fp-scaling/benchmarks/quantized_llama.py --fmt e2m1 --length 256
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tenfold.core.lm import llama_config
from tenfold.fp_scaling import QuantRecipe, quantize_linears_
from tenfold.kernels import use_backend
from tenfold.kernels.testing.timing import compare, machine, print_table, require_same, write_csv


def main() -> None:
    """Time them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 4), ("dim", 256), ("heads", 4), ("length", 256), ("batch", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--fmt", default="e4m3")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the timings there too")
    arguments = parser.parse_args()

    tokens = torch.randint(1024, (arguments.batch, arguments.length), device=arguments.device)

    def model(targets: tuple[str, ...] | None) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = llama_config(
            vocab_size=1024,
            layers=arguments.layers,
            dim=arguments.dim,
            heads=arguments.heads,
            ffn=3 * arguments.dim,
            max_length=arguments.length,
        )
        llama = LlamaForCausalLM(config).to(arguments.device)
        if targets:
            quantize_linears_(llama, QuantRecipe(arguments.fmt, targets=targets, block_size=arguments.block_size))
        return llama

    def train(llama: LlamaForCausalLM, backend: str | None = None) -> list[torch.Tensor]:
        if backend:
            with use_backend(backend):
                return train(llama)
        llama.zero_grad()
        loss = llama(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return [loss.detach(), llama.model.layers[0].mlp.up_proj.weight.grad]

    usual, everything = ("P2", "P4", "P6"), ("P1", "P2", "P3", "P4", "P5", "P6")
    quantized = model(usual)
    contenders = {
        "P2, P4, P6": partial(train, quantized),
        "P2, P4, P6, reference": partial(train, quantized, "reference"),
        "all six": partial(train, model(everything)),
        "nothing quantized": partial(train, model(None)),
    }
    require_same({name: contenders[name]() for name in list(contenders)[:2]}, 1e-5)
    what = {name: getattr(arguments, name) for name in ("layers", "dim", "heads", "length", "batch", "fmt", "device")}
    print(", ".join(f"{name} {value}" for name, value in (what | machine()).items() if value != ""))
    timings = compare(contenders, rounds=arguments.rounds, device=arguments.device)
    print_table("training step", timings)
    if arguments.csv:
        write_csv(arguments.csv, [(what, timing) for timing in timings])


if __name__ == "__main__":
    main()
