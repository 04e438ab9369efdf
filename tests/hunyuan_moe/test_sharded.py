"""Two processes that shard the experts and the data train as one does."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from lightning.pytorch.utilities.seed import isolate_rng

SCRIPT = Path(__file__).with_name("sharded.py")


def test_two_processes_are_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    text, file = tmp_path / "numbers.txt", tmp_path / "two.pt"
    text.write_text("\n\n".join(" ".join(str(i * j % 97) for j in range(60)) for i in range(60)))
    with isolate_rng():
        one, _ = runpy.run_path(str(SCRIPT))["train"](1, str(text))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(file), "2", str(text)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    two = torch.load(file)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    assert all(w.std() > 1e-4 for name, w in one.items() if "norm" in name)  # they began as ones
