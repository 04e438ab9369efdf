"""scripts/lock.py: what it reads from uv.lock, what it writes into pyproject.toml, and which differences it reports."""

import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("lock", ROOT / "scripts" / "lock.py")
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)

STORE = "https:" + "//mirror.example/packages"

UV_LOCK = f"""\
version = 1

[[package]]
name = "numpy"
version = "2.4.6"
source = {{ registry = "somewhere" }}
resolution-markers = ["python_full_version < '3.12'"]
sdist = {{ url = "{STORE}/numpy-2.4.6.tar.gz", hash = "sha256:aa", size = 3 }}
wheels = [
    {{ url = "{STORE}/numpy-2.4.6%2Bcpu-cp311-none.whl", hash = "sha256:bb", size = 5 }},
    {{ url = "{STORE}/numpy-2.4.6-cp311-none.whl#x=y", hash = "sha256:cc" }},
]

[[package]]
name = "numpy"
version = "2.5.5"
source = {{ registry = "somewhere" }}
resolution-markers = ["python_full_version == '3.12.*'", "python_full_version >= '3.13'"]

[[package]]
name = "tenfold-core"
version = "0.1.0"
source = {{ editable = "packages/core" }}
dependencies = [{{ name = "numpy", version = "2.4.6", source = {{ registry = "somewhere" }} }}]
"""
PINS = [
    "numpy==2.4.6 ; python_full_version < '3.12'",
    "numpy==2.5.5 ; python_full_version == '3.12.*' or python_full_version >= '3.13'",
]
FILES = {"numpy-2.4.6+cpu-cp311-none.whl": "sha256:bb", "numpy-2.4.6-cp311-none.whl": "sha256:cc"}

PROJECT = """\
[tool.uv]
package = false
constraint-dependencies = [
    "numpy==2.4.6 ; python_full_version < '3.12'",
    "numpy==2.5.5 ; python_full_version >= '3.12'",
    "torch==2.15.0",
    "triton>=3.6",
]

[tool.ruff]
"""


def test_a_lock_gives_a_pin_per_version_and_a_hash_per_wheel():
    found = lock.read(UV_LOCK)
    assert found.pins == PINS
    assert found.files == FILES


def test_the_block_is_toml_and_is_found_again():
    written = lock.BLOCK.sub(lambda _: lock.constraints(PINS), PROJECT)
    assert tomllib.loads(written)["tool"]["uv"]["constraint-dependencies"] == PINS
    assert written.endswith("]\n\n[tool.ruff]\n")
    assert lock.BLOCK.sub(lambda _: lock.constraints(PINS), written) == written


@pytest.mark.parametrize(
    ("names", "left"),
    [(None, ["triton>=3.6"]), (["numpy"], ["torch==2.15.0", "triton>=3.6"])],
)
def test_upgrading_takes_the_pins_out_and_leaves_bounds_of_our_own(names, left):
    project = lock.unpinned(PROJECT, names)
    assert tomllib.loads(project)["tool"]["uv"]["constraint-dependencies"] == left


def test_upgrading_a_package_that_is_not_pinned_is_refused():
    with pytest.raises(SystemExit, match="not among the pinned packages: nunpy"):
        lock.unpinned(PROJECT, ["nunpy"])


def test_a_project_without_the_block_is_refused():
    with pytest.raises(SystemExit, match="constraint-dependencies"):
        lock.unpinned("[tool.uv]\n", None)


@pytest.mark.parametrize(
    ("fresh", "problem"),
    [
        (lock.Lock(PINS, FILES), None),
        (lock.Lock(PINS, {**FILES, "numpy-2.4.6-cp315-none.whl": "sha256:dd"}), None),  # published later
        (lock.Lock(PINS[1:], FILES), f"pinned, but no longer wanted: {PINS[0]}"),
        (lock.Lock([*PINS, "scipy==1.0"], FILES), "wanted, but not pinned: scipy==1.0"),
        (lock.Lock(PINS, {}), "locked, but no longer served: numpy-2.4.6+cpu-cp311-none.whl"),
        (lock.Lock(PINS, dict.fromkeys(FILES, "sha256:ee")), "another file under the same name"),
    ],
)
def test_what_the_check_reports(fresh, problem):
    problems = lock.compare(lock.Lock(PINS, FILES), fresh)
    assert bool(problems) == bool(problem)
    assert problem is None or any(problem in line for line in problems)


def test_the_committed_pins_have_their_hashes():
    """Every pinned version comes in files whose hashes are locked, and no file is of another version."""
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
    pinned = {tuple(pin.partition(" ;")[0].replace("-", "_").lower().split("==")) for pin in pins}
    files = [line.split()[1] for line in (ROOT / "locked-files.txt").read_text().splitlines()]
    hashed = {tuple(name.lower().split("-")[:2]) for name in files}
    normal = {(name.replace(".", "_"), version) for name, version in hashed}
    assert {(name.replace(".", "_"), version) for name, version in pinned} == normal
