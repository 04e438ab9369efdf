"""The cache folder, and the rule that nothing half written is ever found in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Where computed data are kept: the environment variable `TENFOLD_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("TENFOLD_CACHE") or platformdirs.user_cache_dir("tenfold"))


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` (its folder is made), which takes the place of `path` if the block
    succeeds.

    Several processes may write the same file at once: each has its own temporary file, and the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
