"""A data loader that a checkpoint can carry, so that training goes on with the batch it had come to."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class ResumableDataLoader(DataLoader):
    """Batches in an order that `seed` and the epoch alone determine, from wherever a checkpoint left off.

    Lightning saves and restores it by `state_dict` and `load_state_dict`: resumed training gets the batches
    that the uninterrupted one would have got, in mid-epoch too, without reading those before. It draws from a
    generator of its own and leaves torch's global one alone.

    With several processes, each gets its own share: batch k of all of them together is batch k of one process
    with the product of processes and `batch_size` for its batch size.

    What a dataset draws at random in worker processes is not part of the state; in the main process
    (`num_workers=0`) `RandomState` restores it.

    Args:
        dataset: with a length.
        batch_size: rows per process.
        seed: of the order.
        shuffle: a new order each epoch; else that of the dataset.
        drop_last: leave out the last batch of an epoch if it is smaller. False repeats a few rows where
            processes would get unequal shares.
        num_workers: processes that load.
        collate_fn: makes a batch from its rows; torch's own by default.
        pin_memory: for faster copies to a GPU.

    Raises:
        ValueError: no full batch, or a number out of range.

    Example:
        >>> loader = ResumableDataLoader(range(6), batch_size=2, seed=0, shuffle=False)
        >>> batches = iter(loader)
        >>> next(batches), loader.state_dict()
        (tensor([0, 1]), {'seed': 0, 'epoch': 0, 'batch': 1, 'rows': 6, 'batch_rows': 2})
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[list], Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value}")
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=_Order(dataset, seed, shuffle, drop_last),
            drop_last=drop_last,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )
        if len(self) == 0:
            needed = batch_size * self.sampler.num_replicas
            raise ValueError(
                f"batch_size: the dataset has {len(dataset)} rows, fewer than the {needed} of a batch of all processes"
            )

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing here runs before the first `next`, when Lightning, which makes the iterator
        # before it sets the epoch, has set it.
        order: _Order = self.sampler
        if order.given == len(self):
            order.set_epoch(order.epoch + 1)
        order.given, order.resume_at = order.resume_at, 0
        order.start = order.given * self.batch_size
        self.generator.manual_seed(int(order.rng().integers(2**63)))
        for batch in super().__iter__():
            order.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The seed, the epoch, how many of its batches have been given, and what a batch is: of all rows, how many.

        Rows are counted over all processes, whose number may change when the product stays.
        """
        state = {"seed": self.sampler.seed, "epoch": self.sampler.epoch, "batch": self.sampler.given}
        return {**state, "rows": len(self.dataset), "batch_rows": self.batch_size * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go where `state` says: the next iterator begins there.

        Raises:
            ValueError: the state of another number of rows, or of batches of another size.
        """
        ours = self.state_dict()
        for name, what in (("rows", "rows of data"), ("batch_rows", "rows a batch, batch_size × devices")):
            if state.get(name, ours[name]) != ours[name]:
                raise ValueError(f"batch_size: {ours[name]} {what}, the run has {state[name]}")
        order: _Order = self.sampler
        order.seed, order.epoch, order.given = state["seed"], state["epoch"], state["batch"]
        order.resume_at = order.given % len(self)


class _Order(DistributedSampler):
    """The process's share of the epoch's order, from its `start`-th index on, and how far it was given.

    Being a DistributedSampler, it is left in its place by Lightning, which sets the epoch.
    """

    def __init__(self, dataset: Dataset, seed: int, shuffle: bool, drop_last: bool) -> None:
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        super().__init__(dataset, ranks, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.start = 0  # in rows
        self.given = self.resume_at = 0  # in batches

    def __iter__(self) -> Iterator[int]:
        rows = len(self.dataset)
        order = self.rng().permutation(rows) if self.shuffle else np.arange(rows)
        order = np.resize(order, self.total_size)  # the tail dropped, or the beginning repeated
        return iter(order[self.rank :: self.num_replicas][self.start :].tolist())

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of `epoch`, unless in it already."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.given = self.resume_at = 0

    def rng(self) -> np.random.Generator:
        """Of seed and epoch both, not of their sum: no two seeds ever share an order."""
        return np.random.default_rng([self.seed, self.epoch])
