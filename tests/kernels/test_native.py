"""How the C sources become functions, and what happens where they cannot."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tenfold.kernels import grouped_swiglu, native
from tenfold.kernels.moe import compiled
from tenfold.kernels.testing import swiglu_inputs

pytestmark = pytest.mark.skipif(native.load(compiled.SOURCE) is None, reason="needs AVX-512 and GCC")
SQUARE = "int square(int x) { return x * x; }"
LOADED = """
import sys
from pathlib import Path
from tenfold.kernels import native
print(native.load(Path(sys.argv[1])).square(6))
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source of its own, and a cache with nothing in it."""
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "square.c"
    path.write_text(SQUARE)
    return path


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "native").iterdir())


def test_a_source_is_compiled_once(source, tmp_path):
    assert native.load(source).square(7) == 49
    (name,) = cached(tmp_path)
    written = (tmp_path / "cache" / "native" / name).stat().st_mtime_ns
    assert native.load.__wrapped__(source).square(7) == 49
    assert cached(tmp_path) == [name]
    assert (tmp_path / "cache" / "native" / name).stat().st_mtime_ns == written


def test_a_changed_source_is_another(source, tmp_path):
    native.load(source)
    source.write_text(SQUARE.replace("x * x", "x + x"))
    assert native.load.__wrapped__(source).square(7) == 14
    assert len(cached(tmp_path)) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int square(int x) { return y; }", "error: .y. undeclared"),
        ("int there(void); int f(void) { return there(); }", "undefined symbol"),
    ],
)
def test_what_cannot_be_compiled_or_loaded_is_warned_of_and_leaves_nothing(source, tmp_path, text, reason):
    source.write_text(text)
    with pytest.warns(RuntimeWarning, match=f"(?s)square.c could not be compiled and loaded, torch's.*{reason}"):
        assert native.load(source) is None
    assert all(name.endswith(".so") for name in cached(tmp_path))


@pytest.mark.parametrize("damage", [b"", b"\0" * 9000, "half"])
def test_a_damaged_file_is_compiled_again(source, tmp_path, damage):
    native.load(source)
    (name,) = cached(tmp_path)
    file = tmp_path / "cache" / "native" / name
    whole = file.read_bytes()
    file.unlink()  # not written over: this process has it loaded
    file.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    assert native.load.__wrapped__(source).square(7) == 49
    assert file.read_bytes() == whole


@pytest.mark.parametrize("compiler", ["", "  ", "g++", "gcc -g0"])
def test_other_names_for_the_compiler(source, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert native.load(source).square(7) == 49


def test_a_compiler_that_fails_in_no_encoding(source, tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_bytes(b"#!/bin/sh\necho 'd\351sol\351' >&2; exit 1\n")
    compiler.chmod(0o755)
    for name, reason in ((str(compiler), "sol"), ('gcc "', "No closing quotation")):
        monkeypatch.setenv("CC", name)
        with pytest.warns(RuntimeWarning, match=reason):
            assert native.load.__wrapped__(source) is None


def test_a_locale_without_unicode(source):
    source.write_text(f"/* Σ */ {SQUARE}", "utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert subprocess.check_output([sys.executable, "-c", LOADED, source], env=environment).split()[-1] == b"36"


@pytest.mark.parametrize(
    "environment",
    [{"TENFOLD_NATIVE": "0"}, {"CC": "no-such-compiler"}],
    ids=str,
)
def test_without_it_there_is_no_word(source, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load(source) is None


def test_without_wide_vectors(source, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert native.load(source) is None


def test_a_cache_that_cannot_be_written(source, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert native.load(source).square(7) == 49


def test_only_the_user_can_write_what_is_kept(source, tmp_path):
    old = os.umask(0o002)  # a group's members could write without further care
    try:
        native.load(source)
    finally:
        os.umask(old)
    folder = tmp_path / "cache" / "native"
    assert [path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())] == [0o700, 0o700]


@pytest.mark.parametrize("which", ["folder", "library"])
@pytest.mark.parametrize("how", ["writable", "another user's"])
def test_what_others_could_have_written_is_not_loaded(source, tmp_path, monkeypatch, which, how):
    native.load(source)
    folder = tmp_path / "cache" / "native"
    (library,) = folder.iterdir()
    path = folder if which == "folder" else library
    if how == "writable":
        path.chmod(0o770)
        reason = "may be written by others"
    else:
        whose, real = path.stat().st_ino, Path.stat

        def stat(self, **options):
            found = real(self, **options)
            return os.stat_result((*found[:4], 12345, *found[5:])) if found.st_ino == whose else found

        monkeypatch.setattr(Path, "stat", stat)
        reason = "is another user's"
    found, loaded = library.stat().st_ino, []
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: loaded.append(Path(path).stat().st_ino))
    with pytest.warns(RuntimeWarning, match=f"{path.name} {reason}"):
        native.load.__wrapped__(source)
    assert len(loaded) == 1
    assert loaded != [found]


def test_two_processes_at_once(source, tmp_path):
    command = [sys.executable, "-c", LOADED, source]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0].split()[-1] for process in processes] == [b"36", b"36"]
    assert len(cached(tmp_path)) == 1


def test_one_openmp_in_the_process():
    """The compiled threads are torch's: a second OpenMP would keep threads of its own spinning beside them."""
    tensors = swiglu_inputs((5, 3), 16, 16, 16)
    grouped_swiglu(**tensors)
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split()[-1] for line in maps if any(name in line for name in ("gomp", "iomp", "libomp"))}
    assert len(loaded) == 1, loaded


def test_results_are_the_same_without_it(tmp_path):
    program = """
import sys, torch
from tenfold.kernels import grouped_swiglu, native
from tenfold.kernels.moe import compiled
from tenfold.kernels.testing import swiglu_inputs
print(native.load(compiled.SOURCE) is not None)
torch.save(grouped_swiglu(**swiglu_inputs((5, 90), 64, 48, 32)), sys.argv[1])
"""
    results = []
    for way in ("1", "0"):
        environment = os.environ | {"TENFOLD_NATIVE": way}
        file = tmp_path / way
        answer = subprocess.check_output([sys.executable, "-c", program, file], env=environment, text=True)
        assert answer.split()[-1] == str(way == "1")
        results.append(torch.load(file))
    torch.testing.assert_close(*results)
