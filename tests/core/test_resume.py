"""Interrupted training goes on to the same bits, whatever interrupts it."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tenfold.core.training import (
    AtomicCheckpointIO,
    CheckpointError,
    LastCheckpoint,
    RandomState,
    load_checkpoint,
)

TOY = Path(__file__).parent / "toy"


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.syspath_prepend(TOY)
    import toy_method

    return toy_method


def train(toy, folder, *, seed=0, dropout=0.2, shuffle=True, resume=False, callbacks=(), **arguments):
    """Final weights and optimizer state of 2 epochs of 10 batches, or of what the arguments say."""
    seed_everything(seed, verbose=False)
    last = LastCheckpoint(folder)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RandomState(), last, *callbacks],
        plugins=[AtomicCheckpointIO()],
        **({"max_epochs": 2, "log_every_n_steps": 1} | arguments),
    )
    module = toy.Toy(dropout=dropout)
    try:
        trainer.fit(module, datamodule=toy.Noise(shuffle=shuffle), ckpt_path=last.path if resume else None)
    except SIGTERMException:
        return None
    return [module.state_dict(), *trainer.optimizers[0].state_dict()["state"].values()]


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("step", "arguments"),
    [
        pytest.param(4, {}, id="mid-epoch"),
        pytest.param(9, {}, id="epoch-end"),
        pytest.param(4, {"val_check_interval": 5}, id="before-validation"),
        pytest.param(13, {"max_epochs": -1, "max_steps": 25}, id="by-steps"),
        pytest.param(13, {"limit_train_batches": 7, "max_epochs": 3}, id="limited-epochs"),
        pytest.param(3, {"accumulate_grad_batches": 2}, id="accumulating"),
    ],
)
def test_sigterm_and_resume(toy, tmp_path, monkeypatch, step, arguments, shuffle, dropout):
    options = {"dropout": dropout, "shuffle": shuffle, **arguments}
    whole = train(toy, tmp_path / "whole", **options)

    monkeypatch.setenv("TOY_SIGNAL", f"SIGTERM:{step}:0")
    assert train(toy, tmp_path / "cut", **options) is None
    assert load_checkpoint(tmp_path / "cut" / "last.ckpt")["global_step"] == step + 1
    monkeypatch.delenv("TOY_SIGNAL")
    # Another seed: neither weights nor dropout may come from it.
    assert_same(train(toy, tmp_path / "cut", seed=7, resume=True, **options), whole)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unit", ["max_epochs", "max_steps"])
def test_a_finished_run_can_be_continued(toy, tmp_path, unit):
    short, long = (1, 2) if unit == "max_epochs" else (7, 20)
    whole = train(toy, tmp_path / "whole", **{unit: long})
    train(toy, tmp_path / "cut", **{unit: short})
    assert_same(train(toy, tmp_path / "cut", seed=7, resume=True, **{unit: long}), whole)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_was_stopped_early_can_be_continued(toy, tmp_path):
    class Stop(Callback):  # as max_time does
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 14

    whole = train(toy, tmp_path / "whole")
    train(toy, tmp_path / "cut", callbacks=[Stop()])
    assert load_checkpoint(tmp_path / "cut" / "last.ckpt")["global_step"] == 14
    assert_same(train(toy, tmp_path / "cut", seed=7, resume=True), whole)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", [{}, {"val_check_interval": 5}], ids=["plain", "with-validation"])
def test_periodic_checkpoints_are_resumable(toy, tmp_path, monkeypatch, arguments):
    """The checkpoint that a crash leaves behind, here that of the 5th batch."""
    whole = train(toy, tmp_path / "whole", **arguments)
    saved = []

    def save(self, trainer, **options):
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)
            saved.append(trainer.global_step)

    monkeypatch.setattr(LastCheckpoint, "_between_batches", save)
    monkeypatch.setattr(LastCheckpoint, "on_train_end", lambda *_: None)
    train(toy, tmp_path / "crashed", **arguments)
    assert saved == [5]
    assert_same(train(toy, tmp_path / "crashed", seed=7, resume=True, **arguments), whole)


def test_every_validation_leaves_a_checkpoint_to_go_on_from(toy, tmp_path, monkeypatch):
    whole = train(toy, tmp_path / "whole", val_check_interval=5)
    save = LastCheckpoint._save

    def first(self, trainer):
        if not self.path.exists():
            save(self, trainer)

    monkeypatch.setattr(LastCheckpoint, "_save", first)  # as if it crashed before the next one
    train(toy, tmp_path / "crashed", val_check_interval=5)
    assert load_checkpoint(tmp_path / "crashed" / "last.ckpt")["global_step"] == 5
    monkeypatch.undo()
    assert_same(train(toy, tmp_path / "crashed", seed=7, resume=True, val_check_interval=5), whole)


@pytest.mark.parametrize("before", ["folder", "file", "nothing"])
def test_a_checkpoint_that_is_a_folder_is_replaced_when_it_is_whole(tmp_path, before):
    """As sharding strategies write them: in the first attempt it breaks off after half of its files."""
    last = LastCheckpoint(tmp_path)
    if before == "file":
        last.path.write_text("previous")
    elif before == "folder":
        last.path.mkdir()
        (last.path / "a").write_text("previous")

    def save(folder):
        folder.mkdir(exist_ok=True)
        (folder / "a").write_text("new")
        if not attempts:
            attempts.append(1)
            raise OSError("the disk is full")
        (folder / "b").write_text("new")

    attempts = []
    strategy = SimpleNamespace(barrier=lambda: None)
    trainer = SimpleNamespace(save_checkpoint=save, is_global_zero=True, strategy=strategy, global_step=1)
    with pytest.raises(OSError, match="full"):
        last._save(trainer)
    if before != "nothing":
        kept = last.path / "a" if before == "folder" else last.path
        assert kept.read_text() == "previous"
    last._save(trainer)
    assert {file.name: file.read_text() for file in last.path.iterdir()} == {"a": "new", "b": "new"}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_kill_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}}, path)

    child = os.fork()
    if child == 0:

        def half(checkpoint, file):
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(torch, "save", half)
        io.save_checkpoint({"state_dict": {"w": torch.zeros(3)}}, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load_checkpoint(path)["state_dict"]["w"].tolist() == [1, 1, 1]


def test_an_error_while_saving_leaves_nothing_else(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}}, path)
    with pytest.raises(Exception, match="pickle"):
        io.save_checkpoint({"state_dict": {}, "f": lambda: None}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert load_checkpoint(path)["state_dict"]["w"].tolist() == [1, 1, 1]


class Planted:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_planted_pickle_is_refused(tmp_path):
    path, target = tmp_path / "evil.ckpt", tmp_path / "was-here"
    torch.save({"state_dict": {}, "planted": Planted(target)}, path)
    for weights_only in (None, False, True):
        with pytest.raises(CheckpointError, match=r"evil\.ckpt: refused"):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the plant is a live one
    assert target.exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "missing", "tensor"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(300)}}, path)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:40] + bytes(200) + content[240:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "missing":
        path.unlink()
    else:
        torch.save(torch.ones(3), path)
    with pytest.raises(CheckpointError, match=r"last\.ckpt") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
