"""Decoding one token with CLLA's packed cache, beside MHA with transformers' DynamicCache, as the context grows.

One process, the contenders in turn. MHA is transformers' Llama of the same width; a third contender is the same MHA
with this package's 16-bit cache, which does not copy itself at every token as DynamicCache does. The models have
different weights, so what is checked first is each against itself: a decoding step against a pass without a cache.

    python packages/clla/benchmarks/decode.py --contexts 8192 32768
"""

import argparse
from pathlib import Path

import torch

from tenfold.clla import CLLACache, CLLAConfig, CLLAForCausalLM, bytes_per_token, rung
from tenfold.clla.reproduction.decoding import CONTENDERS, contenders, floors, slope
from tenfold.kernels.testing.timing import compare, machine, print_table, require_same, write_csv


def main() -> None:
    """Time them and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 2), ("dim", 2048), ("heads", 16), ("latent", 512), ("rope", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the timings there too")
    arguments = parser.parse_args()

    base = CLLAConfig(
        vocab_size=1024,
        hidden_size=arguments.dim,
        intermediate_size=arguments.dim * 43 // 16,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        latent_dim=arguments.latent,
        rope_dim=arguments.rope,
        max_position_embeddings=max(arguments.contexts) + 1,
    )
    check(base)
    what = {name: getattr(arguments, name) for name in ("layers", "dim", "heads", "latent", "rope")}
    print(", ".join(f"{name} {value}" for name, value in (what | machine()).items() if value != ""))
    for name, config in (("CLLA", base), ("MHA", rung(base, "MHA", cache_bits=16))):
        sizes = ", ".join(f"{bytes_per_token(config) * t / 2**20:.1f} MB at {t}" for t in arguments.contexts)
        print(f"{name}: {bytes_per_token(config)} bytes of cache per token (16 bits as bfloat16): {sizes}")

    make = contenders(base, seed=0)
    rows, before, seconds = [], (), {name: [] for name in CONTENDERS}
    for context in arguments.contexts:
        calls = {name: make[name](context) for name in CONTENDERS}
        timings = compare(calls, rounds=arguments.rounds, device="cpu")
        print_table(f"a token after {context}", timings, before)
        rows += [({"context": context} | what, timing) for timing in timings]
        for timing in timings:
            seconds[timing.contender].append(timing.seconds)
        before = timings
        del calls
    if len(arguments.contexts) > 1:
        print_slopes(base, arguments.contexts, seconds)
    if arguments.csv:
        write_csv(arguments.csv, rows)


@torch.no_grad()
def check(base: CLLAConfig) -> None:
    """That a decoding step gives what a pass without a cache gives, for a cache that was filled by the model."""
    torch.manual_seed(0)
    model = CLLAForCausalLM(base).eval()
    tokens = torch.randint(1024, (1, 65))
    cache = CLLACache(base)
    model(tokens[:, :-1], past_key_values=cache)
    step = model(tokens[:, -1:], past_key_values=cache).logits
    # A code may fall on the other side of a midpoint in float32; one step of one number in 512 is below this.
    require_same({"a pass": [model(tokens, use_cache=False).logits[:, -1:]], "a step": [step]}, 0.02)


def print_slopes(base: CLLAConfig, contexts: list[int], seconds: dict[str, list[float]]) -> None:
    """How the time grows with the context, beside the floors of this CPU and of an H100."""
    floor = floors(base)
    ours = slope(contexts, seconds[CONTENDERS[0]])
    print(f"\n{'per 1,000 tokens of context':30}{'µs':>10}{'of ours':>9}{'floor: bytes':>14}{'operations':>12}", end="")
    print(f"{'H100: bytes':>13}{'operations':>12}")
    for name in CONTENDERS:
        measured, kind = slope(contexts, seconds[name]), name.split(",")[0]
        limits = [1e9 * floor[f"{kind} {where}"] for where in ("cpu bytes", "cpu flops", "h100 bytes", "h100 flops")]
        print(f"{name:30}{1e9 * measured:10.0f}{measured / ours:9.2f}", end="")
        print(f"{limits[0]:14.0f}{limits[1]:12.0f}{limits[2]:13.2f}{limits[3]:12.3f}")
    print(
        f"floors: this CPU reads {floor['cpu bytes'] / 1e9:.0f} GB/s and multiplies at "
        f"{floor['cpu flops'] / 1e9:.0f} GFLOP/s in float32, measured now; "
        "an H100 3,350 GB/s and 989 TFLOP/s in bfloat16, its data sheet. No GPU was used."
    )


if __name__ == "__main__":
    main()
