"""The rules of the workspace: what a distribution carries, who imports whom, imports that only import."""

import ast
import json
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
WORKSPACE = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["workspace"]


class Member:
    """One distribution of the workspace."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pyproject = tomllib.loads((folder / "pyproject.toml").read_text())
        self.project = self.pyproject["project"]
        self.name = self.project["name"]
        self.module = self.name.replace("tenfold-", "tenfold.", 1).replace("-", "_")
        self.source = folder / "src" / self.module.replace(".", "/")
        extras = self.project.get("optional-dependencies", {})
        self.requirements = [Requirement(r) for rs in (self.project["dependencies"], *extras.values()) for r in rs]

    def imports(self) -> set[tuple[str, Path]]:
        """Every (module, file) that the sources import, wherever it stands; relative imports stay inside."""
        found = set()
        for file in sorted(self.source.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    found |= {(alias.name, file) for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found |= {(f"{node.module}.{alias.name}", file) for alias in node.names}
        return found


MEMBERS = [Member(path.parent) for pattern in WORKSPACE["members"] for path in ROOT.glob(f"{pattern}/pyproject.toml")]
VERSIONS = {member.name: Version(member.project["version"]) for member in MEMBERS}
each_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)


def test_the_folder_of_the_kernels_is_no_package():
    """A package `kernels` on the path would hide the one of that name that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@each_member
def test_tenfold_is_a_namespace(member):
    assert not (member.folder / "src" / "tenfold" / "__init__.py").exists()
    assert [path.name for path in (member.folder / "src").iterdir()] == ["tenfold"]
    assert [path.name for path in (member.folder / "src" / "tenfold").iterdir()] == [member.source.name]


@each_member
def test_a_distribution_carries_what_it_must(member):
    assert (member.source / "__init__.py").exists()
    assert (member.source / "py.typed").exists()
    assert (member.folder / "README.md").read_text().startswith("# ")
    assert (member.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert b"Apache License" in (ROOT / "LICENSE").read_bytes()
    assert "LICENSE" in member.project["license-files"]
    assert member.pyproject["tool"]["uv"]["build-backend"]["module-name"] == member.module


@each_member
def test_ranges_of_siblings_are_bounded_and_hold_the_present_version(member):
    """An unbounded range is published as it stands: the next breaking release breaks every old one."""
    for requirement in member.requirements:
        if requirement.name not in VERSIONS:
            continue
        assert {bound.operator for bound in requirement.specifier} == {">=", "<"}, requirement
        assert VERSIONS[requirement.name] in requirement.specifier, requirement
        assert member.pyproject["tool"]["uv"]["sources"][requirement.name] == {"workspace": True}


@each_member
def test_arrows_run_from_method_to_core_to_kernels(member):
    layers = ["tenfold.kernels", "tenfold.core"]
    below = layers[: layers.index(member.module)] if member.module in layers else layers
    allowed = [member.module, *below]
    upward = {
        f"{file.relative_to(ROOT)}: {module}"
        for module, file in member.imports()
        if module.split(".")[0] == "tenfold" and ".".join(module.split(".")[:2]) not in allowed
    }
    assert not upward


@each_member
def test_every_import_is_a_declared_dependency(member):
    """uv installs all members into one environment, where a missing dependency goes unnoticed."""
    declared = {canonicalize_name(name) for name in (member.name, *(r.name for r in member.requirements))}
    distributions = packages_distributions()
    undeclared = {
        f"{file.relative_to(ROOT)}: {module}"
        for module, file in member.imports()
        if module.split(".")[0] not in sys.stdlib_module_names | {"tenfold"}
        and not declared & {canonicalize_name(name) for name in distributions.get(module.split(".")[0], ())}
    }
    siblings = {".".join(module.split(".")[:2]) for module, _ in member.imports() if module.startswith("tenfold.")}
    undeclared |= {sibling for sibling in siblings if sibling.replace(".", "-").replace("_", "-") not in declared}
    assert not undeclared


def _absolute(node: ast.ImportFrom, module: str, file: Path) -> str:
    """What a `from ... import` imports from."""
    parts = module.split(".")
    here = parts[: len(parts) - node.level + (file.name == "__init__.py")] if node.level else []
    return ".".join([*here, *([node.module] if node.module else [])])


def import_graph(folder: Path, top: str) -> dict[str, set[str]]:
    """Which of a package's modules each of them imports: at its top, in functions, and for type checkers."""
    files = {}
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).with_suffix("").parts
        files[".".join([top, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = file
    graph = {}
    for module, file in files.items():
        named = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(node, module, file)
                inside = {f"{base}.{alias.name}" for alias in node.names}
                named |= {name if name in files else base for name in inside}
        graph[module] = named & files.keys() - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; empty where there are none."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


@each_member
def test_no_two_files_import_each_other_in_a_circle(member):
    assert circle(import_graph(member.source, member.module)) == []


@pytest.mark.parametrize(
    "b",
    [
        "from . import a",
        "def f():\n    from .a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack.sub.a import x",
        "import pack.sub.a",
        "from .. import top",
    ],
)
def test_a_circle_is_found(tmp_path, b):
    (tmp_path / "sub").mkdir()
    for name, text in {"sub/a.py": "from . import b", "sub/b.py": b, "top.py": "from .sub import a"}.items():
        (tmp_path / name).write_text(text)
    assert len(circle(import_graph(tmp_path, "pack"))) > 2


@each_member
def test_only_the_method_imports_its_reproduction(member):
    """What the claims are measured with is no part of what users import."""
    inside = f"{member.module}.reproduction"
    importers = {
        module
        for module, imported in import_graph(member.source, member.module).items()
        if any(name == inside or name.startswith(f"{inside}.") for name in imported)
    }
    assert {name for name in importers if not name.startswith(inside)} <= {f"{member.module}.method"}


def test_kernels_import_torch_and_triton_alone():
    [kernels] = [member for member in MEMBERS if member.name == "tenfold-kernels"]
    assert {requirement.name for requirement in kernels.requirements} == {"torch", "triton"}


PROBE = """
import importlib, json, logging, os, random, signal, sys, threading
import numpy, torch
*others, module = sys.argv[1:]
for other in others:
    importlib.import_module(other)

def state():
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "seeds": (torch.initial_seed(), torch.get_rng_state().tolist(), hash(random.getstate()),
                  hash(numpy.random.get_state()[1].tobytes())),
        "defaults": (str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled(),
                     torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "cuda started": torch.cuda.is_initialized(),
        "running threads": threading.active_count(),
        "signal handlers": str([signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]),
        "root logger": str((logging.root.level, logging.root.handlers)),
        "environment": dict(os.environ),
        "files": sorted(os.listdir()),
    }

before = state()
importlib.import_module(module)
after = state()
registered = []
if "transformers" in sys.modules:
    from transformers import AttentionInterface
    functions = AttentionInterface().items()
    registered = [name for name, function in functions if function.__module__.startswith("tenfold")]
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "registered": registered,
    "modules": sorted(sys.modules),
}))
"""


@each_member
def test_importing_changes_nothing(member, tmp_path):
    # Imported first, since these set environment variables and draw random numbers: theirs to answer for.
    heavy = ["lightning", "transformers.models.llama.modeling_llama"]
    others = [] if member.module == "tenfold.kernels" else heavy
    command = [sys.executable, "-I", "-c", PROBE, *others, member.module]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    probe = json.loads(run.stdout)
    assert probe["changed"] == []
    assert probe["registered"] == []
    if member.module == "tenfold.kernels":
        assert not {"triton", "transformers", "lightning"} & set(probe["modules"])


@each_member
def test_the_top_of_a_method_holds_the_method(member):
    """Claims, and the trainings that only they need, would hide it."""
    if not (member.source / "method.py").exists():
        return
    assert (member.source / "reproduction" / "claims.py").exists()
    top = {path.stem for path in member.source.glob("*.py")}
    assert not top & {"claims", "experiments"}
    text = (member.source / "method.py").read_text()
    assert ("verbs={" in text) == ("verbs" in top)
