"""The trainings and timings behind the claims: each returns plain numbers, so that they can be kept as JSON."""

import math
from typing import Any

import torch
from torch import Tensor

from tenfold.core.data.text import TextDataModule
from tenfold.core.training import NonFiniteError, fit

from ..cache import CLLACache
from ..config import CLLAConfig
from ..formats import Format
from ..ladder import rung
from ..module import CLLAModule
from .decoding import decode_step_seconds, floors
from .recall import VOCABULARY, RecallData, RecallModule

LENGTH = 128  # tokens of a training window
SIZES = {  # parameters with a vocabulary of 1,024, as MHA: sizes, and the rows of a batch
    "0.42M": {"layers": 6, "dim": 64, "heads": 4, "ffn": 172, "latent_dim": 16, "rope_dim": 8, "batch": 8},
    "1.5M": {"layers": 6, "dim": 128, "heads": 4, "ffn": 344, "latent_dim": 32, "rope_dim": 8, "batch": 16},
}
ARMS = {  # the latent is a quarter of the width, as 512 is of 2048
    "MHA": {"rung": "MHA", "cache_bits": 16},
    "GQA": {"rung": "GQA", "cache_bits": 16, "kv_heads": 2},
    "CLA": {"rung": "CLA", "cache_bits": 16},
    "MLA": {"rung": "MLA", "cache_bits": 16},
    "CLLA": {"rung": "CLLA", "cache_bits": 16},
    "CLLA-quant": {"rung": "CLLA", "cache_bits": 4},
    "CLLA of three layers": {"rung": "CLLA", "cache_bits": 16, "share_factor": 3},
    "MHA-quant": {"rung": "MHA", "cache_bits": 4},
}
PAPER = {"hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 5504, "vocab_size": 32000}


def language_model(*, size: str, arm: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one rung on the Wikipedia leads; its loss, the same after rounding to 4 bits, its cache, its latents.

    `bits_per_byte` is None for a run that diverged.
    """
    module, data = _module(size, arm, steps, lr, seed)
    try:
        metrics = fit(module, data, steps=steps, seed=seed, clip=1.0)
    except NonFiniteError:
        return {"bits_per_byte": None}
    model = module.lm.eval()
    config = model.config
    result = {
        "bits_per_byte": metrics["val/bits_per_byte"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "ffn": config.intermediate_size,
        "cache_bytes": measured_bytes(config, 128),
    }
    if config.attention == "latent":
        result["latent_snr"] = _latent_snr(module, data)
    if config.cache_bits == 16:
        config.cache_bits = config.rope_bits = 4
        result["bits_per_byte_rounded"] = _bits_per_byte(module, data)
        result["cache_bytes_rounded"] = measured_bytes(config, 128)
    return result


def associative_recall(*, arm: str, pairs: int, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one rung to recall; the share of wrong answers, and the same after rounding to 4 bits, in %.

    `wrong` is None for a run that diverged.
    """
    shape = dict(SIZES["0.42M"]) | {"layers": 4}
    data = RecallData(pairs=pairs, batch_size=32, seed=seed)
    del shape["batch"]
    module = RecallModule(vocab_size=VOCABULARY, max_length=2 * pairs, **_settings(shape, arm, steps, lr))
    try:
        metrics = fit(module, data, steps=steps, seed=seed, clip=1.0)
    except NonFiniteError:
        return {"wrong": None}
    result = {"wrong": 100 * (1 - metrics["val/accuracy"]), "cache_bytes": measured_bytes(module.lm.config, 128)}
    config = module.lm.config
    if config.cache_bits == 16:
        config.cache_bits = config.rope_bits = 4
        module.lm.eval()
        result["wrong_rounded"] = 100 * (1 - module.accuracy(data.val_dataloader()))
    return result


def cache_storage(*, tokens: int, seed: int) -> dict[str, float]:
    """Storage of the cache at the paper's latent and a width of 2048, as a share of MHA's in bfloat16, in %."""
    torch.manual_seed(seed)
    base = CLLAConfig(**PAPER, num_hidden_layers=4)
    mha = measured_bytes(rung(base, "MHA", cache_bits=16), 64)
    cache = _filled(CLLACache(base), base, tokens)  # grown as in use, slack included
    return {
        "share": 100 * cache.nbytes() / tokens / mha,
        "without_slack": 100 * measured_bytes(base, 1024) / mha,
        "mha_bytes": mha / 4,  # per layer
    }


def decoding(*, contexts: list[int], layers: int, rounds: int, seed: int) -> dict[str, Any]:
    """Seconds per token of MHA with transformers' DynamicCache, with ours, and of CLLA, against the context."""
    base = CLLAConfig(**PAPER | {"vocab_size": 1024}, num_hidden_layers=layers, max_position_embeddings=2**17)
    return {
        "seconds": decode_step_seconds(base, contexts, rounds=rounds, seed=seed),
        "floors": floors(base),
    }


def measured_bytes(config: CLLAConfig, tokens: int) -> float:
    """Bytes per token of the storage of a cache in bfloat16 with room for `tokens` tokens, filled with them."""
    return _filled(CLLACache(config, max_length=tokens), config, tokens).nbytes() / tokens


def normal_snr(format: Format, samples: int = 20_000) -> float:
    """Signal to noise of standard normal vectors in `format`, in dB."""
    x = torch.randn(samples, format.width, generator=torch.Generator().manual_seed(0))
    return _snr(x, format.round(x))


def _filled(cache: CLLACache, config: CLLAConfig, tokens: int) -> CLLACache:
    for layer in range(config.num_hidden_layers):
        formats = config.cache_formats(layer)
        if formats:
            vectors = [torch.randn(1, f.heads, tokens, f.width).to(torch.bfloat16) for f in formats]
            for chunk in zip(*(x.split([tokens - tokens // 2, tokens // 2], dim=2) for x in vectors), strict=True):
                cache.update(chunk[0], chunk[1] if len(chunk) > 1 else None, layer)
    return cache


def _module(size: str, arm: str, steps: int, lr: float, seed: int) -> tuple[CLLAModule, TextDataModule]:
    shape = dict(SIZES[size])
    data = TextDataModule(length=LENGTH, batch_size=shape.pop("batch"), vocab_size=1024, seed=seed)
    return CLLAModule(vocab_size=1024, max_length=LENGTH, **_settings(shape, arm, steps, lr)), data


def _settings(shape: dict[str, Any], arm: str, steps: int, lr: float) -> dict[str, Any]:
    """Of a module, beyond its vocabulary and length."""
    return {
        "equal_parameters": True,
        "init_std": 0.02 * (768 / shape["dim"]) ** 0.5,  # 0.02 is for a width of 768
        "lr": lr,
        "warmup_steps": max(1, steps // 10),
        **shape,
        **ARMS[arm],
    }


@torch.no_grad()
def _bits_per_byte(module: CLLAModule, data: TextDataModule) -> float:
    nats = size = 0.0
    for batch in data.val_dataloader():
        nats -= module(batch["tokens"])[batch["bytes"] > 0].sum().item()
        size += batch["bytes"].sum().item()
    return nats / (math.log(2) * size)


@torch.no_grad()
def _latent_snr(module: CLLAModule, data: TextDataModule) -> list[float]:
    """Of each producer's latents on held-out text in 4 bits, in dB."""
    latents: list[Tensor] = []
    norms = [m.self_attn.kv_norm for m in module.lm.model.layers if m.self_attn.produces]
    hooks = [norm.register_forward_hook(lambda m, args, out: latents.append(out)) for norm in norms]
    try:
        module(torch.stack([data.val[i]["tokens"] for i in range(32)]))
    finally:
        for hook in hooks:
            hook.remove()
    group = module.lm.config.group_size
    return [_snr(x, Format(1, x.shape[-1], 4, group).round(x)) for x in latents]


def _snr(x: Tensor, rounded: Tensor) -> float:
    return 10 * math.log10((x.square().sum() / (x - rounded).square().sum()).item())
