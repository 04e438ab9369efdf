"""A quiet training run for experiments: no files, no output, metrics returned."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng

from .callbacks import NonFiniteGuard


def fit(
    module: LightningModule,
    data: LightningDataModule,
    *,
    steps: int,
    seed: int,
    clip: float | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, float]:
    """Train `module` for `steps` updates on one device, validate it, and return what it logged.

    The caller's global random states are left as they were.

    Args:
        module: trained in place.
        data: whose training data are gone through as often as it takes.
        steps: updates, one per batch.
        seed: of dropout, and of weights made in `configure_model`; the order of the data is the data's own.
        clip: largest l2 norm of the gradient; not clipped by default.
        callbacks: beside the guard against losses and gradients that are not finite.

    Returns:
        Every logged value: those of the validation after the last update, and the last ones of training.

    Raises:
        NonFiniteError: a loss or gradient was infinite or NaN.
        ValueError: `steps` below 1.
    """
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    with _quiet(), isolate_rng():
        seed_everything(seed, workers=True, verbose=False)
        trainer = Trainer(
            devices=1,
            max_steps=steps,
            # Batches are counted across epochs: one validation, after the last.
            val_check_interval=steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=clip,
            callbacks=[NonFiniteGuard(), *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, datamodule=data)
        except SystemExit as exit:
            if isinstance(exit.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on devices and its hints on tuning."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
