"""Training with Lightning, and the shipped configs against the paper's numbers."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer
from torch.nn import functional as F

import tenfold.hunyuan_moe
from tenfold.core.data.text import TextDataModule
from tenfold.core.training import fit
from tenfold.hunyuan_moe import HunyuanLarge, cache_bytes_per_token

CONFIGS = Path(tenfold.hunyuan_moe.__file__).parent / "configs"


def configured(name):
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        module = HunyuanLarge(**settings["model"]["init_args"])
        module.configure_model()
    return module, settings


def test_the_papers_config():
    module, settings = configured("paper")
    assert sum(p.numel() for p in module.lm.parameters()) == 388_698_128_640
    assert cache_bytes_per_token(module.lm.config) == 81_920
    h = module.hparams
    assert (h.expert_lr_ratio, h.anneal_share, h.min_lr_ratio) == (0.31, 0.05, 0.1)
    trainer, data = settings["trainer"], settings["data"]["init_args"]
    tokens = trainer["max_steps"] * trainer["devices"] * trainer["num_nodes"] * data["batch_size"] * data["length"]
    assert tokens == pytest.approx(7e12, rel=1e-5)


def test_the_tiny_configs_numbers():
    module, _ = configured("tiny")
    total = sum(p.numel() for p in module.lm.parameters())
    activated = tenfold.hunyuan_moe.count_parameters(module.lm.config).activated
    head = (CONFIGS / "tiny.yaml").read_text().splitlines()[0]
    assert f"{total / 1e6:.2f} M parameters, {activated / 1e6:.2f} M" in head


SIZES = {"vocab_size": 300, "layers": 2, "dim": 16, "heads": 2, "ffn": 8, "experts": 4, "max_length": 32}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Sixty short documents of numbers."""
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    texts = (" ".join(str(i * j % 97) for j in range(60)) for i in range(60))
    (tmp_path / "numbers.txt").write_text("\n\n".join(texts))
    return TextDataModule(str(tmp_path / "numbers.txt"), length=32, batch_size=4, vocab_size=300, val_fraction=0.1)


@pytest.mark.parametrize("routing", ["recycle", "drop", "dropless"])
def test_training(routing, data):
    module = HunyuanLarge(**SIZES, routing=routing, lr=1e-2, warmup_steps=1, kv_heads=1)
    metrics = fit(module, data, steps=4, seed=0, clip=1.0)
    assert 1 < metrics["val/bits_per_byte"] < 8
    assert (metrics["moe/recycled"] > 0) == (routing == "recycle")
    assert (metrics["moe/dropped"] > 0) == (routing == "drop")
    if routing == "dropless":
        assert metrics["moe/load_max"] > 1
    else:
        assert metrics["moe/load_max"] <= 1.0 + 1e-6 or routing == "drop"
    assert 0.9 < metrics["moe/balance"] < 4
    rates = [group["lr"] for group in module.optimizers().param_groups]
    assert rates[-1] == pytest.approx(0.31 * rates[0])
    assert rates[0] == pytest.approx(1e-3)  # after the last update


def test_the_balance_loss_evens_the_load(data):
    found = []
    for balance in (0.0, 10.0):
        options = {"routing": "dropless", "balance": balance, "init_std": 0.3, "lr": 2e-2, "warmup_steps": 0}
        found.append(fit(HunyuanLarge(**SIZES, **options), data, steps=20, seed=0, clip=1.0))
    without, balanced = found
    assert balanced["moe/balance"] < 1.2 < without["moe/balance"]
    assert balanced["moe/load_max"] < without["moe/load_max"]


def test_a_run_outlives_the_weights_it_began_with(data, tmp_path):
    weights = tmp_path / "weights"
    begin = HunyuanLarge(**SIZES, init_std=0.1)
    begin.configure_model()
    begin.lm.save_pretrained(weights)
    module = HunyuanLarge(**SIZES, lr=1e-2, warmup_steps=1, init_from=str(weights))
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"limit_val_batches": 0, "enable_checkpointing": False}
    trainer = Trainer(max_steps=2, **options)
    trainer.fit(module, data)
    assert F.cosine_similarity(*(m.lm.lm_head.weight.flatten() for m in (module, begin)), dim=0) > 0.9
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    shutil.move(weights, tmp_path / "elsewhere")
    again = HunyuanLarge.load_from_checkpoint(tmp_path / "run.ckpt")
    tokens = torch.arange(20)[None]
    assert torch.equal(again.eval()(tokens), module.eval()(tokens))
    resumed = HunyuanLarge(**module.hparams)
    Trainer(max_steps=3, **options).fit(resumed, data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert resumed.global_step == 3
    with pytest.raises(FileNotFoundError, match=r"init_from: there is no folder .*weights$"):
        Trainer(max_steps=1, **options).fit(HunyuanLarge(**module.hparams), data)


def test_shards_without_anything_that_shards(data):
    with pytest.raises(ValueError, match=r"shard_size: needs trainer\.strategy to be ModelParallelStrategy"):
        fit(HunyuanLarge(**SIZES, shard_size=1, warmup_steps=0), data, steps=1, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "^top_k: 9 is more than the 4 experts"),
        ({"experts": 0}, "^experts: must be at least 1, got 0"),
        ({"shared_experts": -1}, "^shared_experts: must not be negative, got -1"),
        ({"share_factor": 0}, "^share_factor: must be at least 1, got 0"),
        ({"heads": 16}, "^dim / heads: must be even, the rotation turns pairs; got 1"),
        ({"heads": 3}, "^heads: 3 do not divide dim 16"),
        ({"routing": "recylce"}, "^routing: must be one of 'recycle', 'drop', 'dropless', got 'recylce'"),
        ({"rope_alpha": -1.0}, "^rope_alpha: must be positive, got -1"),
        ({"shard_size": 0}, "^shard_size: must be positive, got 0"),
        ({"expert_lr_ratio": 0.0}, "^expert_lr_ratio: must be positive, got 0"),
        ({"kv_heads": 3}, "^kv_heads: 3 do not divide heads 2"),
        ({"capacity_factor": 0.5}, "^capacity_factor: must be at least 1"),
        ({"balance": -1.0}, "^balance: must not be negative, got -1"),
        ({"init_std": -1.0}, "^init_std: must be from 0 to 1, got -1"),
        ({"decay_ratio": 0.05}, "^decay_ratio: must be from min_lr_ratio 0.1 to 1, got 0.05"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HunyuanLarge(**SIZES | options)
