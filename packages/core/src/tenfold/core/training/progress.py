"""How far training is: one line on a terminal, or lines that can be read in a log."""

import time

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def _metrics(trainer: Trainer) -> str:
    """What was logged last, but for learning rates."""
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if not name.startswith("lr-"))


class StepLines(Callback):
    """Prints a line after every validation and every minute, for output that is piped or redirected."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._said = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """Say it if it is time."""
        if time.monotonic() - self._said > self.seconds:
            self._say(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it, unless this is Lightning's trial before training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._say(trainer)

    def _say(self, trainer: Trainer) -> None:
        self._said = time.monotonic()
        if trainer.is_global_zero:
            steps = trainer.estimated_stepping_batches
            print(f"step {trainer.global_step} of {steps:.0f}  {_metrics(trainer)}".rstrip(), flush=True)


class StepBar(ProgressBar):
    """Steps done out of all, the time left and the last metrics, in one line of the terminal's width."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None

    def disable(self) -> None:
        """Show nothing, in processes but the first."""
        self._hidden = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        self._progress = Progress(
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            disable=getattr(self, "_hidden", False),
        )
        steps = trainer.estimated_stepping_batches
        self._task = self._progress.add_task("", total=int(steps), completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """Move it."""
        self._progress.update(self._task, completed=trainer.global_step, description=_metrics(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last line."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
