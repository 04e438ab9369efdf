"""The loader's order, the schedules, the guard against NaN, and the quiet training of experiments."""

import random
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Callback, LightningDataModule, LightningModule
from torch import nn
from transformers.optimization import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)

from tenfold.core.training import (
    NonFiniteError,
    ResumableDataLoader,
    fit,
    warmup_cosine,
    warmup_stable_decay,
)


def batches(loader, epochs=1):
    return [batch.tolist() for _ in range(epochs) for batch in loader]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    cut=st.integers(0, 30),
)
def test_loader_goes_on_where_its_state_says(rows, batch_size, seed, shuffle, drop_last, cut):
    options = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last}
    if drop_last and rows < batch_size:
        with pytest.raises(ValueError, match="batch_size"):
            ResumableDataLoader(range(rows), seed=seed, **options)
        return
    whole = batches(ResumableDataLoader(range(rows), seed=seed, **options), epochs=3)
    per_epoch = len(whole) // 3
    for epoch in range(3):  # each row once, but for a last smaller batch
        seen = [row for batch in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for row in batch]
        assert len(set(seen)) == len(seen) == (rows // batch_size * batch_size if drop_last else rows)

    cut = cut % len(whole)
    first = ResumableDataLoader(range(rows), seed=seed, **options)
    taken = []
    while len(taken) < cut:
        for batch in first:
            taken.append(batch.tolist())
            if len(taken) == cut:
                break
    second = ResumableDataLoader(range(rows), seed=seed + 1, **options)
    second.load_state_dict(first.state_dict())
    rest = []
    while len(taken) + len(rest) < len(whole):
        rest += batches(second)
    assert taken + rest == whole


def test_loader_order_depends_on_seed_and_epoch_alone():
    def orders(seed):
        torch.manual_seed(seed)  # which must not matter, and must not be drawn from
        state = torch.get_rng_state()
        loader = ResumableDataLoader(range(30), batch_size=30, seed=seed % 100)
        result = [tuple(batch) for batch in batches(loader, epochs=3)]
        assert torch.equal(torch.get_rng_state(), state)
        return result

    assert orders(1) == orders(101)
    assert len({order for seed in range(4) for order in orders(seed)}) == 12  # epochs of seeds never meet


def test_loader_in_worker_processes_gives_the_same_batches():
    loaders = [ResumableDataLoader(range(12), batch_size=3, seed=0, num_workers=n) for n in (0, 1)]
    states = []
    for loader in loaders:
        iterator = iter(loader)
        states.append(([next(iterator).tolist() for _ in range(2)], loader.state_dict()))
    assert states[0] == states[1]
    assert states[0][1] == {"seed": 0, "epoch": 0, "batch": 2, "rows": 12, "batch_rows": 3}  # given, not fetched ahead


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 50), ranks=st.integers(1, 4), epoch=st.integers(0, 3), drop_last=st.booleans())
def test_processes_share_the_order_of_one(rows, ranks, epoch, drop_last):
    def order(rank, ranks):
        with (
            patch("torch.distributed.is_initialized", return_value=True),
            patch("torch.distributed.get_world_size", return_value=ranks),
            patch("torch.distributed.get_rank", return_value=rank),
        ):
            share = ResumableDataLoader(range(rows), batch_size=1, seed=5, drop_last=drop_last)
        share.sampler.set_epoch(epoch)
        return [row for batch in batches(share) for row in batch]

    if drop_last and rows < ranks:
        return
    alone = order(0, 1)
    together = [row for step in zip(*(order(r, ranks) for r in range(ranks)), strict=True) for row in step]
    assert together[:rows] == alone[: len(together)]
    assert sorted(set(together)) == sorted(alone[: len(together)])


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("seed", -1)])
def test_loader_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        ResumableDataLoader(range(8), **({"batch_size": 2, "seed": 0} | {name: value}))


def rates(schedule, steps, lr=0.5, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    scheduler = schedule(optimizer, **options)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(values)


def test_warmup_cosine_is_transformers_after_the_warmup():
    ours = rates(warmup_cosine, 120, warmup_steps=10, total_steps=100, min_ratio=0.1)
    theirs = rates(
        get_cosine_with_min_lr_schedule_with_warmup,
        100,
        num_warmup_steps=10,
        num_training_steps=100,
        min_lr_rate=0.1,
    )
    np.testing.assert_allclose(ours[10:100], theirs[10:], rtol=1e-12)
    np.testing.assert_allclose(ours[:10], 0.5 * np.arange(1, 11) / 11)  # from the first update on, never 0
    np.testing.assert_allclose(ours[100:], 0.05)


def test_warmup_stable_decay_is_transformers_after_the_warmup():
    ours = rates(warmup_stable_decay, 110, warmup_steps=10, decay_steps=20, total_steps=100, min_ratio=0.2)
    theirs = rates(
        get_wsd_schedule,
        110,
        num_warmup_steps=10,
        num_decay_steps=20,
        num_training_steps=100,
        decay_type="linear",
        min_lr_ratio=0.2,
    )
    np.testing.assert_allclose(ours[10:], theirs[10:], rtol=1e-12)
    np.testing.assert_allclose(ours[:10], 0.5 * np.arange(1, 11) / 11)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (warmup_cosine, {"warmup_steps": -1, "total_steps": 5}),
        (warmup_cosine, {"warmup_steps": 1, "total_steps": 5, "min_ratio": 1.5}),
        (warmup_stable_decay, {"warmup_steps": 1, "decay_steps": -2, "total_steps": 5}),
    ],
)
def test_schedules_refuse(schedule, options):
    with pytest.raises(ValueError, match=r"warmup_steps|min_ratio|decay_steps"):
        rates(schedule, 1, **options)


class Line(LightningModule):
    """Learns y = 2x; spoils the loss or the gradient of one step if told to."""

    def __init__(self, spoil=None, at=-1):
        super().__init__()
        self.spoil, self.at = spoil, at
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, index):
        loss = (self.weight * batch - 2 * batch).square().mean()
        if self.global_step == self.at:
            if self.spoil == "loss":
                loss = loss + float("inf")
            else:  # a finite loss whose gradient is not: the slope of √ at 0
                loss = loss + (self.weight - self.weight.detach()).abs().sqrt().sum()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", (self.weight * batch - 2 * batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Points(LightningDataModule):
    rows = torch.linspace(-1, 1, 12)

    def train_dataloader(self):
        return ResumableDataLoader(self.rows, batch_size=4, seed=0)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.rows, batch_size=12)


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_nan_stops_before_the_update(spoil):
    module, good = Line(spoil, at=4), Line()
    fit(good, Points(), steps=4, seed=0)
    with pytest.raises(NonFiniteError, match=rf"step 4, epoch 1, batch 1: .*{spoil}"):
        fit(module, Points(), steps=9, seed=0)
    assert module.weight.item() == good.weight.item() != 0


def test_fit_returns_what_the_module_measured_after_the_last_step():
    class Count(Callback):
        validations = steps = 0

        def on_train_batch_end(self, *_):
            self.steps += 1

        def on_validation_end(self, *_):
            self.validations += 1

    module, count = Line(), Count()
    metrics = fit(module, Points(), steps=17, seed=0, callbacks=[count])
    assert (count.steps, count.validations) == (17, 1)
    expected = ((module.weight - 2) * Points.rows).square().mean().item()
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert {"train/loss", "grad_norm"} <= metrics.keys()


def test_fit_clips_the_gradient():
    module = Line()
    fit(module, Points(), steps=1, seed=0, clip=1e-3)
    assert module.weight.item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_fit_is_deterministic_and_leaves_the_random_states_alone(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Noisy(Line):
        def training_step(self, batch, index):
            noise = torch.rand(1) + np.random.rand() + random.random()
            return super().training_step(batch, index) * noise

    def weight(seed):
        module = Noisy()
        fit(module, Points(), steps=5, seed=seed)
        return module.weight.item()

    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert weight(0) == weight(0) != weight(1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_fit_can_be_interrupted():
    class Interrupt(Callback):
        def on_train_batch_end(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # which Lightning turns into exit status 1
        fit(Line(), Points(), steps=3, seed=0, callbacks=[Interrupt()])


def test_fit_refuses_no_steps():
    with pytest.raises(ValueError, match="steps: must be at least 1, got 0"):
        fit(Line(), Points(), steps=0, seed=0)
