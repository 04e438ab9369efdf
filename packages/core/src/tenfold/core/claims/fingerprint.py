"""What a stored measurement depends on: the code that made it, its settings, the versions and the device."""

import ast
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from ..environment import device, versions

# Code that measures nothing: the words, figures and pages around the measurements, and the tests' tools.
_OUTSIDE = {"tenfold.core": ("claims/", "cli.py"), "tenfold.kernels": ("testing/",)}


def fingerprint(fn: Callable[..., dict], package: str, settings: dict[str, Any]) -> str:
    """A digest that changes whenever `fn(**settings)` might return something else.

    It covers every file of `tenfold.kernels`, `tenfold.core` and the method's `package` (Python files without
    comments and layout), the settings, the versions of the libraries, and the device. The package's own
    `claims.py` counts only if `fn` is defined there: a method that keeps what it measures in a file beside it
    can mend the wording of a claim without measuring again.

    Raises:
        TypeError: `fn` is not a plain function of a module. A closure or a method depends on values that
            cannot be seen here, so a stale result could pass for a fresh one.
    """
    if not isinstance(fn, FunctionType) or "<locals>" in fn.__qualname__:
        raise TypeError(
            "fn: expected a function defined at the top of a module, all it needs as keyword arguments, "
            f"got {getattr(fn, '__qualname__', fn)!r}"
        )
    packages = ("tenfold.kernels", "tenfold.core", package)
    outside = () if fn.__module__ == f"{package}.claims" else ("claims.py",)
    parts = [_digest(name, (*_OUTSIDE.get(name, ()), *(outside if name == package else ()))) for name in packages]
    if not any(fn.__module__ == name or fn.__module__.startswith(f"{name}.") for name in packages):
        parts.append(hashlib.sha256(_content(Path(inspect.getfile(fn)))).hexdigest())
    libraries = versions(["lightning", "numpy", "transformers"])
    parts += [f"{fn.__module__}.{fn.__qualname__}", torch.__version__, device()]
    return hashlib.sha256(json.dumps([parts, libraries, settings], sort_keys=True).encode()).hexdigest()


@cache
def _digest(package: str, outside: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for folder in importlib.util.find_spec(package).submodule_search_locations:
        for file in sorted(_files(Path(folder))):
            name = file.relative_to(folder).as_posix()
            if not name.startswith(outside):
                digest.update(name.encode() + b"\0" + _content(file) + b"\0")
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _content(file: Path) -> bytes:
    data = file.read_bytes()
    return ast.dump(ast.parse(data)).encode() if file.suffix == ".py" else data
