"""Callbacks: stop before a NaN does harm, stop on a signal without loss, go on with the same bits."""

import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer

from .metrics import RunLogger


class NonFiniteError(RuntimeError):
    """The loss or a gradient is infinite or NaN; the weights are those before the update."""


class NonFiniteGuard(Callback):
    """Stops before an update whose loss or gradient is not finite, in every process; logs `grad_norm`.

    The norm is the l2 norm over all parameters' gradients, before clipping. With a gradient scaler
    (`precision="16-mixed"`), which skips updates with infinite gradients itself, only the loss is looked at.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss; the sum of those of accumulated batches is finite only if each is."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Raise NonFiniteError, or log the norm and let the update happen."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if hasattr(norm, "full_tensor"):  # sharded gradients
            norm = norm.full_tensor()
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        watched = {"loss": self._loss, "gradient norm": None if scaled else norm}
        self._loss = None
        values = {name: float(value) for name, value in watched.items() if value is not None}
        wrong = {name: value for name, value in values.items() if not np.isfinite(value)}
        if _any_process(trainer, bool(wrong)):
            what = ", ".join(f"{name} {value}" for name, value in wrong.items()) or "NaN in another process"
            batch = trainer.fit_loop.batch_idx
            raise NonFiniteError(
                f"step {trainer.global_step}, epoch {trainer.current_epoch}, batch {batch}: {what}; stopped "
                "before the update (a lower learning rate, a longer warm-up or gradient clipping may help)"
            )
        pl_module.log("grad_norm", norm)


class RandomState(Callback):
    """Keeps the states of torch's, NumPy's and Python's global generators in checkpoints.

    They are restored when training starts, for each process its own. With `ResumableDataLoader`, dropout in
    resumed training is then that of the uninterrupted one. If the number of processes has changed, they are
    left as they are.
    """

    _KEY = "random_state"

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the states of all processes."""
        checkpoint[self._KEY] = _gather(trainer, _random_state())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until training starts: what comes before may draw numbers too."""
        self._states = checkpoint.get(self._KEY)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore this process's states."""
        if self._states and len(self._states) == trainer.world_size:
            _set_random_state(self._states[trainer.global_rank])
        self._states = None


class StepCount(Callback):
    """Has loggers go on with the steps of the uninterrupted run, which Lightning counts up to 3 too high afterwards."""

    def __init__(self) -> None:
        self.stepped = 0
        self._resumed = False

    def state_dict(self) -> dict[str, int]:
        """The batches so far that ended in an update."""
        return {"stepped": self.stepped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self.stepped, self._resumed = state_dict["stepped"], True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the run's metrics forget what came after the checkpoint."""
        for logger in trainer.loggers if self._resumed else ():
            if isinstance(logger, RunLogger):
                logger.go_on_at(self.stepped)

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        """Correct Lightning's count, once: only now is it through with restoring it."""
        if self._resumed:
            trainer.fit_loop.epoch_loop._batches_that_stepped = self.stepped
            self._resumed = False

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """Count."""
        self.stepped += not trainer.fit_loop.epoch_loop._should_accumulate()


class LastCheckpoint(Checkpoint):
    """Keeps `<folder>/last.ckpt` up to date, and saves it when a signal stops training.

    It is written after each validation, every few minutes, at the end, and on SIGTERM or SIGINT (Ctrl-C). A
    signal lets the batch end, and the validation that may be due after it, in every process; then the
    checkpoint is written and Lightning's `SIGTERMException` leaves `fit`, with `signal` set. A second Ctrl-C
    stops at once, without saving.

    A checkpoint is only ever written between two batches, where training can go on to the same bits. After the last
    batch of an epoch it is written when the epoch has ended, and says that the next one is to begin.

    Args:
        folder: of `last.ckpt`.
        minutes: between two savings, at most.
    """

    def __init__(self, folder: str | Path, *, minutes: float = 5.0) -> None:
        super().__init__()
        self.path = Path(folder) / "last.ckpt"
        self.minutes = minutes
        self.signal: signal.Signals | None = None
        self.began = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning, whose handlers begin a collective wherever a process may be.

        It restores what was there before it when training ends.
        """
        self.began, self._step, self._time = True, None, time.monotonic()
        self._validated = self._unflushed = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._receive)
            signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """Save or stop if it is time, unless validation comes first."""
        loop = trainer.fit_loop
        if trainer.should_stop and loop._can_stop_early and not loop.epoch_loop._should_accumulate():
            self._save(trainer)  # by `max_time`, say; the validation that follows belongs to stopping
        elif not _is_last(trainer) and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._between_batches(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        """See on the disk what was logged before the checkpoint."""
        if self._unflushed:
            self._unflushed = False
            for logger in trainer.loggers:
                logger.save()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save or stop if it is time and this was a validation in the course of training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # A validation because training stops is not one to go on from: the batch before it was saved.
            self._validated = not trainer.should_stop
            if not _is_last(trainer):
                self._between_batches(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save or stop if it is time, unless `max_steps` broke off the epoch; of all callbacks this is the last."""
        if _is_last(trainer):
            self._between_batches(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """After the last batch of an epoch, have the loops begin the next one.

        As Lightning saves them, they go through the end of the epoch again, and lose count of epochs where steps limit
        the training: the resumed run would skip one, or most of one.
        """
        if _is_last(trainer):
            loops = checkpoint["loops"]["fit_loop"]
            for epochs in loops["epoch_progress"].values():
                epochs.update(dict.fromkeys(("processed", "completed"), epochs["started"]))
            for name in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
                progress = loops[name]
                progress["total"]["completed"] = progress["total"]["processed"]
                progress["current"] = dict.fromkeys(progress["current"], 0)
                progress["is_last_batch"] = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the last step's checkpoint is there."""
        if self._step != trainer.global_step:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if a signal was the reason."""
        if isinstance(exception, SIGTERMException) and self.signal is not None:
            self._save(trainer)

    def _between_batches(self, trainer: Trainer) -> None:
        validated, self._validated = self._validated, False
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return  # the gradients so far would be lost
        if _any_process(trainer, self.signal is not None):
            self.signal = self.signal or signal.SIGTERM
            # Lightning now ends the loop by SIGTERMException, when all that belongs to the batch is done.
            trainer._signal_connector.received_sigterm = True
        elif trainer.global_step == trainer.max_steps:
            self._save(trainer)  # here, since Lightning counts the epoch that `max_steps` breaks off as a whole one
        elif validated or _any_process(trainer, time.monotonic() - self._time > 60 * self.minutes):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        # Some strategies write folders, file by file: the last one stays whole until the next one is.
        new, old = (self.path.with_name(f"{name}.{self.path.name}") for name in ("new", "old"))
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            _remove(old)
            if self.path.is_dir() or (self.path.exists() and new.is_dir()):
                self.path.rename(old)  # only a file can be put in the place of a file
            new.replace(self.path)
            _remove(old)
        trainer.strategy.barrier()
        self._step, self._time, self._unflushed = trainer.global_step, time.monotonic(), True


def _is_last(trainer: Trainer) -> bool:
    """Whether the batch is the last one of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _any_process(trainer: Trainer, here: bool) -> bool:
    """Whether `here` is true in any process."""
    return here if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(here, all=False)


def _gather(trainer: Trainer, value: Any) -> list[Any]:
    """`value` of every process, by rank."""
    if trainer.world_size == 1:
        return [value]
    values = [None] * trainer.world_size
    dist.all_gather_object(values, value)
    return values


def _random_state() -> dict[str, Any]:
    """As tensors and plain values, which load with `weights_only=True`."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(words), gauss],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
