"""Writing a file whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` (its folder is made), which takes the place of `path` if the block
    succeeds; neither a reader nor a crash sees half of it.

    Several processes may write the same file at once: each has its own temporary file, and the last one wins.

    Example:
        >>> with write_whole(Path("claims.json")) as file:
        ...     file.write_text(text, encoding="utf-8")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
