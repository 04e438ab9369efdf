"""Training U-ViC by noise prediction, and drawing images from it (variance-preserving diffusion)."""

from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from .uvic import Attention, UViC

BETA_MIN, BETA_MAX = 0.1, 20.0  # of the variance-preserving SDE (Song et al., arXiv 2011.13456), as in U-ViT


def signal_level(time: Tensor) -> Tensor:
    """ᾱ(t) = exp(−∫₀ᵗ β) for t in [0, 1] and β rising linearly from BETA_MIN to BETA_MAX."""
    return torch.exp(-(BETA_MIN * time + 0.5 * (BETA_MAX - BETA_MIN) * time**2))


class UViCModule(LightningModule):
    """U-ViC trained to predict the noise: E over t, ε of ‖ε − ε_θ(√ᾱ x + √(1−ᾱ) ε, t)‖² per pixel.

    Logs `train/loss` and `val/loss`; validation uses the same times and noises in every run, so that runs differ
    in the model alone. Batches are dicts with `images` `(B, C, H, W)` in [−1, 1] and, with `classes`, `labels`.

    Args:
        image_size: height and width of the images.
        patch_size: side of a patch.
        channels: of the images.
        dim: width of the tokens.
        depth: blocks less one, even.
        heads: attention heads.
        attention: `cog` (first and last block softmax), or `softmax` for U-ViT itself.
        classes: number of class labels to condition on, 0 for none.
        context: `[tokens, dim]` of a text condition, or null.
        lr: AdamW's learning rate.
        betas: AdamW's.
        weight_decay: AdamW's, on everything but the position embedding.
        warmup_steps: of linear warm-up; the rate is constant after it, as in U-ViT.
    """

    may_change: ClassVar[tuple[str, ...]] = ("lr", "betas", "weight_decay", "warmup_steps")  # when a run is resumed

    def __init__(
        self,
        image_size: int = 28,
        patch_size: int = 4,
        channels: int = 1,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        attention: Attention = "cog",
        classes: int = 0,
        context: list[int] | None = None,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.99, 0.999),
        weight_decay: float = 0.03,
        warmup_steps: int = 2500,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.model = UViC(
            image_size=image_size,
            patch_size=patch_size,
            channels=channels,
            dim=dim,
            depth=depth,
            heads=heads,
            attention=attention,
            classes=classes,
            context=tuple(context) if context else None,
        )

    def forward(
        self, images: Float[Tensor, "batch channels height width"], time: Float[Tensor, " batch"], **condition: Tensor
    ) -> Tensor:
        """The predicted noise at `time` in [0, 1]."""
        return self.model(images, 1000 * time, **condition)

    def setup(self, stage: str) -> None:
        """Refuse data with labels that the model has no embedding for."""
        found = getattr(getattr(self.trainer, "datamodule", None), "classes", 0)
        if 0 < self.hparams.classes < found:
            raise ValueError(f"model.classes: {self.hparams.classes} are fewer than the data's {found}")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Noise-prediction loss at one random time per image."""
        loss = self._loss(batch, *self._noise(batch["images"], torch.default_generator))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The same loss at times and noises that depend on the batch's index only."""
        generator = torch.Generator().manual_seed(batch_idx)
        loss = self._loss(batch, *self._noise(batch["images"], generator))
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["images"]), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """As many images as the batch has, drawn by `sample`, of its classes if the model knows classes."""
        labels = batch["labels"] if self.hparams.classes else None
        return self.sample(len(batch["images"]), labels=labels, seed=batch_idx).cpu()

    def configure_optimizers(self) -> dict:
        """AdamW with linear warm-up."""
        decayed = [p for name, p in self.named_parameters() if name != "model.position"]
        groups = [{"params": decayed}, {"params": [self.model.position], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups, lr=self.hparams.lr, betas=self.hparams.betas, weight_decay=self.hparams.weight_decay
        )
        warmup = max(1, self.hparams.warmup_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def sample(
        self, count: int, *, steps: int = 50, labels: Int[Tensor, " count"] | None = None, seed: int = 0
    ) -> Float[Tensor, "count channels height width"]:
        """`count` images in [−1, 1], by DDIM (Song et al., arXiv 2010.02502) in `steps` equal steps of time."""
        h = self.hparams
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, h.channels, h.image_size, h.image_size, generator=generator).to(self.device)
        condition = {} if labels is None else {"label": labels}
        times = torch.linspace(1.0, 1e-3, steps + 1, device=self.device)
        for now, following in pairwise(times):
            noise = self(x, now.expand(count), **condition)
            level, next_level = signal_level(now), signal_level(following)
            image = ((x - (1 - level).sqrt() * noise) / level.sqrt()).clamp(-1, 1)
            noise = (x - level.sqrt() * image) / (1 - level).sqrt()
            x = next_level.sqrt() * image + (1 - next_level).sqrt() * noise
        return image

    def _noise(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        time = torch.rand(len(images), generator=generator).clamp(min=1e-3)
        noise = torch.randn(images.shape, generator=generator)
        return time.to(images.device), noise.to(images)

    def _loss(self, batch: dict[str, Tensor], time: Tensor, noise: Tensor) -> Tensor:
        level = signal_level(time)[:, None, None, None]
        noisy = level.sqrt() * batch["images"] + (1 - level).sqrt() * noise
        condition = {"label": batch["labels"]} if self.hparams.classes else {}
        if self.hparams.context:
            condition["context"] = batch["context"]
        return F.mse_loss(self(noisy, time, **condition), noise)
