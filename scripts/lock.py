# /// script
# requires-python = ">=3.11"
# ///
"""Pin every package of the workspace by version and hash, without naming an index.

uv writes into uv.lock where it found every file, so a lock made behind one mirror is of no use behind another.
uv.lock is therefore each clone's own and not committed. What is committed: the versions, as constraints in the
root's pyproject.toml, by which uv resolves to the same packages everywhere; and the hash of every file they come
in, `locked-files.txt`, which `--check` compares with what the index serves.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^constraint-dependencies = \[\n(?:    .*\n)*\]\n", re.MULTILINE)
PIN = re.compile(r'^    "([A-Za-z0-9._-]+)==')


class Lock(NamedTuple):
    """What a resolution came to: pins, `numpy==2.4.6 ; python_full_version < '3.12'`, and the hash of each file."""

    pins: list[str]
    files: dict[str, str]


def read(lock: str) -> Lock:
    """The pins and files of the text of a uv.lock; the workspace's own packages have neither."""
    pins, files = [], {}
    for package in tomllib.loads(lock)["package"]:
        if "registry" not in package["source"]:
            continue
        marker = " or ".join(package.get("resolution-markers", []))
        pins.append(f"{package['name']}=={package['version']}" + (f" ; {marker}" if marker else ""))
        files |= {_filename(wheel["url"]): wheel["hash"] for wheel in package.get("wheels", [])}
    return Lock(sorted(pins), dict(sorted(files.items())))


def _filename(url: str) -> str:
    return url.partition("#")[0].rpartition("/")[2].replace("%2B", "+")


def constraints(pins: list[str]) -> str:
    """The pins as the block of pyproject.toml that holds them."""
    return "constraint-dependencies = [\n" + "".join(f'    "{pin}",\n' for pin in pins) + "]\n"


def unpinned(project: str, names: list[str] | None) -> str:
    """The text of pyproject.toml without the pins of `names`, or without any; an unknown name is refused."""
    block = BLOCK.search(project)
    if not block:
        raise SystemExit("lock.py: pyproject.toml has no list `constraint-dependencies` of an entry a line")
    lines = block[0].splitlines(keepends=True)
    pinned = {match[1] for line in lines if (match := PIN.match(line))}
    if names and (unknown := sorted(set(names) - pinned)):
        raise SystemExit(f"lock.py: not among the pinned packages: {', '.join(unknown)}")
    drop = pinned if names is None else set(names)
    kept = "".join(line for line in lines if not ((match := PIN.match(line)) and match[1] in drop))
    return project[: block.start()] + kept + project[block.end() :]


def resolve(project: str) -> Lock:
    """What uv resolves the workspace to, with `project` as the root's pyproject.toml; nothing here changes."""
    workspace = tomllib.loads(project)["tool"]["uv"]["workspace"]
    members = [member for pattern in workspace["members"] for member in ROOT.glob(pattern)]
    with tempfile.TemporaryDirectory() as folder:
        for member in members:
            copy = Path(folder, member.relative_to(ROOT))
            copy.mkdir(parents=True, exist_ok=True)
            shutil.copy(member / "pyproject.toml", copy)
        Path(folder, "pyproject.toml").write_text(project, encoding="utf-8")
        run = subprocess.run(["uv", "lock", "--directory", folder], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"lock.py: uv could not resolve the workspace\n{run.stderr.strip()}")
        return read(Path(folder, "uv.lock").read_text(encoding="utf-8"))


def compare(committed: Lock, fresh: Lock) -> list[str]:
    """The differences, a line each. A file published later for a pinned version is none."""
    problems = [f"pinned, but no longer wanted: {pin}" for pin in set(committed.pins) - set(fresh.pins)]
    problems += [f"wanted, but not pinned: {pin}" for pin in set(fresh.pins) - set(committed.pins)]
    for filename, digest in committed.files.items():
        served = fresh.files.get(filename)
        if served is None:
            problems.append(f"locked, but no longer served: {filename}")
        elif served != digest:
            problems.append(f"another file under the same name: {filename}: locked {digest}, served {served}")
    return sorted(problems)


def main() -> None:
    """Pin, or check the pins."""
    parser = argparse.ArgumentParser(
        prog="lock.py",
        description=f"{__doc__.splitlines()[0]} Without an option: pin what pyproject.toml newly asks for.",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--upgrade", nargs="*", metavar="PACKAGE", help="to the newest versions, of all or of these")
    mode.add_argument("--check", action="store_true", help="compare with a fresh resolution; exit 1 on a difference")
    arguments = parser.parse_args()
    project, hashes = ROOT / "pyproject.toml", ROOT / "locked-files.txt"
    text = project.read_text(encoding="utf-8")
    if arguments.check:
        lines = hashes.read_text(encoding="utf-8").splitlines()
        committed = Lock(
            tomllib.loads(text)["tool"]["uv"]["constraint-dependencies"],
            {filename: digest for digest, filename in map(str.split, lines)},
        )
        problems = compare(committed, resolve(text))
        for problem in problems[:20]:
            print(f"lock.py: {problem}", file=sys.stderr)
        if len(problems) > 20:
            print(f"lock.py: ... and {len(problems) - 20} more", file=sys.stderr)
        sys.exit(1 if problems else 0)
    start = text if arguments.upgrade is None else unpinned(text, arguments.upgrade or None)
    fresh = resolve(start)
    hashes.write_text("".join(f"{digest}  {name}\n" for name, digest in fresh.files.items()), encoding="utf-8")
    project.write_text(BLOCK.sub(lambda _: constraints(fresh.pins), text), encoding="utf-8")


if __name__ == "__main__":
    main()
