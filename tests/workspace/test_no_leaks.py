"""No tracked file names a package index, a path of somebody's machine, or a private network.

Read from git's index: what a commit would hold, and nothing that git ignores, as uv.lock.
"""

import io
import subprocess
from pathlib import Path

import pytest

from .leaks import leaks

ROOT = Path(__file__).parents[2]


def tracked_files() -> dict[str, bytes]:
    """The content of every file that git would commit, by path."""

    def git(*arguments: str, **options) -> bytes:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, **options).stdout

    stages = [entry.split(b"\t") for entry in git("ls-files", "--stage", "-z").split(b"\0") if entry]
    blobs = {path.decode(): stage.split()[1] for stage, path in stages}
    stream = io.BytesIO(git("cat-file", "--batch", input=b"\n".join(blobs.values()) + b"\n"))
    files = {}
    for path in blobs:
        size = int(stream.readline().split()[2])
        files[path] = stream.read(size)
        stream.readline()
    return files


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: there are no tracked files to read")
def test_tracked_files_hold_no_leak():
    found = [
        f"{path}:{number}: {kind}: {line.strip()[:120]}"
        for path, content in tracked_files().items()
        if b"\0" not in content[:8192]
        for number, kind, line in leaks(content.decode(errors="replace"))
    ]
    assert not found, "\n".join(found[:20])


# Planted lines are put together here, so that this file holds no leak itself.
HTTPS = "https:" + "//"
HOST = "pypi" + ".org"
FILES = "files.python" + "hosted.org"
MIRROR = HTTPS + "mirror.example"


@pytest.mark.parametrize(
    "line",
    [
        f"{HTTPS}{HOST}/simple",
        f"see {HOST} for it",
        '{ registry = "' + f"http:{HTTPS[-2:]}{HOST}/simple/",
        f"[badge]({HTTPS}{HOST}/project/tenfold-core/)",
        f"{HTTPS}{FILES}/packages/ce/f4/eec0465c/aiohttp-3.tar.gz",
        f"//{FILES}/x",
        f"{MIRROR}:8080/repository/simple/torch/",
        f"{MIRROR}/user/dev/+simple/ ",
        f"{MIRROR}/packages" + "/a1/b2/x.whl",
        f"deb {MIRROR}/debian" + " bookworm main",
        "deb http:" + "//deb.debian" + ".org/debian bookworm main",
        f"{MIRROR}/whl" + "/cu130",
        "download.pytorch" + ".org/whl/cpu",
        "mirror.example" + "/simple/",
        "index-url" + " = x",
        "pip install --index-url" + " https://mirror.example",
        "extra-index-url" + ": https://mirror.example",
        "find-links" + " = ['wheels']",
        "uv pip install --find-links" + "=/wheels x",
        "UV_DEFAULT" + "_INDEX=https://mirror.example",
        "[[tool.uv" + ".index]]",
        "/home" + "/ada/tenfold/x.py",
        'path = "/Users' + '/ada/tenfold"',
        "(/root" + "/.cache)",
        "`/work" + "/main/uv.lock`",
        "(/opt" + "/venv)",
        "/farm" + "/cache",
        "C:" + "\\Users\\ada",
        "C:" + "\\\\Users\\\\ada",
        "http://10.1" + ".2.3:8080",
        "host 192.168" + ".1.20",
        "172.20" + ".0.1/24",
    ],
)
def test_a_planted_leak_is_found(line):
    found = leaks(f"first\n{line}\nlast")
    assert found
    assert {(number, text) for number, _, text in found} == {(2, line)}


@pytest.mark.parametrize(
    "line",
    [
        "https://arxiv.org/abs/2411.07176",
        "http://www.apache.org/licenses/LICENSE-2.0",
        "uses: pypa/gh-action-pypi-publish",
        'version = "10.4.0.35"',
        '{ filename = "nvidia_curand-10.4.0.35-py3-none-any.whl", hash = "sha256:0" }',
        "nvidia-curand==10.4.0.35",
        'source = { registry = "." }',
        '"--find-links", str(dist)',
        "http://127.0.0.1:8000",
        "runs/work/checkpoint.ckpt",
        "examples/home/page",
        "a simple project",
        "import tenfold.kernels  # and/or",
    ],
)
def test_an_innocent_line_is_not(line):
    assert leaks(line) == []
