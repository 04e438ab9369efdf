"""The Lightning module, the shipped configs, and the trainings behind the claims."""

from pathlib import Path

import pytest
import torch
import yaml

import tenfold.clla
from tenfold.clla import CLLAModule, bytes_per_token
from tenfold.clla.formats import Format
from tenfold.clla.ladder import RUNGS, count_parameters, rung
from tenfold.clla.reproduction.decoding import contenders, decode_step_seconds, floors, slope, work_per_key
from tenfold.clla.reproduction.experiments import ARMS, SIZES, cache_storage, language_model, measured_bytes, normal_snr
from tenfold.core.data.text import TextDataModule
from tenfold.core.training import fit

CONFIGS = Path(tenfold.clla.__file__).parent / "configs"
TOY = {"layers": 3, "dim": 16, "heads": 2, "ffn": 24, "latent_dim": 8, "rope_dim": 4}


def settings(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]


def test_the_papers_model():
    """Latent 512, pairs, 4 bits; our width of 2048, 24 layers, 16 heads of 128, and the parameters of its MHA."""
    config = CLLAModule(**settings("paper")).config()
    assert (config.latent_dim, config.cache_producers[:4], config.cache_bits) == (512, [0, 0, 2, 2], 4)
    producer = 2048 * (512 + 64) + 512
    every = 2048 * 16 * (128 + 64) + 2 * 512 * 2048 + 2048 * 2048
    layers = 12 * producer + 24 * (every + 3 * 2048 * config.intermediate_size + 2 * 2048)
    assert count_parameters(config) == 2 * 32_000 * 2048 + layers + 2048 == 1_345_478_656
    header = (CONFIGS / "paper.yaml").read_text()
    assert "1,345,478,656" in header
    assert "full text was not" in header


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_every_rung_has_the_parameters_of_mha(name):
    counts = {r: count_parameters(CLLAModule(**settings(name) | {"rung": r}).config()) for r in RUNGS}
    for count in counts.values():
        assert count == pytest.approx(counts["MHA"], rel=0.002)


def test_arms_have_equal_parameters():
    shape = dict(SIZES["0.42M"])
    shape.pop("batch")
    counts = [
        count_parameters(CLLAModule(**{**shape, **arm}, vocab_size=1024, equal_parameters=True).config())
        for arm in ARMS.values()
    ]
    assert max(counts) <= 1.002 * min(counts)


def test_a_training_sees_the_bits_from_the_update_it_is_told():
    seen = []

    class Watching(CLLAModule):
        def training_step(self, batch, index):
            seen.append((self.lm.config.cache_bits, self.lm.config.rope_bits))
            return super().training_step(batch, index)

    data = TextDataModule(length=128, batch_size=64, vocab_size=1024)
    module = Watching(vocab_size=1024, max_length=128, **TOY, quantize_from=2, warmup_steps=1)
    metrics = fit(module, data, steps=4, seed=0)
    assert seen == [(16, 16), (16, 16), (4, None), (4, None)]
    assert 2 < metrics["val/bits_per_byte"] < 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rung": "MHLA"}, "rung: must be one of MHA, GQA, MQA, CLA, MLA, CLLA, got 'MHLA'"),
        ({"cache_bits": 2}, "cache_bits: must be one of 4, 8, 16, got 2"),
        ({"cache_code": "int"}, "cache_code: must be one of 'symmetric', 'asymmetric', 'float', got 'int'"),
        ({"cache_scales": "channel", "quantizer": "before_norm"}, "cache_scales: 'channel' does not go with quantizer"),
        ({"heads": 3}, "heads: 3 do not divide dim 16"),
        ({"heads": 0}, "^heads: must be at least 1, got 0"),
        ({"ffn": 0}, "^ffn: must be at least 1, got 0"),
        ({"vocab_size": 0}, "^vocab_size: must be at least 1, got 0"),
        ({"layers": 0}, "^layers: must be at least 1, got 0"),
        ({"max_length": 0}, "^max_length: must be at least 1, got 0"),
        ({"kv_heads": 0, "rung": "GQA"}, "^kv_heads: must be positive and divide heads 2, got 0"),
        ({"kv_heads": -2, "rung": "CLA"}, "^kv_heads: must be positive and divide heads 2, got -2"),
        ({"dim": "wide"}, "Field 'dim' expected int, got str"),
        ({"quantize_from": -1}, "quantize_from: must not be negative, got -1"),
        ({"equal_parameters": True, "latent_dim": 5000}, "reference: too small"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        CLLAModule(**{"vocab_size": 64, **TOY, **changes})


@pytest.mark.parametrize("arm", ["CLLA", "CLLA-quant", "MHA"])
def test_a_measurement(monkeypatch, arm):
    monkeypatch.setitem(SIZES, "toy", {**TOY, "batch": 64})
    result = language_model(size="toy", arm=arm, steps=2, lr=1e-3, seed=0)
    assert 2 < result["bits_per_byte"] < 5
    assert ("bits_per_byte_rounded" in result) == (arm != "CLLA-quant")
    assert result["cache_bytes"] == {"CLLA": 2 * 2 * 12, "CLLA-quant": 2 * (4 + 2 + 2 + 2), "MHA": 3 * 4 * 16}[arm]
    if arm != "MHA":
        assert all(10 < snr < 40 for snr in result["latent_snr"])
        assert len(result["latent_snr"]) == 2


@pytest.mark.parametrize(
    "changes", [{"cache_code": "float", "rope_bits": 8}, {"cache_code": "asymmetric"}, {"cache_scales": "channel"}]
)
def test_a_training_with_other_codes(changes):
    data = TextDataModule(length=128, batch_size=64, vocab_size=1024)
    module = CLLAModule(vocab_size=1024, max_length=128, **TOY, warmup_steps=1, lr=1e-2, **changes)
    assert 2 < fit(module, data, steps=3, seed=0)["val/bits_per_byte"] < 8
    steps = [p for name, p in module.lm.named_parameters() if name.endswith("latent_steps")]
    assert len(steps) == (2 if "cache_scales" in changes else 0)
    assert all(p.std() > 0 for p in steps)  # they began alike
    undecayed = module.configure_optimizers()["optimizer"].param_groups[1]
    assert all(any(p is q for q in undecayed["params"]) for p in steps)


def test_a_diverged_training_is_told_and_not_scored(monkeypatch):
    monkeypatch.setitem(SIZES, "toy", {**TOY, "batch": 64})
    assert language_model(size="toy", arm="CLLA", steps=5, lr=1e30, seed=0) == {"bits_per_byte": None}


def test_signal_to_noise_of_normal_vectors():
    """Absmax rounding to 4 bits: the sheet's values for groups of 32 to 512."""
    for group, expected in ((32, 20.26), (64, 19.36), (128, 18.61), (256, 17.97), (512, 17.42)):
        assert normal_snr(Format(1, 512, 4, group)) == pytest.approx(expected, abs=0.05)


def test_storage_of_the_papers_latent():
    result = cache_storage(tokens=1000, seed=0)
    assert result["mha_bytes"] == 8192
    assert result["without_slack"] == pytest.approx(1.8188, abs=1e-4)
    assert 1.82 < result["share"] < 2


@torch.no_grad()
def test_the_contenders_decode_and_floors_are_counted(sizes):
    base = tenfold.clla.CLLAConfig(**{**sizes, "num_hidden_layers": 2})
    logits = {name: make(20)().shape for name, make in contenders(base, seed=0).items()}
    assert set(logits.values()) == {(1, 1, 97)}
    seconds = decode_step_seconds(base, [8, 16], rounds=2, seed=0)
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    assert slope([1, 2, 3], [5.0, 7.0, 9.0]) == pytest.approx(2.0)

    read, operations = work_per_key(rung(base, "MHA", cache_bits=16))
    assert (read, operations) == (2 * 4 * 32, 2 * 4 * 32)
    read, operations = work_per_key(base)  # both layers read the one cache
    assert read == 2 * bytes_per_token(base) == 2 * measured_bytes(base, 64)
    assert operations == 2 * 4 * (2 * (24 + 6) + 2 * 24)
    assert all(value > 0 for value in floors(base).values())
