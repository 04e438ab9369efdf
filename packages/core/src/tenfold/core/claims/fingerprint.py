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
from typing import Any, NamedTuple

import yaml

from ..environment import device, required, versions

_WORDS = {"py.typed", "LICENSE"}  # files that nothing is computed from, as are those that end in .md


def fingerprint(fn: Callable[..., dict], package: str, settings: dict[str, Any]) -> str:
    """A digest that changes whenever `fn(**settings)` might return something else.

    It covers the module of `fn`; every module of `tenfold` and of the method's `package` that it imports, at its top
    or inside a function, and those that they import; the files beside these that are not Python; the settings; the
    versions of all that the method requires; and the device. Comments, docstrings and layout do not count, in YAML
    files neither, nor where a file lies: what was measured stays valid when files are moved. Of a package's
    `__init__.py` that passes names on, only the modules count that the imported names come from.

    Raises:
        TypeError: `fn` is not a plain function of a module. A closure or a method depends on values that
            cannot be seen here, so a stale result could pass for a fresh one.
    """
    if not isinstance(fn, FunctionType) or "<locals>" in fn.__qualname__:
        raise TypeError(
            "fn: expected a function defined at the top of a module, all it needs as keyword arguments, "
            f"got {getattr(fn, '__qualname__', fn)!r}"
        )
    code = _closure(fn.__module__, inspect.getfile(fn), package)
    parts = [code, fn.__qualname__, device(), versions(required(package)), settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Module(NamedTuple):
    """A file that was read: its imports, and the rest of its code without docstrings."""

    name: str
    file: Path
    imports: list[ast.Import | ast.ImportFrom]
    passed_on: dict[
        str, tuple[ast.ImportFrom, str]
    ]  # by its name here: where a name of a package is from, its name there
    rest: str

    @classmethod
    def read(cls, name: str, file: Path) -> "_Module":
        tree = ast.parse(file.read_bytes())
        at_top = [s for s in tree.body if isinstance(s, ast.ImportFrom) and file.name == "__init__.py"]
        passed_on = {alias.asname or alias.name: (s, alias.name) for s in at_top for alias in s.names}
        reader = _Reader()
        return cls(name, file, reader.imports, passed_on, ast.dump(reader.visit(tree)))

    def base(self, statement: ast.ImportFrom) -> str:
        """The absolute name that one of its `from ... import` imports from."""
        parts = self.name.split(".")
        up = len(parts) - statement.level + (self.file.name == "__init__.py")
        return ".".join([*(parts[:up] if statement.level else ()), *filter(None, [statement.module])])


@cache
def _closure(name: str, file: str, package: str) -> str:
    """The digest of a module with all that it imports."""
    digest = _Digest({"tenfold", package.partition(".")[0]})
    parts = [digest.of(_Module.read(name, Path(file))), *sorted(map(_content, digest.files))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class _Digest:
    """Digests of modules in which an import is the digest of what is imported, under the name that it gets.

    Args:
        roots: the top-level names whose modules are followed; all others are libraries, known by their versions.
    """

    def __init__(self, roots: set[str]) -> None:
        self.roots = roots
        self.done: dict[str, str] = {}
        self.files: set[Path] = set()  # that are not Python

    def of(self, module: _Module) -> str:
        """A module's digest. Two that import each other know one another by name alone."""
        if module.name not in self.done:
            self.done[module.name] = module.name
            imported = [
                f"{alias.asname or alias.name} = {self._imported(statement, alias.name, module)}"
                for statement in module.imports
                for alias in statement.names
            ]
            self.done[module.name] = hashlib.sha256("\0".join([*sorted(imported), module.rest]).encode()).hexdigest()
            self.files |= set(_beside(module.file))
        return self.done[module.name]

    def _imported(self, statement: ast.Import | ast.ImportFrom, name: str, module: _Module) -> str:
        """What an import binds: a digest, or its own name where it comes from a library."""
        base = name if isinstance(statement, ast.Import) else module.base(statement)
        ours = base.partition(".")[0] in self.roots
        if isinstance(statement, ast.Import):
            return self.of(found) if ours and (found := _find(name)) else name
        return self._member(base, name) if ours else f"{base}.{name}"

    def _member(self, base: str, name: str) -> str:
        """The digest of `name` in the module `base`: of a submodule, of what `base` passes on, or of all of `base`."""
        if submodule := _find(f"{base}.{name}"):
            return self.of(submodule)
        module = _find(base)
        if module is None:
            return f"{base}.{name}"
        if name in module.passed_on:
            statement, original = module.passed_on[name]
            return f"{original} of {self._imported(statement, original, module)}"
        return f"{name} of {self.of(module)}"


class _Reader(ast.NodeTransformer):
    """Collects imports; takes these, docstrings and what only type checkers see out of the code."""

    def __init__(self) -> None:
        self.imports: list[ast.Import | ast.ImportFrom] = []

    def visit_Import(self, node: ast.Import) -> None:
        self.imports.append(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.imports.append(node)

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.If | None:
        unseen = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" and not node.orelse
        return None if unseen else self.generic_visit(node)


@cache
def _find(name: str) -> _Module | None:
    """The module of this name, found without importing it; None where there is none."""
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, *parts)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return _Module.read(name, file)
    return None


def _beside(file: Path) -> Iterator[Path]:
    """What lies beside a package's module and is not Python: C sources, configs, data; in folders of their own too."""
    folder = file.parent
    if not (folder / "__init__.py").exists():
        return
    for path in sorted(folder.iterdir()):
        files = [path] if path.is_file() else sorted(path.rglob("*")) if not any(path.glob("*.py")) else []
        for found in files:
            hidden = any(part.startswith((".", "__pycache__")) for part in found.relative_to(folder).parts)
            if found.is_file() and not hidden and found.suffix not in (".py", ".md") and found.name not in _WORDS:
                yield found


@cache
def _content(file: Path) -> str:
    """A file's name and what is in it."""
    data = file.read_bytes()
    if file.suffix in (".yaml", ".yml"):
        data = json.dumps(yaml.safe_load(data), default=str, sort_keys=True).encode()
    return f"{file.name} {hashlib.sha256(data).hexdigest()}"


def forget() -> None:
    """Read all files again at the next fingerprint."""
    for function in (_closure, _find, _content):
        function.cache_clear()
