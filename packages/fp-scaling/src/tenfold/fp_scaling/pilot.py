"""One training run of the sweep and of the claims: plain numbers in, plain numbers out."""

import re
from typing import Any

from tenfold.core.data.text import TextDataModule
from tenfold.core.training import NonFiniteError, fit

from .module import QuantizedLM, count_params
from .recipe import TARGETS

VOCAB, LENGTH, BATCH = 512, 64, 8
TOKENS_PER_STEP = LENGTH * BATCH


def shape(model: str) -> dict[str, int]:
    """`4x64`: 4 layers of width 64, feed-forward 3 times as wide, heads of 32 features (16 below a width of 64).

    Raises:
        ValueError: not of this form, or a width that is not a multiple of 32.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", model)
    layers, dim = map(int, match.groups()) if match else (0, 0)
    if not layers or not dim or dim % 32:
        raise ValueError(f"models: expected LAYERSxWIDTH such as 4x64, the width a multiple of 32, got {model!r}")
    return {"layers": layers, "dim": dim, "heads": dim // 32 if dim >= 64 else 2, "ffn": 3 * dim}


def train(
    *,
    model: str,
    steps: int,
    lr: float,
    seed: int,
    fmt: str | None = None,
    targets: list[str] | tuple[str, ...] = TARGETS,
    scale: str | None = "block",
    block_size: int = 32,
    path: str | None = None,
) -> dict[str, Any]:
    """Train a language model; its validation loss in nats, None if it diverged.

    With equal `model`, `steps`, `lr` and `seed`, initial weights and the order of the data are equal whatever the
    quantization: such runs are pairs.
    """
    quantization = {"fmt": fmt, "targets": tuple(targets), "scale": scale, "block_size": block_size}
    module, data = _model(model, steps, lr, seed, path, **quantization)
    try:
        metrics = fit(module, data, steps=steps, seed=seed, clip=1.0)
    except NonFiniteError:
        metrics = {"val/loss": None}
    return {"loss": metrics["val/loss"], "params": count_params(module.lm), "tokens": steps * TOKENS_PER_STEP}


def twins(*, formats: list[str], model: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one model in two formats; how many of the trained weights differ in any bit, and the losses."""
    weights, losses = [], []
    for fmt in formats:
        module, data = _model(model, steps, lr, seed, None, fmt=fmt, scale="block", block_size=32)
        losses.append(fit(module, data, steps=steps, seed=seed, clip=1.0)["val/loss"])
        weights.append([p.detach() for p in module.parameters()])
    different = sum((a != b).sum().item() for a, b in zip(*weights, strict=True))
    return {"different": different, "weights": sum(w.numel() for w in weights[0]), "losses": losses}


def _model(
    model: str, steps: int, lr: float, seed: int, path: str | None, **quantization: Any
) -> tuple[QuantizedLM, TextDataModule]:
    sizes = shape(model)
    data = TextDataModule(path, length=LENGTH, batch_size=BATCH, vocab_size=VOCAB, val_fraction=0.02, seed=seed)
    module = QuantizedLM(
        vocab_size=VOCAB,
        max_length=LENGTH,
        init_std=0.02 * (768 / sizes["dim"]) ** 0.5,  # 0.02 is for widths of a thousand
        lr=lr,
        warmup_steps=max(1, 3 * steps // 10),  # long: a short one leaves some seeds on a plateau for a while
        **sizes,
        **quantization,
    )
    return module, data
