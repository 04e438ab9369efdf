"""C sources of this package, compiled on the machine where they run, as Triton compiles its launchers.

They are for what no library does as fast: see the sources. That takes Linux on x86-64 with AVX-512, and GCC (`CC`,
else `gcc`); elsewhere, and with `TENFOLD_NATIVE=0` before the first call, the ops call torch's libraries. What was
compiled is kept in the user's cache folder (`TENFOLD_CACHE`), under a name that holds a hash of the source and the
options, and one of the file itself: what was damaged is compiled again. That folder holds programs: one that somebody
else owns or may write to is not used.
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
    if os.environ.get("TENFOLD_NATIVE") == "0" or not _wide_vectors():
        return None
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["gcc"]
        return _load(source, compiler) if shutil.which(compiler[0]) else None
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(
            f"{source.name} could not be compiled and loaded, torch's libraries are used in its place (as with "
            f"TENFOLD_NATIVE=0): {str(reason)[:500]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _wide_vectors() -> bool:
    """Whether torch uses AVX-512; `ATEN_CPU_CAPABILITY` is the user's switch."""
    return platform.system() == "Linux" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _load(source: Path, compiler: list[str]) -> ctypes.CDLL:
    key = _hash("\0".join([*compiler, *OPTIONS, ""]).encode() + source.read_bytes())
    try:
        folder = _cache()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(folder):
            for library in folder.glob(f"{source.stem}-{key}-*.so"):
                if _is_private(library) and library.stem.endswith(_hash(library.read_bytes())):
                    return ctypes.CDLL(str(library))
            return ctypes.CDLL(str(_compile(source, compiler, key, folder)))
        raise PermissionError
    except (OSError, RuntimeError):  # no home, one that nobody may write, or not ours: for this process alone
        with tempfile.TemporaryDirectory() as own:
            return ctypes.CDLL(str(_compile(source, compiler, key, Path(own))))


def _compile(source: Path, compiler: list[str], key: str, folder: Path) -> Path:
    """In two steps: linked with -fopenmp, it would bring a second OpenMP beside the one that torch has loaded."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        part, whole = Path(own) / "part.o", Path(own) / "whole.so"
        for arguments in ([*OPTIONS, "-x", "c", "-c", source, "-o", part], ["-shared", part, "-o", whole]):
            subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True, errors="replace")
        whole.chmod(0o700)
        return whole.replace(folder / f"{source.stem}-{key}-{_hash(whole.read_bytes())}.so")


def _is_private(path: Path) -> bool:
    """Whether only this user can have written it; with a warning if not."""
    status = path.stat()
    if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return True
    whose = "is another user's" if status.st_uid != os.geteuid() else "may be written by others (chmod go-w helps)"
    warnings.warn(f"{path} {whose}: not used, what is compiled serves this process alone", RuntimeWarning, stacklevel=5)
    return False


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _cache() -> Path:
    folder = os.environ.get("TENFOLD_CACHE")
    return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tenfold") / "native"
