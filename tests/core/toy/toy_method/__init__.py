"""A method small enough to train in a blink, which the tests install by putting its folder on the path."""

import os
import signal
from pathlib import Path
from typing import Literal

import torch
from lightning import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from tenfold.core.methods import Method
from tenfold.core.training import ResumableDataLoader


class Toy(LightningModule):
    def __init__(self, dropout: float = 0.2, kind: Literal["a", "b"] = "a", lr: float = 1e-2):
        super().__init__()
        if dropout > 1:
            raise ValueError(f"dropout: must be at most 1, got {dropout}")
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))

    def training_step(self, batch, index):
        """TOY_SIGNAL="SIGTERM:5:1": that signal in step 5 of process 1."""
        name, step, rank = os.environ.get("TOY_SIGNAL", "SIGTERM:-1:0").split(":")
        if (self.global_step, self.global_rank) == (int(step), int(rank)):
            os.kill(os.getpid(), getattr(signal, name))
        loss = self.net(batch).square().mean()
        if self.global_step == int(os.environ.get("TOY_NAN", "-1")):
            loss = loss * float("nan")
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", self.net(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


class Noise(LightningDataModule):
    may_change = ("batch_size",)

    def __init__(self, path: str | None = None, batch_size: int = 4, shuffle: bool = True):
        super().__init__()
        self.path, self.batch_size, self.shuffle = path, batch_size, shuffle
        self.rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))

    def setup(self, stage=None):
        if self.path:
            Path(self.path).read_bytes()

    def train_dataloader(self):
        return ResumableDataLoader(self.rows, batch_size=self.batch_size, seed=3, shuffle=self.shuffle)

    def val_dataloader(self):
        return DataLoader(self.rows[:8], batch_size=4)


def say(text: str, times: int = 1):
    """Say something.

    Args:
        text: what to say.
        times: how often.
    """
    if times < 1:
        raise ValueError(f"times: must be at least 1, got {times}")
    print(" ".join([text] * times))


METHOD = Method(
    name="toy",
    title="Toy",
    paper="None",
    module=LightningModule,
    datamodule=LightningDataModule,
    package="toy_method",
    verbs={"say": say},
)
