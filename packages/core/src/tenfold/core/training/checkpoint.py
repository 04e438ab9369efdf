"""Checkpoints that are whole or not there, and that cannot run code when they are read."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.load import _load_distributed_checkpoint

from ..errors import UserError


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or holds something else than tensors and plain values."""


def load_checkpoint(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """What a checkpoint holds: tensors and plain values, read with `weights_only=True`.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds pickled objects, which are refused
            because unpickling them could run any code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            refused = "it holds more than tensors and plain values, which could run code when read"
            raise CheckpointError(f"checkpoint {path}: refused: {refused}") from error
        raise CheckpointError(
            f"checkpoint {path}: damaged or not a checkpoint ({path.stat().st_size} bytes)"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"checkpoint {path}: not a Lightning checkpoint, it has no 'state_dict'")
    return checkpoint


def load_any_checkpoint(path: Path) -> dict[str, Any]:
    """As `load_checkpoint`; the folder of a sharded one is put together, which takes memory for all of it.

    Raises:
        CheckpointError: as there.
    """
    if not path.is_dir():
        return load_checkpoint(path)
    try:
        return _load_distributed_checkpoint(path)
    except Exception as error:  # of every kind, by the file that is damaged
        raise CheckpointError(f"checkpoint {path}: damaged or not a sharded checkpoint: {error}") from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, but whole: a process killed while saving leaves the previous file.

    Pass it as `Trainer(plugins=[AtomicCheckpointIO()])`. What loads with `weights_only=False` alone is
    refused, whatever the caller asks.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write beside `path`, see it on the disk, and put it in the place of `path`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """`load_checkpoint` of this module."""
        return load_checkpoint(path, map_location=map_location)


def _sync(folder: Path) -> None:
    """See the renaming on the disk, where folders can be synced at all."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
