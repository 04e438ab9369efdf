"""scripts/lock.py: what it takes out of uv.lock, what it keeps, and which differences it reports."""

import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("lock", ROOT / "scripts" / "lock.py")
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)

MIRROR = "https:" + "//mirror.example"
INDEX = MIRROR + "/simple"
STORE = MIRROR + "/packages"

EXPANDED = f"""\
version = 1

[[package]]
name = "numpy"
version = "2.4.6"
source = {{ registry = "{INDEX}" }}
sdist = {{ url = "{STORE}/numpy-2.4.6.tar.gz", hash = "sha256:aa", size = 3 }}
wheels = [
    {{ url = "{STORE}/numpy-2.4.6%2Bcpu-cp311-none.whl", hash = "sha256:bb", size = 5, upload-time = "x" }},
    {{ url = "{STORE}/numpy-2.4.6-cp312-none.whl#x=y", hash = "sha256:cc" }},
]

[[package]]
name = "tenfold-core"
version = "0.1.0"
source = {{ editable = "packages/core" }}
dependencies = [
    {{ name = "numpy", version = "2.4.6", source = {{ registry = "{INDEX}" }}, marker = "extra == 'a'" }},
]

[package.metadata]
requires-dist = [{{ name = "numpy", specifier = ">=1.26" }}]

[[package]]
name = "workspace"
version = "0.1.0"
source = {{ virtual = "." }}

[package.metadata]
requires-dist = [
    {{ name = "tenfold-core", editable = "packages/core" }},
]

[package.metadata.requires-dev]
dev = [{{ name = "pytest", specifier = ">=9" }}]
"""

STRIPPED = """\
version = 1

[[package]]
name = "numpy"
version = "2.4.6"
source = { registry = "." }
wheels = [
    { filename = "numpy-2.4.6+cpu-cp311-none.whl", hash = "sha256:bb" },
    { filename = "numpy-2.4.6-cp312-none.whl", hash = "sha256:cc" },
]

[[package]]
name = "tenfold-core"
version = "0.1.0"
source = { editable = "packages/core" }
dependencies = [
    { name = "numpy", version = "2.4.6", source = { registry = "." }, marker = "extra == 'a'" },
]

[package.metadata]
requires-dist = [{ name = "numpy", specifier = ">=1.26" }]

[[package]]
name = "workspace"
version = "0.1.0"
source = { virtual = "." }

[package.metadata.requires-dev]
dev = [{ name = "pytest", specifier = ">=9" }]
"""


def test_strip_keeps_versions_and_hashes_and_drops_addresses():
    assert lock.strip(EXPANDED) == STRIPPED


def test_strip_twice_changes_nothing():
    assert lock.strip(STRIPPED) == STRIPPED


def test_strip_keeps_the_dependency_groups_of_a_root_without_dependencies():
    text = '[[package]]\nname = "w"\nsource = { virtual = "." }\n\n[package.metadata]\nrequires-dist = []\n'
    assert tomllib.loads(lock.strip(text)) == {"package": [{"name": "w", "source": {"virtual": "."}}]}


def test_strip_refuses_an_address_that_it_does_not_know():
    with pytest.raises(SystemExit, match="do not know how to strip"):
        lock.strip('source = { git = "https:' + '//git.example/x" }\n')


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("2.4.6", "2.5.0"), "wanted, but not locked: numpy 2.5.0"),
        (("sha256:cc", "sha256:dd"), "locked sha256:cc, served sha256:dd"),
        (("cp312", "cp313"), "no longer served: numpy-2.4.6-cp312-none.whl"),
    ],
)
def test_a_different_resolution_is_reported(change, problem):
    problems = lock.compare(lock.pins(STRIPPED), lock.pins(STRIPPED.replace(*change)))
    assert any(problem in line for line in problems)


def test_a_wheel_published_later_is_no_difference():
    later = STRIPPED.replace("\n]\n", '\n    { filename = "numpy-2.4.6-cp315-none.whl", hash = "sha256:ee" },\n]\n', 1)
    assert lock.compare(lock.pins(STRIPPED), lock.pins(later)) == []
    assert lock.pins(later) != lock.pins(STRIPPED)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: there is no committed lock")
def test_the_committed_lock_is_stripped_and_covers_every_member():
    committed = lock.staged_lock()
    assert committed is not None, "uv.lock is not tracked"
    assert committed == lock.strip(committed)
    members = [tomllib.loads(path.read_text()) for path in ROOT.glob("packages/*/pyproject.toml")]
    assert {member["project"]["name"] for member in members} <= {name for name, _ in lock.pins(committed)}
