"""Writing a file or a folder whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


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


@contextmanager
def write_whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which becomes `path` if the block succeeds and is gone if not.

    Raises:
        FileExistsError: there is something at `path` already, other than an empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as outer:
        temporary = Path(outer, path.name)
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
