"""The trainings behind the claims: each returns plain numbers, so that a run's measurements can be kept as JSON."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from tenfold.core.data.text import TextDataModule
from tenfold.core.lm import CACHE
from tenfold.core.training import NonFiniteError, fit

from ..model.config import HunyuanLargeConfig
from ..model.modeling import HunyuanLargeForCausalLM
from ..model.module import HunyuanLarge
from ..noise import noise_batch
from ..scaling.budget import count_parameters
from ..scaling.flops import flops_per_token

LENGTH = 128  # tokens of a training window
SIZES = {  # by all parameters, with a vocabulary of 1,024: sizes, and the rows of a batch
    "0.32M": {"layers": 4, "dim": 48, "heads": 4, "ffn": 48, "experts": 8, "batch": 4},
    "0.55M": {"layers": 4, "dim": 64, "heads": 4, "ffn": 64, "experts": 8, "batch": 8},
    "4.2M": {"layers": 6, "dim": 128, "heads": 8, "ffn": 96, "experts": 16, "batch": 16},
}
# The isoFLOP trainings; dim and ffn, one number, vary. The head is not tied to the embedding: a tied one first has to
# unlearn that a token predicts itself, and in so short trainings the loss depends on when it has.
ISOFLOP = {"layers": 2, "heads": 2, "kv_heads": 1, "experts": 8, "batch": 4, "tie_embeddings": False}
ISOFLOP_VOCABULARY = 512  # few, so that the head is not most of a model
ARMS: dict[str, dict[str, Any]] = {
    "recycle": {},  # the paper's model: capacity 1.0, GQA and CLA, experts at 0.31 of the learning rate
    "drop": {"routing": "drop"},
    "dropless": {"routing": "dropless"},
    "0.25 of the rate": {"expert_lr_ratio": 0.25},
    "0.5 of the rate": {"expert_lr_ratio": 0.5},
    "uniform rate": {"expert_lr_ratio": 1.0},
    "twice the rate": {"expert_lr_ratio": 2.0},
    "cosine": {"anneal_share": 1e-6, "decay_ratio": 0.1},  # to a tenth, without a last phase
    "MHA": {"kv_heads": None, "share_factor": 1},
    "GQA": {"share_factor": 1},
    "CLA": {"kv_heads": None},
}


def language_model(
    *, size: str, arm: str, steps: int, lr: float, seed: int, capacity_factor: float = 1.0, noise: bool = False
) -> dict[str, Any]:
    """Train one arm on the Wikipedia leads: its loss, what its routers did on the mean of all updates, its cache.

    `bits_per_byte` is None for a run that diverged. With `noise`, also |G|² and tr Σ of a sequence's
    gradient, whose quotient is the noise batch, in the middle and at the end.
    """
    shape = {**SIZES[size], "capacity_factor": capacity_factor, **ARMS[arm]}
    log, noise_log = _RoutingLog(), _NoiseLog(steps)
    callbacks = [log, noise_log] if noise else [log]
    try:
        module, metrics = _train(shape, 1024, steps=steps, lr=lr, seed=seed, callbacks=callbacks)
    except NonFiniteError:
        return {"bits_per_byte": None}
    parameters = count_parameters(module.lm.config)
    return {
        "bits_per_byte": metrics["val/bits_per_byte"],
        "parameters": parameters.total,
        "activated": parameters.activated,
        "cache_bytes": measured_cache_bytes(module.lm.config),
        **log.means(),
        **noise_log.found,
    }


def isoflop_run(*, dim: int, compute: float, lr: float, seed: int) -> dict[str, Any]:
    """Train a model of this width for `compute` operations: N, without and with the embedding, D, C, and the loss.

    Without the embedding, which is only looked up, C is 6·N·D and the context's part. D is rounded to whole updates,
    and C is what these cost. `loss`, in bits per byte, is None for a run that diverged.
    """
    shape = {**ISOFLOP, "dim": dim, "ffn": dim}
    config = HunyuanLarge(**_settings(shape, ISOFLOP_VOCABULARY, steps=1, lr=lr)).config()
    tokens_per_update = shape["batch"] * LENGTH
    per_update = tokens_per_update * flops_per_token(config, LENGTH).total
    steps = max(1, round(compute / per_update))
    activated, embedding = count_parameters(config).activated, config.vocab_size * config.hidden_size
    try:
        loss = _train(shape, ISOFLOP_VOCABULARY, steps=steps, lr=lr, seed=seed)[1]["val/bits_per_byte"]
    except NonFiniteError:
        loss = None
    return {
        "params": activated - embedding,
        "with_embedding": activated,
        "tokens": steps * tokens_per_update,
        "compute": steps * per_update,
        "loss": loss,
    }


def _train(
    shape: dict[str, Any], vocab_size: int, *, steps: int, lr: float, seed: int, callbacks: Sequence[Callback] = ()
) -> tuple[HunyuanLarge, dict[str, float]]:
    data = TextDataModule(length=LENGTH, batch_size=shape["batch"], vocab_size=vocab_size, seed=seed)
    module = HunyuanLarge(**_settings(shape, vocab_size, steps=steps, lr=lr))
    return module, fit(module, data, steps=steps, seed=seed, clip=1.0, callbacks=callbacks)


def _settings(shape: dict[str, Any], vocab_size: int, *, steps: int, lr: float) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "max_length": LENGTH,
        "kv_heads": shape["heads"] // 4,
        "init_std": 0.02 * (768 / shape["dim"]) ** 0.5,  # 0.02 is for a width of 768 and more
        "lr": lr,
        "warmup_steps": max(1, steps // 10),
        **{name: value for name, value in shape.items() if name != "batch"},
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
    cache = model(torch.zeros(1, tokens, dtype=torch.long), use_cache=True)[CACHE]
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


class _NoiseLog(Callback):
    """The gradient and its noise, in the middle of the training and at its end, over 256 random training windows."""

    WINDOWS = 256

    def __init__(self, steps: int) -> None:
        self.moments = {max(1, steps // 2): "middle", steps: "end"}
        self.found: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: HunyuanLarge, *_) -> None:
        if (moment := self.moments.get(trainer.global_step)) is None:
            return
        data, size = trainer.datamodule.train, trainer.datamodule.batch_size
        generator = torch.Generator().manual_seed(trainer.datamodule.seed)
        order = torch.randperm(len(data), generator=generator)[: self.WINDOWS // size * size].view(-1, size)
        batches = (torch.stack([data[i]["tokens"] for i in row]) for row in order.tolist())
        noise = noise_batch(lambda tokens: -pl_module(tokens).mean(), pl_module.parameters(), batches, batch_size=size)
        self.found |= {f"gradient_{moment}": noise.gradient, f"noise_{moment}": noise.noise}
