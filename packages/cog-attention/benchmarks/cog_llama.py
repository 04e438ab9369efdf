"""What Cog attention costs in a transformers Llama: a training step and a decoding step, beside softmax.

The models have the same weights and differ in `attn_implementation` alone, so they do not compute the same.

    python packages/cog-attention/benchmarks/cog_llama.py --length 512
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaForCausalLM

from tenfold.cog_attention import register
from tenfold.core.lm import llama_config
from tenfold.kernels.testing.timing import compare, machine, print_table, write_csv


def main() -> None:
    """Time them and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 4), ("dim", 256), ("heads", 4), ("length", 512), ("batch", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the timings there too")
    arguments = parser.parse_args()

    register()
    models = {}
    for name, attention in (("cog", "cog"), ("softmax, sdpa", "sdpa"), ("softmax, eager", "eager")):
        torch.manual_seed(0)
        config = llama_config(
            vocab_size=1024,
            layers=arguments.layers,
            dim=arguments.dim,
            heads=arguments.heads,
            ffn=3 * arguments.dim,
            max_length=arguments.length + 64,
            attention=attention,
        )
        models[name] = LlamaForCausalLM(config).to(arguments.device)
    tokens = torch.randint(1024, (arguments.batch, arguments.length), device=arguments.device)

    def train(model: LlamaForCausalLM) -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad()

    @torch.no_grad()
    def decode(model: LlamaForCausalLM, cache: DynamicCache) -> None:
        model(tokens[:, :1], past_key_values=cache)
        cache.crop(-1)

    what = {name: getattr(arguments, name) for name in ("layers", "dim", "heads", "length", "batch", "device")}
    print(", ".join(f"{name} {value}" for name, value in (what | machine()).items() if value != ""))
    steps = {"training step": {name: partial(train, model) for name, model in models.items()}, "decoding step": {}}
    for name, model in models.items():
        with torch.no_grad():
            cache = model(tokens, past_key_values=DynamicCache(config=model.config)).past_key_values
        steps["decoding step"][name] = partial(decode, model, cache)
    rows = []
    for title, calls in steps.items():
        timings = compare(calls, rounds=arguments.rounds, device=arguments.device)
        print_table(title, timings)
        rows += [({"step": title} | what, timing) for timing in timings]
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
