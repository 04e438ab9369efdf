"""Interrupted training goes on to the same bits, whatever interrupts it."""

import itertools
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


class Batches(Callback):
    """Notes the first number of each batch, and of the run's CSV file what is asked for."""

    def __init__(self):
        self.seen, self.epochs = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, index):
        self.seen.append(batch[0, 0].item())

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(trainer.current_epoch)


BY_STEPS = {"max_epochs": -1, "max_steps": 34}
EVERY = {"check_val_every_n_epoch": None}
BOUNDARIES = {  # of epochs of 10 batches, in which a signal comes with the last one of the first, second or third
    "steps": BY_STEPS,
    "epochs": {"max_epochs": 4},
    "validation-on-it": BY_STEPS | EVERY | {"val_check_interval": 10},
    "validation-off-it": BY_STEPS | EVERY | {"val_check_interval": 7},
    "validation-on-every-other": BY_STEPS | EVERY | {"val_check_interval": 20},
    "validation-within": BY_STEPS | {"val_check_interval": 5},
    "no-validation": BY_STEPS | {"limit_val_batches": 0},
    "accumulating": BY_STEPS | {"accumulate_grad_batches": 4, "max_steps": 10},
    "accumulating-validation": BY_STEPS
    | EVERY
    | {"accumulate_grad_batches": 4, "max_steps": 10, "val_check_interval": 7},
    "limited": BY_STEPS | {"limit_train_batches": 7},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("arguments", BOUNDARIES.values(), ids=BOUNDARIES)
def test_a_signal_in_the_last_batch_of_an_epoch(toy, tmp_path, arguments, epoch):
    whole = Batches()
    expected = train(toy, tmp_path / "whole", callbacks=[whole], **arguments)
    length = arguments.get("limit_train_batches", 10)

    class Signal(Batches):
        def on_train_batch_end(self, trainer, *_):
            if len(self.seen) == (epoch + 1) * length:
                signal.raise_signal(signal.SIGTERM)

    first, second = Signal(), Batches()
    assert train(toy, tmp_path / "cut", callbacks=[first], **arguments) is None
    assert len(first.seen) == (epoch + 1) * length
    found = train(toy, tmp_path / "cut", seed=7, resume=True, callbacks=[second], **arguments)
    assert first.seen + second.seen == whole.seen
    assert first.epochs + second.epochs == whole.epochs
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", BOUNDARIES.values(), ids=BOUNDARIES)
def test_a_crash_after_the_last_batch_of_an_epoch(toy, tmp_path, monkeypatch, arguments):
    """From the checkpoint that was written there because its time had come."""
    whole = Batches()
    expected = train(toy, tmp_path / "whole", callbacks=[whole], **arguments)
    length = arguments.get("limit_train_batches", 10)
    monkeypatch.setattr("tenfold.core.training.callbacks.time.monotonic", clock := itertools.count(0, 1e6).__next__)
    save = LastCheckpoint._save

    def once(self, trainer):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 2 * length:
            save(self, trainer)

    monkeypatch.setattr(LastCheckpoint, "_save", once)
    train(toy, tmp_path / "crashed", **arguments)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(TOY)
    assert clock() > 0
    second = Batches()
    found = train(toy, tmp_path / "crashed", seed=7, resume=True, callbacks=[second], **arguments)
    assert whole.seen[2 * length :] == second.seen
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("unit", "short", "long"),
    [("max_epochs", 1, 2), ("max_epochs", 2, 4), ("max_steps", 7, 20), ("max_steps", 10, 34), ("max_steps", 20, 34)],
)
@pytest.mark.parametrize("validation", [{}, EVERY | {"val_check_interval": 10}, EVERY | {"val_check_interval": 7}])
def test_a_finished_run_can_be_continued(toy, tmp_path, unit, short, long, validation):
    arguments = validation | ({"max_epochs": -1} if unit == "max_steps" else {})
    whole, first, second = Batches(), Batches(), Batches()
    expected = train(toy, tmp_path / "whole", callbacks=[whole], **arguments | {unit: long})
    train(toy, tmp_path / "cut", callbacks=[first], **arguments | {unit: short})
    found = train(toy, tmp_path / "cut", seed=7, resume=True, callbacks=[second], **arguments | {unit: long})
    assert first.seen + second.seen == whole.seen
    assert_same(found, expected)


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
