"""Two processes train as one does on both their batches, stop together, and one can go on from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tenfold.core.cli import main
from tenfold.core.training import load_checkpoint

TOY = Path(__file__).parent / "toy"


@pytest.mark.filterwarnings("ignore")
def test_two_processes_are_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TOY)
    both = ["fit", "toy", "--config", "tiny", "--model.dropout", "0"]
    # SIGTERM reaches the second process alone, in the 6th step of 10.
    two = subprocess.run(
        [sys.executable, "-m", "tenfold.core.cli", *both, "--trainer.devices=2", "--trainer.strategy=ddp"],
        env=os.environ | {"PYTHONPATH": str(TOY), "TOY_SIGNAL": "SIGTERM:5:1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert two.returncode == 143, two.stderr
    assert [folder.name for folder in (tmp_path / "runs" / "toy").iterdir()] == ["tiny"]
    cut = load_checkpoint("runs/toy/tiny/checkpoints/last.ckpt")
    assert cut["global_step"] == 6
    assert len(cut["random_state"]) == 2

    assert main([*both, "--data.batch_size", "8", "--trainer.max_steps", "6"]) == 0
    one = load_checkpoint("runs/toy/tiny-2/checkpoints/last.ckpt")
    torch.testing.assert_close(cut["state_dict"], one["state_dict"], rtol=0, atol=1e-6)
    # Adam's first moment is a mean of the gradients.
    moments = [c["optimizer_states"][0]["state"][0]["exp_avg"] for c in (cut, one)]
    torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-7)

    again = ["--data.batch_size", "8", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    assert main(["fit", "toy", "--resume", "runs/toy/tiny", *again]) == 0
    assert main([*both, "--data.batch_size", "8"]) == 0
    final = [load_checkpoint(f"runs/toy/{run}/checkpoints/last.ckpt") for run in ("tiny", "tiny-3")]
    assert [checkpoint["global_step"] for checkpoint in final] == [10, 10]
    torch.testing.assert_close(*(c["state_dict"] for c in final), rtol=0, atol=1e-6)
