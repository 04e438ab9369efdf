"""The measurements behind the claims, and what the command answers to mistakes."""

from pathlib import Path

import pytest

from tenfold.core.claims import Run
from tenfold.core.cli import main
from tenfold.hunyuan_moe import claims
from tenfold.hunyuan_moe.experiments import SIZES, language_model, papers_cache

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


def test_the_papers_table_2():
    assert papers_cache(tokens=5, seed=0) == TABLE_2


def test_claims_from_made_up_measurements(monkeypatch, tmp_path):
    def made_up(*, arm, seed, lr, **_):
        loss = {"recycle": 2.5, "drop": 2.6, "dropless": 2.49, "uniform rate": 2.5, "MHA": 2.4}[arm]
        # The first step outside the given rates is best.
        lost = 0.1 * (arm == "drop")
        noise = 0.001 * (seed % 3) + abs(lr - 4e-3)
        return {
            "bits_per_byte": loss + noise,
            "recycled": 0.2 - lost,
            "dropped": lost,
            "load_max": 1.0,
            "cache_bytes": 96.0,
            "parameters": 1,
        }

    class Made(Run):
        def measure(self, key, fn, /, **settings):
            return made_up(**settings) if fn is language_model else TABLE_2

    run = Made("tenfold.hunyuan_moe", tmp_path)
    found = {c.name: c for f in (claims.recycle_routing, claims.expert_learning_rate, claims.cache) for c in f(run)}
    verdicts = {name: claim.verdict for name, claim in found.items()}
    assert verdicts == {
        "recycle-beats-drop": "holds",
        "recycle-drops-nothing": "holds",
        "recycle-reaches-dropless": "holds",
        "expert-learning-rate": "does not hold",
        "cache-5-percent": "holds",
        "small-cache-loss": "does not hold",
    }
    assert found["recycle-beats-drop"].table[0]["learning rate"] == 4e-3


MISTAKES = {
    "tiny --model.top_k 9": "moe_topk: 9 is more than the 8 experts",
    "tiny --model.capacity_factor 0": "capacity_factor: must be at least 1",
    "tiny --model.routing recylce": "recylce",
    "tiny --model.kv_heads 3": "kv_heads: 3 do not divide heads 4",
    "tiny --model.anneal_share 1": "anneal_share: must be between 0 and 1, got 1.0",
    "tiny --model.decay_ratio 0.05": "decay_ratio: must be from min_ratio 0.1 to 1, got 0.05",
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
