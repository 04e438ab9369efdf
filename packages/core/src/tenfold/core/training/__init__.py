"""Training with Lightning: resumable to the same bits, stopped by signals and NaNs without harm."""

from .callbacks import LastCheckpoint, NonFiniteError, NonFiniteGuard, RandomState, StepCount
from .checkpoint import AtomicCheckpointIO, CheckpointError, load_checkpoint
from .fit import fit
from .loader import ResumableDataLoader
from .schedules import warmup_cosine, warmup_stable_decay

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointError",
    "LastCheckpoint",
    "NonFiniteError",
    "NonFiniteGuard",
    "RandomState",
    "ResumableDataLoader",
    "StepCount",
    "fit",
    "load_checkpoint",
    "warmup_cosine",
    "warmup_stable_decay",
]
