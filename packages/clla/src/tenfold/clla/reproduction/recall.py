"""Associative recall: what a cache must keep of every token, asked without a language.

A sequence shows n tokens, each the sign of a key together with a value, then asks for the keys in another order, and at
each the model has to name the value that came with it (after the multi-query recall of *Zoology*, arXiv 2312.04927,
where key and value are two tokens). Keys and values are drawn anew for every sequence, so that nothing can be known by
heart; each answer lies in one place of the cache.
"""

from collections.abc import Iterable

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ..module import CLLAModule

KEYS = VALUES = 32
VOCABULARY = KEYS * VALUES + KEYS  # a token for each pair, and one to ask for each key


class RecallSequences(Dataset):
    """Sequences of `pairs` pairs and as many questions, each drawn by its index."""

    def __init__(self, pairs: int, count: int, seed: int):
        if not 1 <= pairs <= KEYS:
            raise ValueError(f"pairs: must be from 1 to {KEYS}, got {pairs}")
        self.pairs, self.count, self.seed = pairs, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`tokens` `(2·pairs,)`, and the answers to its second half."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        keys = torch.randperm(KEYS, generator=generator)[: self.pairs]
        values = torch.randint(VALUES, (self.pairs,), generator=generator)
        order = torch.randperm(self.pairs, generator=generator)
        return {"tokens": torch.cat([keys * VALUES + values, KEYS * VALUES + keys[order]]), "answers": values[order]}


class RecallData(LightningDataModule):
    """Endless sequences to train on, and others to be asked about."""

    def __init__(self, *, pairs: int, batch_size: int, seed: int):
        super().__init__()
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed

    def train_dataloader(self) -> DataLoader:
        """Sequences that never repeat."""
        return DataLoader(RecallSequences(self.pairs, 10**9, 2 * self.seed), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """256 sequences of another seed."""
        return DataLoader(RecallSequences(self.pairs, 256, 2 * self.seed + 1), batch_size=64)


class RecallModule(CLLAModule):
    """Any rung, trained on the answers alone; `val/accuracy` is the share of them that are its likeliest value."""

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Of every value at every question, `(B·pairs, values)`."""
        asked = batch["answers"].shape[1]
        return self.lm(input_ids=batch["tokens"], use_cache=False).logits[:, -asked:, :VALUES].flatten(0, 1)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """The mean loss of the answers."""
        loss = F.cross_entropy(self._logits(batch), batch["answers"].flatten())
        self.log("train/loss", loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Nothing to empty."""

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Log the share of right answers."""
        right = self._right(batch)
        self.log("val/accuracy", right.mean(), batch_size=len(right))

    def on_validation_epoch_end(self) -> None:
        """Nothing to sum up."""

    @torch.no_grad()
    def accuracy(self, batches: Iterable[dict[str, Tensor]]) -> float:
        """Share of right answers, of the model as it is now."""
        return torch.cat([self._right(batch) for batch in batches]).mean().item()

    def _right(self, batch: dict[str, Tensor]) -> Tensor:
        return (self._logits(batch).argmax(-1) == batch["answers"].flatten()).float()
