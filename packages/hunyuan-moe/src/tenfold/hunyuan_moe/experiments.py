"""The trainings behind the claims: each returns plain numbers, so that a run's measurements can be kept as JSON."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from tenfold.core.data.text import TextDataModule
from tenfold.core.training import NonFiniteError, fit

from .budget import count_parameters
from .config import HunyuanLargeConfig
from .model import HunyuanLargeForCausalLM
from .module import HunyuanLarge

LENGTH = 128  # tokens of a training window
SIZES = {  # by all parameters, with a vocabulary of 1,024: sizes, and the rows of a batch
    "0.32M": {"layers": 4, "dim": 48, "heads": 4, "ffn": 48, "experts": 8, "batch": 4},
    "0.55M": {"layers": 4, "dim": 64, "heads": 4, "ffn": 64, "experts": 8, "batch": 8},
    "4.2M": {"layers": 6, "dim": 128, "heads": 8, "ffn": 96, "experts": 16, "batch": 16},
}
ARMS: dict[str, dict[str, Any]] = {
    "recycle": {},  # the paper's model: capacity 1.0, GQA and CLA, experts at 0.31 of the learning rate
    "drop": {"routing": "drop"},
    "dropless": {"routing": "dropless"},
    "uniform rate": {"expert_lr_ratio": 1.0},
    "MHA": {"kv_heads": None, "share_factor": 1},
    "GQA": {"share_factor": 1},
    "CLA": {"kv_heads": None},
}


def language_model(
    *, size: str, arm: str, steps: int, lr: float, seed: int, capacity_factor: float = 1.0
) -> dict[str, Any]:
    """Train one arm on the Wikipedia leads: its loss, what its routers did on the mean of all updates, its cache.

    `bits_per_byte` is None for a run that diverged.
    """
    shape = dict(SIZES[size])
    data = TextDataModule(length=LENGTH, batch_size=shape.pop("batch"), vocab_size=1024, seed=seed)
    settings = {"kv_heads": shape["heads"] // 4, "capacity_factor": capacity_factor, **shape, **ARMS[arm]}
    module = HunyuanLarge(
        vocab_size=1024,
        max_length=LENGTH,
        init_std=0.02 * (768 / shape["dim"]) ** 0.5,  # 0.02 is for a width of 768 and more
        lr=lr,
        warmup_steps=max(1, steps // 10),
        **settings,
    )
    log = _RoutingLog()
    try:
        metrics = fit(module, data, steps=steps, seed=seed, clip=1.0, callbacks=[log])
    except NonFiniteError:
        return {"bits_per_byte": None}
    parameters = count_parameters(module.lm.config)
    return {
        "bits_per_byte": metrics["val/bits_per_byte"],
        "parameters": parameters.total,
        "activated": parameters.activated,
        "cache_bytes": measured_cache_bytes(module.lm.config),
        **log.means(),
    }


def papers_cache(*, tokens: int, seed: int) -> dict[str, float]:
    """Bytes per token of real bfloat16 caches with the paper's 64 layers and 80 heads of 80, narrow elsewhere."""
    torch.manual_seed(seed)
    narrow = {"hidden_size": 8, "head_dim": 80, "intermediate_size": 2, "num_experts": 2, "vocab_size": 16}
    kinds = {"MHA": (80, False), "GQA": (8, False), "MQA": (1, False), "CLA": (80, True), "GQA+CLA": (8, True)}
    return {
        name: measured_cache_bytes(HunyuanLargeConfig(num_key_value_heads=heads, use_cla=cla, **narrow), tokens)
        for name, (heads, cla) in kinds.items()
    }


@torch.no_grad()
def measured_cache_bytes(config: HunyuanLargeConfig, tokens: int = 8) -> float:
    """Storage of a filled bfloat16 cache, per token."""
    model = HunyuanLargeForCausalLM(config).to(torch.bfloat16).eval()
    cache = model(torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    stored = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    return sum(x.untyped_storage().nbytes() for x in stored) / tokens


class _RoutingLog(Callback):
    """The mean of what the routers did over all updates."""

    NAMES = ("recycled", "dropped", "load_max")

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        self.rows.append([float(trainer.callback_metrics[f"moe/{name}"]) for name in self.NAMES])

    def means(self) -> dict[str, float]:
        return {
            name: sum(column) / len(column)
            for name, column in zip(self.NAMES, zip(*self.rows, strict=True), strict=True)
        }
