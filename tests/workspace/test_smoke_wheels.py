"""scripts/smoke_wheels.py: what it finds wrong with a wheel before installing it."""

import importlib.util
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("smoke_wheels", ROOT / "scripts" / "smoke_wheels.py")
smoke_wheels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smoke_wheels)

INFO = "tenfold_cog_attention-0.1.0.dist-info"
GOOD = {
    "tenfold/cog_attention/__init__.py": "",
    "tenfold/cog_attention/py.typed": "",
    f"{INFO}/licenses/LICENSE": "text",
    f"{INFO}/METADATA": "Requires-Dist: torch>=2.6\nRequires-Dist: tenfold-core[lm]>=0.1,<0.2\n\n# Title\n",
}


def problems(folder: Path, changes: dict[str, str | None]) -> list[str]:
    """Those of a good wheel with some files changed, or left out where None."""
    path = folder / "tenfold_cog_attention-0.1.0-py3-none-any.whl"
    with ZipFile(path, "w") as wheel:
        for name, content in (GOOD | changes).items():
            if content is not None:
                wheel.writestr(name, content)
    return smoke_wheels.inspect(path)


def test_a_good_wheel_passes(tmp_path):
    assert problems(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tenfold/cog_attention/py.typed": None}, "tenfold/cog_attention/py.typed is missing"),
        ({f"{INFO}/licenses/LICENSE": None}, f"{INFO}/licenses/LICENSE is missing"),
        ({"kernels/__init__.py": ""}, "installs kernels/__init__.py"),
        ({"tenfold/__init__.py": ""}, "installs tenfold/__init__.py"),
        ({"tenfold/core/lm.py": ""}, "installs tenfold/core/lm.py"),
        ({f"{INFO}/METADATA": "Name: x\n\n"}, "the description is empty"),
        ({f"{INFO}/METADATA": "Requires-Dist: kernels\n\n# Title"}, "requires `kernels`"),
        (
            {f"{INFO}/METADATA": "Requires-Dist: tenfold-core>=0.1\n\n# Title"},
            "needs a lower and an upper bound",
        ),
        ({f"{INFO}/METADATA": "Requires-Dist: tenfold-core\n\n# Title"}, "needs a lower and an upper bound"),
        (
            {f"{INFO}/METADATA": "Requires-Dist: x @ file:///x.whl\n\n# Title"},
            "an address where a range belongs",
        ),
    ],
)
def test_a_fault_is_named(tmp_path, changes, problem):
    [found] = problems(tmp_path, changes)
    assert problem in found


def test_every_package_is_tried():
    projects = [ROOT / "kernels", *(ROOT / "packages").iterdir()]
    names = {tomllib.loads((project / "pyproject.toml").read_text())["project"]["name"] for project in projects}
    assert names == set(smoke_wheels.USES)
