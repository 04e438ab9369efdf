import functools
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tenfold.core import files
from tenfold.core.claims import Run, fingerprint
from tenfold.core.claims.progress import RunProgress, duration

CALLS = []


def double(x=1, seed=0):
    CALLS.append((x, seed))
    return {"value": 2 * x, "list": (1, 2), "array": np.arange(2), "tensor": torch.tensor(0.5)}


def fail_at(x):
    if x == 2:
        raise RuntimeError("out of luck")
    return {"x": x}


def diverge():
    return {"curve": [1.0, float("nan")]}


def text():
    return "not a dict"


def parabola(lr, best, seed, limit=1.0):
    return {"loss": (np.log(lr / best)) ** 2 if lr < limit else None}


def opaque():
    return {"x": object()}


@pytest.fixture(autouse=True)
def _forget():
    CALLS.clear()
    fingerprint.forget()


SOURCES = {
    "__init__.py": "",
    "train.py": """
from typing import TYPE_CHECKING

from .parts import NAME
from .parts.model import WIDTH

if TYPE_CHECKING:
    from .parts.typing_only import UNUSED


def train(steps):
    '''Train it.'''
    from toymethod.parts.late import RATE

    return {'loss': 1 / steps, 'width': WIDTH, 'rate': RATE, 'name': NAME}
""",
    "claims.py": "def here():\n    return {'x': 1}\n",
    "parts/__init__.py": "from .other import UNUSED\nfrom .passed import NAME\n",
    "parts/model.py": "WIDTH = 8\n",
    "parts/late.py": "RATE = 0.5\n",
    "parts/passed.py": "NAME = 1\n",
    "parts/other.py": "UNUSED = 1\n",
    "parts/typing_only.py": "UNUSED = 1\n",
    "parts/weights.bin": "1",
    "parts/README.md": "words",
    "configs/tiny.yaml": "lr: 0.5\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A method's package whose sources a test may edit."""
    folder = tmp_path / "src" / "toymethod"
    for file, text in SOURCES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    monkeypatch.syspath_prepend(folder.parent)
    importlib.invalidate_caches()
    yield folder
    for name in [m for m in sys.modules if m.split(".")[0] == "toymethod"]:
        del sys.modules[name]


def run_in(folder, package="toymethod"):
    return Run(package, folder / "measurements")


def remeasured(folder, fn, **settings):
    """Whether `fn` is run again, once its files have been read anew."""
    fingerprint.forget()
    run = run_in(folder)
    run.measure("k", fn, **settings)
    return not run.log[0]["stored"]


def test_a_second_run_does_no_work(tmp_path, package):
    first = run_in(tmp_path).measure("a/b", double, x=3, seed=1)
    run = run_in(tmp_path)
    assert run.measure("a/b", double, x=3, seed=1) == first
    assert first == {"value": 6, "list": [1, 2], "array": [0, 1], "tensor": 0.5}
    assert CALLS == [(3, 1)]
    assert [(m["key"], m["stored"]) for m in run.log] == [("a/b", True)]


def test_a_measurement_that_two_claims_share_is_logged_once(tmp_path, package):
    run = run_in(tmp_path)
    assert run.measure("k", double) == run.measure("k", double)
    assert [m["stored"] for m in run.log] == [False]
    assert CALLS == [(1, 0)]


def test_other_settings_are_another_measurement(tmp_path, package):
    run = run_in(tmp_path)
    assert [run.measure("k", double, x=x)["value"] for x in (1, 2, 1)] == [2, 4, 2]
    assert CALLS == [(1, 0), (2, 0)]


def test_two_functions_under_one_key_are_not_confused(tmp_path, package):
    run = run_in(tmp_path)
    run.measure("k", double, x=1)
    assert run.measure("k", fail_at, x=1) == {"x": 1}


@pytest.mark.parametrize(
    ("file", "text", "measured_again"),
    [
        ("train.py", SOURCES["train.py"].replace("1 / steps", "2 / steps"), True),
        ("train.py", SOURCES["train.py"].replace("1 / steps, ", "1/steps,  # a comment\n"), False),
        ("train.py", SOURCES["train.py"].replace("Train it.", "Other words."), False),
        ("train.py", SOURCES["train.py"].replace("from .parts", "import json\n\nfrom .parts"), True),
        ("parts/model.py", "WIDTH = 9\n", True),
        ("parts/model.py", '"""Words."""\n\nWIDTH = 8\n', False),
        ("parts/late.py", "RATE = 9\n", True),  # imported in a function
        ("parts/weights.bin", "other", True),
        ("parts/README.md", "other", False),
        ("parts/passed.py", "NAME = 9\n", True),
        ("parts/other.py", "UNUSED = 9\n", False),  # passed on by the same __init__, and not imported from it
        ("parts/typing_only.py", "UNUSED = 9\n", False),
        ("new.py", "X = 1\n", False),
        ("configs/tiny.yaml", "lr: 1\n", True),
        ("configs/tiny.yaml", "# words\nlr:  0.5\n", False),
        ("claims.py", "def here():\n    return {'x': 2}\n", False),
        ("__pycache__/x.pyc", "", False),
        ("data/__pycache__/x.pyc", "", False),
    ],
)
def test_changed_code_is_measured_again(tmp_path, package, file, text, measured_again):
    from toymethod.train import train

    run_in(tmp_path).measure("k", train, steps=4)
    (package / file).parent.mkdir(exist_ok=True, parents=True)
    (package / file).write_text(text)
    assert remeasured(tmp_path, train, steps=4) is measured_again


def test_a_function_depends_on_the_file_it_is_in(tmp_path, package):
    from toymethod.claims import here

    run_in(tmp_path).measure("k", here)
    (package / "claims.py").write_text("def here():\n    return {'x': 2}\n")
    assert remeasured(tmp_path, here) is True


def test_moved_files_are_not_measured_again(tmp_path, package, monkeypatch):
    from toymethod.train import train

    run_in(tmp_path).measure("k", train, steps=4)
    (package / "layers").mkdir()
    (package / "layers" / "__init__.py").write_text("")
    (package / "parts" / "model.py").rename(package / "layers" / "shape.py")
    (package / "train.py").write_text(SOURCES["train.py"].replace(".parts.model", ".layers.shape"))
    assert remeasured(tmp_path, train, steps=4) is False
    (package / "layers" / "shape.py").write_text("WIDTH = 9\n")
    assert remeasured(tmp_path, train, steps=4) is True


def test_two_files_that_import_each_other_do_not_hang(tmp_path, package):
    from toymethod.train import train

    (package / "parts" / "model.py").write_text("from ..train import train\n\nWIDTH = 8\n")
    fingerprint.forget()
    run_in(tmp_path).measure("k", train, steps=4)
    assert remeasured(tmp_path, train, steps=4) is False


def test_what_counts_of_the_real_methods(monkeypatch):
    """Cog's language models stand on Cog's kernel and on core's training, on no routing and no report."""
    read = []
    original = fingerprint._Module.read
    monkeypatch.setattr(fingerprint._Module, "read", lambda name, file: read.append(name) or original(name, file))
    cog = importlib.import_module("tenfold.cog_attention.cogformer")
    fingerprint._closure(cog.__name__, cog.__file__, "tenfold.cog_attention")
    digested = {name for name in read if fingerprint._find(name).file.name != "__init__.py"}
    assert {"tenfold.cog_attention.transformers", "tenfold.core.lm", "tenfold.core.training.sharding"} <= digested
    assert {"tenfold.kernels.cog.triton", "tenfold.kernels.logprob.reference"} <= digested
    assert not {name for name in digested if name.startswith(("tenfold.core.claims", "tenfold.kernels.moe"))}


def test_the_versions_that_count_are_those_the_distribution_requires():
    """torchvision, say, once a method requires it: nothing lists it a second time."""
    assert {"torch", "transformers", "lightning", "numpy"} <= fingerprint.required("tenfold.cog_attention")
    assert "triton" in fingerprint.required("tenfold.cog_attention")  # by way of the kernels
    assert not any(name.startswith("tenfold") for name in fingerprint.required("tenfold.cog_attention"))
    for package in ("no_such_package", "tenfold.core"):
        assert "transformers" in fingerprint.required(package)  # an extra of core's


def test_another_version_or_device_is_measured_again(tmp_path, package, monkeypatch):
    run_in(tmp_path).measure("k", double)
    monkeypatch.setattr(fingerprint, "versions", lambda names: {"torch": "0.0"})
    run_in(tmp_path).measure("k", double)
    monkeypatch.setattr(fingerprint, "device", lambda: "a faster one")
    run_in(tmp_path).measure("k", double)
    assert len(CALLS) == 3


def test_a_function_whose_inputs_cannot_be_seen_is_refused(tmp_path, package):
    x = 3
    for fn in (lambda: {"x": x}, functools.partial(double, x=3), RunProgress().say, dict):
        with pytest.raises(TypeError, match="top of a module"):
            run_in(tmp_path).measure("k", fn)


@pytest.mark.parametrize("content", ["", "{", '{"result": 1}', "[]", "null"])
def test_a_damaged_file_is_measured_again(tmp_path, package, content):
    run_in(tmp_path).measure("k", double)
    (file,) = (tmp_path / "measurements").iterdir()
    file.write_text(content)
    assert run_in(tmp_path).measure("k", double)["value"] == 2
    assert json.loads(file.read_text())["result"]["value"] == 2


@pytest.mark.parametrize("key", ["", "../x", "a//b", "a b", "/etc/x", "a/.."])
def test_bad_keys(tmp_path, package, key):
    with pytest.raises(ValueError, match="key"):
        run_in(tmp_path).measure(key, double)


@pytest.mark.parametrize(("fn", "error"), [(diverge, ValueError), (text, TypeError), (opaque, TypeError)])
def test_bad_results_name_the_measurement_and_leave_nothing(tmp_path, package, fn, error):
    with pytest.raises(error, match="measurement 'k/l'"):
        run_in(tmp_path).measure("k/l", fn)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("best", [3e-4, 1e-3, 2.2e-3, 4e-3, 3e-2])
def test_tuning_goes_on_until_the_best_rate_is_inside_the_grid(tmp_path, package, best):
    """A parabola in log lr: the nearest rate of an endless grid with the same steps wins."""
    run = run_in(tmp_path)
    chosen = run.tune("t", parabola, "loss", lr=(1e-3, 2e-3, 4e-3), best=best)
    endless = [1e-3 * 2.0**i for i in range(-8, 9)]
    assert chosen == pytest.approx(min(endless, key=lambda lr: parabola(lr, best, 0)["loss"]))
    tried = [json.loads(file.read_text())["settings"]["lr"] for file in tmp_path.rglob("*.json")]
    assert min(tried) < chosen < max(tried)
    assert run.tune("t", parabola, "loss", lr=(1e-3, 2e-3, 4e-3), best=best) == chosen  # from what is kept


def test_tuning_leaves_out_what_diverged(tmp_path, package):
    run = run_in(tmp_path)
    assert run.tune("t", parabola, "loss", lr=(1e-3, 2e-3, 4e-3), best=8e-3, limit=3e-3) == 2e-3
    with pytest.raises(RuntimeError, match="every training diverged"):
        run.tune("u", parabola, "loss", lr=(1e-3, 2e-3), best=1e-3, limit=0)
    with pytest.raises(ValueError, match="lr: expected at least two"):
        run.tune("u", parabola, "loss", lr=(2e-3, 1e-3), best=1e-3)


def test_bad_settings_name_the_measurement(tmp_path, package):
    with pytest.raises(TypeError, match="measurement 'k': settings"):
        run_in(tmp_path).measure("k", double, x=object())


def test_what_was_measured_before_a_failure_is_kept(tmp_path, package):
    run = run_in(tmp_path)
    run.measure("k", fail_at, x=0)
    run.measure("k", fail_at, x=1)
    with pytest.raises(RuntimeError, match="luck"):
        run.measure("k", fail_at, x=2)
    assert len(list(tmp_path.rglob("k-*.json"))) == 2


KILLED = """
import runpy, sys, time
from pathlib import Path
files = runpy.run_path(sys.argv[2])
def stall(self, target):
    Path(sys.argv[1], "ready").touch()
    time.sleep(60)
Path.replace = stall
with files["write_whole"](Path(sys.argv[1], "k.json")) as file:
    file.write_text("x" * 100_000)
"""


def test_killed_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "k.json").write_text("old")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), files.__file__])
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "k.json").read_text() == "old"


def test_a_failed_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="space"), files.write_whole(tmp_path / "a" / "k.json") as file:
        file.write_text("x")
    assert list((tmp_path / "a").iterdir()) == []


def test_plain_lines_where_there_is_no_terminal(tmp_path, package):
    console = Console(file=(tmp_path / "log").open("w+"), width=200)
    for _ in range(2):
        with RunProgress(console) as progress:
            run = Run("toymethod", tmp_path / "m", progress=progress)
            progress.begin("toy  losses")
            run.plan(2)
            run.measure("a", double, x=1)
            run.measure("b", double, x=2)
            progress.end()
    console.file.seek(0)
    assert console.file.read().splitlines() == [
        "toy  losses  1/2  a: 0.0 s",
        "toy  losses  2/2  b: 0.0 s",
        "toy  losses  1/2  a: kept from before",
        "toy  losses  2/2  b: kept from before",
    ]


def test_a_terminal_sees_the_count_and_the_time_left(tmp_path):
    console = Console(file=(tmp_path / "log").open("w+"), width=160, force_terminal=True)
    with RunProgress(console) as progress:
        progress.begin("toy")
        progress.plan(5)
        progress.measured("stored", 500.0, stored=True)  # says nothing about how long the others take
        progress.measured("fresh", 60.0, stored=False)
        progress._bar.refresh()
    console.file.seek(0)
    shown = console.file.read()
    assert "2/5" in shown
    assert "about 3 min 0 s left" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
