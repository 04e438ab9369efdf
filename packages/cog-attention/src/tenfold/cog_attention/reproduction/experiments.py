"""The trainings behind the claims: each returns plain numbers, so that a run's measurements can be kept as JSON."""

from typing import Any

import torch

from tenfold.core.data.images import FashionMNISTDataModule
from tenfold.core.data.text import TextDataModule
from tenfold.core.training import NonFiniteError, fit

from ..analysis import (
    PROMPTS,
    attention_maps,
    collapse_prompts,
    head_operations,
    ov_direction,
    path_mass,
    representation_gap,
    weight_statistics,
)
from ..cogformer import Cogformer
from ..diffusion import UViCModule
from .subtraction import subtraction_error

LENGTH = 128  # tokens of a training window
SIZES = {  # parameters with a vocabulary of 1,024: sizes, and the rows of a batch
    "0.33M": {"layers": 4, "dim": 64, "heads": 2, "ffn": 172, "batch": 8},
    "1.1M": {"layers": 4, "dim": 128, "heads": 4, "ffn": 344, "batch": 8},
    "1.5M": {"layers": 6, "dim": 128, "heads": 4, "ffn": 384, "batch": 16},
}
ARMS = {
    "softmax": {"attention": "softmax"},
    "Cog": {"attention": "cog"},  # softmax in the first and the last layer: the paper's model
    "Cog in every layer": {"attention": "cog", "softmax_layers": ()},
    "differential": {"attention": "differential"},
}
PROBE_LENGTHS = (16, 32, 48, 64, 80)  # ones in a collapse prompt, within the trained length


def language_model(*, size: str, arm: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one language model on the Wikipedia leads and take all of the paper's measurements on it.

    `bits_per_byte` is None for a run that diverged.
    """
    module, data = _cogformer(size, arm, steps, lr, seed)
    try:
        metrics = fit(module, data, steps=steps, seed=seed, clip=1.0)
    except NonFiniteError:
        return {"bits_per_byte": None}
    model = module.lm.eval()
    result = {
        "bits_per_byte": metrics["val/bits_per_byte"],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if arm != "differential":  # its weights are a difference of two maps that transformers does not return
        result |= _measure(model, data)
    return result


def diffusion_model(*, attention: str, steps: int, lr: float, seed: int, samples: int = 0) -> dict[str, Any]:
    """Train U-ViC or U-ViT on Fashion-MNIST; the validation loss, and `samples` images as bytes."""
    module = UViCModule(attention=attention, lr=lr, warmup_steps=max(1, steps // 10))
    data = FashionMNISTDataModule(batch_size=64, seed=seed)
    torch.manual_seed(seed)
    try:
        metrics = fit(module, data, steps=steps, seed=seed, clip=1.0)
    except NonFiniteError:
        return {"loss": None}
    images = module.sample(samples)[:, 0] if samples else torch.zeros(0)
    return {
        "loss": metrics["val/loss"],
        "parameters": sum(p.numel() for p in module.parameters()),
        "images": ((images + 1) * 127.5).round().int().tolist(),
    }


def subtraction(*, attention: str, heads: int, seed: int, steps: int) -> dict[str, float]:
    """The test error of attention heads that must answer v₊ − v₋."""
    return {"error": subtraction_error(attention=attention, heads=heads, seed=seed, steps=steps)}


def _cogformer(size: str, arm: str, steps: int, lr: float, seed: int) -> tuple[Cogformer, TextDataModule]:
    shape = dict(SIZES[size])
    data = TextDataModule(length=LENGTH, batch_size=shape.pop("batch"), vocab_size=1024, seed=seed)
    # The paper's 0.02 is for a width of 768. At a width of 64 it would leave the scores near 0 at first, where
    # softmax has only averages to learn from and Cog has signs: a head start that is the initialization's.
    init_std = 0.02 * (768 / shape["dim"]) ** 0.5
    module = Cogformer(
        vocab_size=1024,
        max_length=LENGTH,
        init_std=init_std,
        lr=lr,
        warmup_steps=max(1, steps // 10),
        **shape,
        **ARMS[arm],
    )
    return module, data


def _measure(model: torch.nn.Module, data: TextDataModule) -> dict[str, Any]:
    tokens = torch.stack([data.val[i]["tokens"][:-1] for i in range(32)])
    maps = attention_maps(model, tokens)
    statistics, operations = weight_statistics(maps), head_operations(maps)
    total, early = path_mass(maps)
    question = {probe: data.tokenizer.encode(text) for probe, text in PROMPTS.items()}
    zero, one = (data.tokenizer.encode(digit)[-1] for digit in "01")
    chunk = model.config.hidden_size // model.config.num_attention_heads
    return {
        "negative": statistics.negative.tolist(),
        "row_sum_std": statistics.row_sum_std.tolist(),
        "sink": statistics.sink.tolist(),
        "copy": operations.copy.tolist(),
        "delete": operations.delete.tolist(),
        "balance": operations.balance.tolist(),
        "ov": ov_direction(model, tokens).tolist(),
        "path": {"total": total, "early": early},
        "gaps": {
            probe: [
                representation_gap(model, *collapse_prompts(probe, n, question[probe], zero, one), chunk)
                for n in PROBE_LENGTHS
            ]
            for probe in PROMPTS
        },
    }
