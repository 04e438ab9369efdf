"""Cogformer and the shipped configs, against the paper's counts."""

from pathlib import Path

import pytest
import torch
import yaml

import tenfold.cog_attention
from tenfold.cog_attention import Cogformer, UViCModule
from tenfold.cog_attention.reproduction.experiments import ARMS, SIZES, diffusion_model, language_model

CONFIGS = Path(tenfold.cog_attention.__file__).parent / "configs"


def configured(name):
    model = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    kind = {"Cogformer": Cogformer, "UViCModule": UViCModule}[model["class_path"].rsplit(".", 1)[1]]
    with torch.device("meta"):
        module = kind(**model["init_args"])
        if kind is Cogformer:
            module.configure_model()
    return module


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_papers_language_model():
    """Embedding and head 32,000 · 768 each, 12 layers of 4 · 768² + 3 · 768 · 2304 + 2 · 768, a norm of 768."""
    module = configured("paper")
    assert count(module) == 2 * 32_000 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2304 + 2 * 768) + 768 == 141_183_744
    assert module.lm.config.cog_softmax_layers == [0, 11]
    assert module.lm.config._attn_implementation == "cog"


@pytest.mark.parametrize(("name", "parameters"), [("paper-uvic-cifar10", 44_255_328), ("paper-uvic-coco", 44_692_644)])
def test_the_papers_diffusion_models(name, parameters):
    assert count(configured(name)) == parameters


def test_arms_start_from_the_same_weights():
    models = {}
    for arm, settings in ARMS.items():
        torch.manual_seed(3)
        module = Cogformer(vocab_size=64, layers=3, dim=16, heads=2, ffn=24, **settings)
        module.configure_model()
        models[arm] = module.lm
    softmax = models["softmax"].state_dict()
    for arm in ("Cog", "Cog in every layer"):
        assert models[arm].state_dict().keys() == softmax.keys()
        assert all(torch.equal(w, softmax[name]) for name, w in models[arm].state_dict().items())
    assert models["Cog"].config.cog_softmax_layers == [0, 2]
    assert models["Cog in every layer"].config.cog_softmax_layers == []
    extra = sum(p.numel() for p in models["differential"].parameters()) - sum(w.numel() for w in softmax.values())
    assert extra == 3 * 4 * 8  # four vectors of the head dimension a layer


def test_the_baseline_is_transformers_own_llama():
    module = Cogformer(vocab_size=64, layers=2, dim=16, heads=2, ffn=24, attention="softmax")
    module.configure_model()
    assert module.lm.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="attention: must be 'cog', 'softmax' or 'differential', got 'sofmax'"):
        Cogformer(vocab_size=64, attention="sofmax")


def test_a_language_model_measurement(monkeypatch):
    monkeypatch.setitem(SIZES, "toy", {"layers": 3, "dim": 16, "heads": 2, "ffn": 24, "batch": 2})
    result = language_model(size="toy", arm="Cog", steps=2, lr=1e-3, seed=0)
    assert 2 < result["bits_per_byte"] < 5
    assert result["negative"][0] == result["negative"][2] == 0 < result["negative"][1]
    assert all(gap > 0 for gaps in result["gaps"].values() for gap in gaps)
    assert result == language_model(size="toy", arm="Cog", steps=2, lr=1e-3, seed=0)


def test_a_diverged_training_is_told_and_not_scored(monkeypatch):
    monkeypatch.setitem(SIZES, "toy", {"layers": 3, "dim": 16, "heads": 2, "ffn": 24, "batch": 2})
    assert language_model(size="toy", arm="softmax", steps=5, lr=1e30, seed=0) == {"bits_per_byte": None}


def test_a_diffusion_measurement():
    result = diffusion_model(attention="cog", steps=2, lr=1e-3, seed=0, samples=2)
    assert 0.5 < result["loss"] < 2
    assert len(result["images"]) == 2
    assert min(min(row) for image in result["images"] for row in image) >= 0
