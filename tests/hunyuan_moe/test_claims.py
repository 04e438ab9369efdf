"""The measurements behind the claims, and what the command answers to mistakes."""

import math
from pathlib import Path
from typing import ClassVar

import pytest

from tenfold.core.claims import TUNING_SEED, Run
from tenfold.core.cli import main
from tenfold.hunyuan_moe.method import METHOD
from tenfold.hunyuan_moe.reproduction.experiments import LENGTH, SIZES, isoflop_run, language_model, papers_cache

TABLE_2 = {"MHA": 1_638_400, "GQA": 163_840, "MQA": 20_480, "CLA": 819_200, "GQA+CLA": 81_920}  # bytes per token


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SIZES, "toy", {"layers": 2, "dim": 16, "heads": 4, "ffn": 8, "experts": 4, "batch": 2})


def test_a_measurement(toy):
    found = {arm: language_model(size="toy", arm=arm, steps=2, lr=1e-3, seed=0) for arm in ("recycle", "drop", "MHA")}
    assert all(2 < m["bits_per_byte"] < 5 for m in found.values())
    assert found["recycle"]["dropped"] == found["drop"]["recycled"] == 0
    assert found["recycle"]["recycled"] > 0 < found["drop"]["dropped"]
    assert found["recycle"]["parameters"] == found["drop"]["parameters"] < found["MHA"]["parameters"]
    assert found["recycle"]["cache_bytes"] == 2 * 1 * 4 * 2  # keys and values of one head of four, once
    assert found["MHA"]["cache_bytes"] == 8 * found["recycle"]["cache_bytes"]


def test_a_diverged_training_is_told_and_not_scored(toy):
    assert language_model(size="toy", arm="drop", steps=5, lr=1e30, seed=0) == {"bits_per_byte": None}
    assert isoflop_run(dim=8, compute=2e8, lr=1e30, seed=0)["loss"] is None


def test_measuring_the_noise_changes_no_training(toy, monkeypatch):
    monkeypatch.setattr("tenfold.hunyuan_moe.reproduction.experiments._NoiseLog.WINDOWS", 32)
    settings = {"size": "toy", "arm": "uniform rate", "steps": 4, "lr": 1e-3, "seed": 0}
    found = language_model(**settings, noise=True)
    assert language_model(**settings).items() <= found.items()
    assert all(found[f"noise_{moment}"] > found[f"gradient_{moment}"] > 0 for moment in ("middle", "end"))


def test_an_isoflop_run_costs_what_was_asked():
    run = isoflop_run(dim=16, compute=2e8, lr=1e-3, seed=0)
    tokens, update = run["tokens"], 4 * LENGTH
    assert tokens % update == 0
    assert run["compute"] == pytest.approx(2e8, rel=0.5 * update / tokens)
    assert run["with_embedding"] - run["params"] == 512 * 16
    # All but the context and the norms: 6·N·D.
    context, norms = 12 * 2 * 16 * LENGTH, 2 * 2 * 16 + 16 + 2 * 2 * 8
    assert run["compute"] == (6 * (run["params"] - norms) + context) * tokens
    assert 3 < run["loss"] < 5


def test_the_papers_table_2():
    assert papers_cache(tokens=5, seed=0) == TABLE_2


def made_up(fn, *, seed, arm=None, lr=0.0, dim=0, compute=0.0, noise=False, **_):
    if fn is papers_cache:
        return TABLE_2
    if fn is isoflop_run:  # the best N is 0.011·√C
        params = 100 * dim
        distance = math.log(params / (0.011 * math.sqrt(compute)))
        loss = 3 - 0.1 * math.log10(compute) + 0.1 * distance**2 + 0.001 * (seed % 3)
        tokens = compute / (6 * params)
        return {"params": params, "with_embedding": 2 * params, "tokens": tokens, "compute": compute, "loss": loss}
    assert lr < 1
    loss = {"recycle": 2.5, "drop": 2.6, "dropless": 2.49, "uniform rate": 2.5, "MHA": 2.4, "cosine": 2.51}
    lost = 0.1 * (arm == "drop")
    found = {"recycled": 0.2 - lost, "dropped": lost, "load_max": 1.0, "cache_bytes": 96.0, "parameters": 1}
    if noise:
        found |= {f"{what}_{at}": x for what, x in (("gradient", 1.0), ("noise", 16.0)) for at in ("middle", "end")}
    # The first step outside the given rates is best.
    return found | {"bits_per_byte": loss.get(arm, 2.52) + 0.001 * (seed % 3) + abs(lr - 4e-3)}


class MadeUp(Run):
    """Measurements that were never made, and the seeds that they were asked for."""

    asked: ClassVar[set[int]] = set()

    def measure(self, key, fn, /, **settings):
        self.asked.add(settings["seed"])
        return made_up(fn, **settings)


def test_claims_from_made_up_measurements(tmp_path):
    run = MadeUp("tenfold.hunyuan_moe", tmp_path, budget="full")
    found = {c.name: c for f in METHOD.claims for c in f(run)}
    assert {name: claim.verdict for name, claim in found.items()} == {
        "recycle-beats-drop": "holds",
        "recycle-drops-nothing": "holds",
        "recycle-reaches-dropless": "holds",
        "expert-learning-rate": "does not hold",
        "cache-5-percent": "holds",
        "small-cache-loss": "does not hold",
        "three-phase-schedule": "holds",
        "isoflop-params": "holds",
        "isoflop-tokens": "holds",
    }
    assert found["recycle-beats-drop"].table[0]["learning rate"] == 4e-3
    assert found["isoflop-params"].interval.mean == pytest.approx(0.5)
    assert "; 0 of their" in found["isoflop-params"].notes
    # 8 sequences are half of the noise batch of 16: √8·1.5/8.5.
    assert "a ratio of 0.50 and 0.50" in found["expert-learning-rate"].notes
    assert len(found["expert-learning-rate"].table) == 5
    assert run.asked == {TUNING_SEED, 10, 11, 12}


def test_the_plans_at_lower_budgets(tmp_path):
    """A quick run trains only what shows something in so few updates."""
    names = {
        budget: {c.name for f in METHOD.claims for c in f(MadeUp("tenfold.hunyuan_moe", tmp_path, budget=budget))}
        for budget in ("quick", "default")
    }
    assert names["default"] - names["quick"] == {"small-cache-loss", "isoflop-params", "isoflop-tokens"}
    assert "three-phase-schedule" not in names["default"]


MISTAKES = {
    "tiny --model.top_k 9": "top_k: 9 is more than the 8 experts",
    "tiny --model.capacity_factor 0": "capacity_factor: must be at least 1",
    "tiny --model.routing recylce": "recylce",
    "tiny --model.kv_heads 3": "kv_heads: 3 do not divide heads 4",
    "tiny --model.anneal_share 1": "anneal_share: must be between 0 and 1, got 1.0",
    "tiny --model.decay_ratio 0.05": "decay_ratio: must be from min_lr_ratio 0.1 to 1, got 0.05",
    "tiny --model.expert_lr_ratio 0": "expert_lr_ratio: must be positive, got 0",
    "tiny --data.length 4096": "data.length: 4096 is more than the model's max_length, 128",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes(line, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "hunyuan-moe", "--config", *line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tenfold: ")
    assert captured.err.count("\n") == 1
    assert MISTAKES[line] in captured.err
    assert not list(Path().iterdir())
