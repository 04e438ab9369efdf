# /// script
# requires-python = ">=3.11"
# ///
"""Keep index addresses out of the committed uv.lock, and check it against a fresh resolution.

uv writes into uv.lock where it found every file, so a lock made behind one mirror is of no use behind
another. What pins a build is the version and the hash: those are kept, and uv looks the addresses up again,
with the same versions, the first time it runs in a clone. That expands uv.lock in the work tree; the stripped
text is what gets committed.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "uv.lock"

REGISTRY = re.compile(r'\{ registry = "[^"]*" \}')
SDIST = re.compile(r"^sdist = .*\n", re.MULTILINE)
WHEEL = re.compile(r'\{ (?:url|path) = "(?:[^"]*/)?([^"/#]+)(?:#[^"]*)?", .*?hash = "([^"]+)".*? \}')
REQUIRES_DIST = re.compile(r"^requires-dist = (?:\[\n(?:    .*\n)*\]|\[.*\])\n", re.MULTILINE)
PACKAGE = re.compile(r"^(?=\[\[package\]\]$)", re.MULTILINE)


def strip(lock: str) -> str:
    """`lock` without addresses and source distributions; stripping twice changes nothing.

    Without its `requires-dist` the root package looks changed to uv, which then resolves again and so finds
    the addresses, keeping the versions. With it uv would take the lock as it stands, and miss the files.
    """
    lock = REGISTRY.sub('{ registry = "." }', lock)
    lock = SDIST.sub("", lock)
    lock = WHEEL.sub(lambda wheel: f'{{ filename = "{unquote(wheel[1])}", hash = "{wheel[2]}" }}', lock)
    blocks = [_strip_root(block) if _is_root(block) else block for block in PACKAGE.split(lock)]
    lock = "".join(blocks)
    if left := re.search(r"^.*://.*$", lock, re.MULTILINE):
        raise SystemExit(f"lock.py: do not know how to strip this line of uv.lock: {left[0].strip()[:100]}")
    return lock


def _is_root(block: str) -> bool:
    return re.search(r'^source = \{ (?:virtual|editable) = "\." \}$', block, re.MULTILINE) is not None


def _strip_root(block: str) -> str:
    block = REQUIRES_DIST.sub("", block)
    return re.sub(r"^\[package\.metadata\]\n(?:\n|\Z)", "", block, flags=re.MULTILINE)


def check() -> list[str]:
    """What is wrong with the committed lock: addresses in it, or another answer from a fresh resolution."""
    committed = staged_lock()
    problems = []
    if committed is None:
        committed = LOCK.read_text()
    elif committed != strip(committed):
        problems.append(
            "the staged uv.lock holds index addresses: run `uv run scripts/lock.py`, then `git add uv.lock`"
        )
    committed = strip(committed)
    return problems + compare(pins(committed), pins(strip(resolve(committed))))


def staged_lock() -> str | None:
    """The uv.lock that git would commit (uv expands the one in the work tree); None outside a checkout."""
    show = subprocess.run(["git", "show", ":uv.lock"], cwd=ROOT, capture_output=True, text=True)
    return show.stdout if show.returncode == 0 else None


def resolve(lock: str) -> str:
    """The lock that uv writes when it starts from the versions in `lock`; the work tree stays as it is."""
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["workspace"]
    members = [member for pattern in workspace["members"] for member in ROOT.glob(pattern)]
    with tempfile.TemporaryDirectory() as folder:
        for project in [ROOT, *members]:
            copy = Path(folder, project.relative_to(ROOT))
            copy.mkdir(parents=True, exist_ok=True)
            shutil.copy(project / "pyproject.toml", copy)
        fresh = Path(folder, "uv.lock")
        fresh.write_text(lock)
        run = subprocess.run(["uv", "lock", "--directory", folder], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"lock.py: uv could not resolve the workspace\n{run.stderr.strip()}")
        return fresh.read_text()


def pins(lock: str) -> dict[tuple[str, str], dict[str, str]]:
    """The hash of every file of every (package, version)."""
    return {
        (package["name"], package.get("version", "")): {
            wheel["filename"]: wheel["hash"] for wheel in package.get("wheels", [])
        }
        for package in tomllib.loads(lock)["package"]
    }


def compare(committed: dict, fresh: dict) -> list[str]:
    """The differences, a line each. A wheel published later for a locked version is none."""
    problems = [f"locked, but no longer wanted: {name} {version}" for name, version in committed.keys() - fresh.keys()]
    problems += [f"wanted, but not locked: {name} {version}" for name, version in fresh.keys() - committed.keys()]
    for package in committed.keys() & fresh.keys():
        for filename, digest in committed[package].items():
            served = fresh[package].get(filename)
            if served is None:
                problems.append(f"locked, but no longer served: {filename}")
            elif served != digest:
                problems.append(f"another file under the same name: {filename}: locked {digest}, served {served}")
    return sorted(problems)


def rewrite() -> None:
    """Strip uv.lock in the work tree."""
    stripped = strip(LOCK.read_text())
    partial = LOCK.with_suffix(".lock.partial")
    partial.write_text(stripped)
    partial.replace(LOCK)


def main() -> None:
    """Strip uv.lock, or do what the option says instead."""
    parser = argparse.ArgumentParser(
        prog="lock.py",
        description=f"{__doc__.splitlines()[0]} Without an option: strip uv.lock in the work tree.",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--filter", action="store_true", help="standard input to standard output: git's clean filter")
    mode.add_argument("--check", action="store_true", help="compare with a fresh resolution; exit 1 on a difference")
    arguments = parser.parse_args()
    if arguments.filter:
        sys.stdout.write(strip(sys.stdin.read()))
    elif arguments.check:
        problems = check()
        for problem in problems[:20]:
            print(f"lock.py: {problem}", file=sys.stderr)
        if len(problems) > 20:
            print(f"lock.py: ... and {len(problems) - 20} more", file=sys.stderr)
        sys.exit(1 if problems else 0)
    else:
        rewrite()


if __name__ == "__main__":
    main()
