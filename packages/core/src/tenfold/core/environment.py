"""What a measurement or a training ran on: versions, processor, commit."""

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def environment(distributions: Iterable[str]) -> dict[str, Any]:
    """The machine and the versions of `distributions` (those installed), as JSON values."""
    return {
        "date": now(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "commit": _commit(Path(__file__)),
        "versions": {"python": platform.python_version(), **versions(distributions)},
    }


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def required(package: str) -> set[str]:
    """The distributions that the one of the import name `package` requires, with what its siblings require.

    Extras count: what is not installed has no version. Our own distributions do not, whose code is looked at.
    """
    found: set[str] = set()
    waiting, seen = ["tenfold-core", package.replace(".", "-").replace("_", "-")], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        try:
            requirements = {canonicalize_name(Requirement(text).name) for text in requires(name) or ()}
        except PackageNotFoundError:
            continue
        ours = {name for name in requirements if name.startswith("tenfold-")}
        found |= requirements - ours
        waiting += ours - seen
    return found


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def device() -> str:
    """The accelerator's name, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(file: Path) -> str | None:
    """The commit that `file` belongs to, `+` where the checkout has changes; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # installed inside some other checkout, it is not tracked
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
