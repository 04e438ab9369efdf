"""How long decoding a token takes as the context grows, and how long it must take: the floors of both caches."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ..budget import bytes_per_token
from ..cache import CLLACache
from ..config import CLLAConfig
from ..ladder import rung
from ..model import CLLAForCausalLM

H100 = {"bytes": 3.35e12, "flops": 989e12}  # per second, SXM: HBM3, and dense bfloat16 tensor cores
CONTENDERS = ("CLLA, 4 bits", "MHA, DynamicCache", "MHA, CLLACache")


def decode_step_seconds(base: CLLAConfig, contexts: list[int], *, rounds: int, seed: int) -> dict[str, list[float]]:
    """The fastest of `rounds` decoding steps of one sequence at each context, by contender.

    One process, the contenders in turn, the fastest because what else the machine does only adds. The MHA models
    are transformers' Llama with its DynamicCache, and the same weights with this package's growing 16-bit cache.
    """
    steps = contenders(base, seed=seed)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for context in contexts:
        calls = {name: make(context) for name, make in steps.items()}
        best = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                best[name].append(time.perf_counter() - start)
        for name, times in best.items():
            seconds[name].append(min(times[1:] or times))  # the first call settles the allocator
    return seconds


def contenders(base: CLLAConfig, *, seed: int) -> dict[str, Callable[[int], Callable[[], Tensor]]]:
    """For each contender a function that fills a cache to a context and returns one decoding step on it.

    A step appends a token and takes it away again, so that every call does the same.
    """
    torch.manual_seed(seed)
    clla = CLLAForCausalLM(base).eval()
    mha_config = rung(base, "MHA", cache_bits=16)
    ours = CLLAForCausalLM(mha_config).eval()
    names = [name for name in LlamaConfig().to_dict() if hasattr(mha_config, name) and name != "model_type"]
    theirs = LlamaForCausalLM(LlamaConfig(**{name: getattr(mha_config, name) for name in names})).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)  # one copy of the weights

    def filled(config: CLLAConfig | None, context: int):
        cache = DynamicCache(config=theirs.config) if config is None else CLLACache(config)
        for layer in range(base.num_hidden_layers):
            formats = (config or mha_config).cache_formats(layer)
            if formats:
                # A quarter at a time: half the memory while filling.
                for part in range(4):
                    time = context // 4 + (context % 4 if part == 3 else 0)
                    cache.update(*(torch.randn(1, f.heads, time, f.width) for f in formats), layer)
        return cache

    @torch.no_grad()
    def step(model, cache) -> Tensor:
        logits = model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache).logits
        cache.crop(-1)
        return logits

    models = (clla, base), (theirs, None), (ours, mha_config)
    return {
        name: lambda context, model=model, config=config: partial(step, model, filled(config, context))
        for name, (model, config) in zip(CONTENDERS, models, strict=True)
    }


def work_per_key(config: CLLAConfig, *, element_size: int = 2) -> tuple[float, float]:
    """Bytes read and floating-point operations done per cached token, for one decoded token, over all layers.

    Every layer reads its run's cache: sharing saves capacity, not bandwidth. Expanded heads cost 4·n_h·d_h
    operations a key; absorbed latents n_h·(2·(d_c + d_r) + 2·d_c).
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    runs = len(set(config.cache_producers))
    read = bytes_per_token(config, element_size=element_size) * layers / runs
    if config.attention == "heads":
        return read, 4.0 * heads * config.head_dim * layers
    return read, heads * (4.0 * config.latent_dim + 2 * config.rotary_dim) * layers


def floors(base: CLLAConfig) -> dict[str, float]:
    """Seconds per decoded token and cached token that no implementation can go below: bytes or operations.

    For this CPU, in float32, by its measured bandwidth and matrix products; for an H100 by its data sheet.
    """
    machine = measure_cpu()
    result = {}
    for name, config in (("CLLA", base), ("MHA", rung(base, "MHA", cache_bits=16))):
        for where, peak, element_size in (("cpu", machine, 4), ("h100", H100, 2)):
            read, operations = work_per_key(config, element_size=element_size)
            result[f"{name} {where} bytes"] = read / peak["bytes"]
            result[f"{name} {where} flops"] = operations / peak["flops"]
    return result | {f"cpu {name}": value for name, value in machine.items()}


def measure_cpu() -> dict[str, float]:
    """Bytes per second read from memory, and float32 operations per second in a matrix product of this shape."""
    x = torch.ones(2**26)
    query, keys = torch.randn(16, 576), torch.randn(4096, 576)
    return {
        "bytes": x.numel() * 4 / _fastest(x.sum),
        "flops": 2 * 16 * 576 * 4096 / _fastest(lambda: query @ keys.T),
    }


def slope(contexts: list[int], seconds: list[float]) -> float:
    """Seconds per token of context, by least squares."""
    return statistics.linear_regression(contexts, seconds).slope


def _fastest(call: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
