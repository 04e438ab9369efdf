"""C sources of this package, compiled on the machine where they run, as Triton compiles its launchers.

They are for what no library does as fast: see the sources. That takes x86-64 with AVX-512 and GCC; elsewhere, and with
`TENFOLD_NATIVE=0`, the ops call torch's libraries. What was compiled is kept in the user's cache folder
(`TENFOLD_CACHE`), under a name that changes with the source and the options.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

# What torch asks of a processor before it calls it AVX512; not -march=native, which old compilers take for AVX2 on new
# processors.
OPTIONS = (
    *("-O2", "-std=gnu11", "-fPIC", "-fopenmp", "-mprefer-vector-width=512"),
    *("-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
)


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The functions of a source, None where it cannot be used. With a warning if that is because GCC failed."""
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    if os.environ.get("TENFOLD_NATIVE") == "0" or not _wide_vectors() or not shutil.which(compiler[0]):
        return None
    try:
        return _load(source, compiler)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(
            f"{source.name} could not be compiled and loaded, torch's libraries are used in its place (as with "
            f"TENFOLD_NATIVE=0): {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _wide_vectors() -> bool:
    """Whether torch uses AVX-512; `ATEN_CPU_CAPABILITY` is the user's switch."""
    return platform.system() == "Linux" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _load(source: Path, compiler: list[str]) -> ctypes.CDLL:
    key = hashlib.sha256("\0".join([*compiler, *OPTIONS, source.read_text()]).encode()).hexdigest()[:16]
    name = f"{source.stem}-{key}.so"
    try:
        folder = _cache()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            _compile(source, compiler, folder / name)
        return ctypes.CDLL(str(folder / name))
    except (OSError, RuntimeError):  # no home, or one that nobody may write: compiled for this process alone
        with tempfile.TemporaryDirectory() as own:
            _compile(source, compiler, Path(own) / name)
            return ctypes.CDLL(str(Path(own) / name))


def _compile(source: Path, compiler: list[str], library: Path) -> None:
    """In two steps: linked with -fopenmp, it would bring a second OpenMP beside the one that torch has loaded."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        part, whole = Path(folder) / "part.o", Path(folder) / "whole.so"
        for arguments in ([*OPTIONS, "-c", source, "-o", part], ["-shared", part, "-o", whole]):
            subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True)
        whole.replace(library)


def _cache() -> Path:
    folder = os.environ.get("TENFOLD_CACHE")
    return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tenfold") / "native"
