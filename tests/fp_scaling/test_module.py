"""The Lightning module, and the shipped configs against the paper's counts."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import tenfold.fp_scaling
from tenfold.core.cli import main
from tenfold.core.training import load_checkpoint
from tenfold.fp_scaling import QuantizedLM, QuantLinear, QuantRecipe
from tenfold.fp_scaling.module import count_params

CONFIGS = Path(tenfold.fp_scaling.__file__).parent / "configs"
LADDER = {  # table 3 of the paper
    "paper-41M": 40_894_464,
    "paper-85M": 84_934_656,
    "paper-154M": 154_140_672,
    "paper": 679_477_248,
    "paper-1.2B": 1_233_125_376,
    "paper-7B": 7_083_130_880,
    "paper-70B": 71_236_059_136,
}
TINY = {"vocab_size": 300, "layers": 2, "dim": 32, "heads": 2, "ffn": 64, "max_length": 32, "block_size": 16}


def built(**arguments):
    torch.manual_seed(0)
    module = QuantizedLM(**TINY | arguments)
    module.configure_model()
    return module


def test_every_config_is_tested():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == {"tiny", *LADDER}


@pytest.mark.parametrize("name", LADDER)
def test_the_papers_models(name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        module = QuantizedLM(**config["model"]["init_args"])
        module.configure_model()
    h = module.hparams
    assert count_params(module.lm) == h.layers * (4 * h.dim**2 + 3 * h.dim * h.ffn) == LADDER[name]
    norms = (2 * h.layers + 1) * h.dim
    assert sum(p.numel() for p in module.parameters()) == LADDER[name] + 2 * h.vocab_size * h.dim + norms
    assert sum(isinstance(m, QuantLinear) for m in module.modules()) == 7 * h.layers
    assert module.recipe.targets == ("P2", "P4", "P6")
    assert module.recipe.rounding == "away"
    assert (h.lr, h.min_lr_ratio, h.warmup_steps, h.weight_decay, tuple(h.betas)) == (3e-4, 0, 500, 0.1, (0.9, 0.95))
    trainer, data = config["trainer"], config["data"]["init_args"]
    windows = data["batch_size"] * trainer["devices"] * trainer.get("num_nodes", 1) * trainer["accumulate_grad_batches"]
    assert windows * data["length"] == 2**21  # tokens of a batch
    assert trainer["max_steps"] * 2**21 in (20_971_520_000, 104_857_600_000)
    assert trainer["gradient_clip_val"] == 1.0


def test_formats_start_from_the_same_weights_and_nothing_quantized_is_a_plain_llama():
    tokens = torch.randint(300, (2, 17))
    modules = {fmt: built(fmt=fmt) for fmt in (None, "e4m3", "e1m1")}
    plain = modules[None]
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    for module in modules.values():
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    losses = {fmt: -module(tokens).mean().item() for fmt, module in modules.items()}
    assert abs(losses["e4m3"] - losses[None]) < abs(losses["e1m1"] - losses[None]) < 0.1
    options = {"targets": ("P1", "P5"), "scale": "tensor", "block_axis": "last", "rounding": "away"}
    assert built(fmt="e1m1", **options).recipe == QuantRecipe("e1m1", block_size=16, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fmt": "e9m9"}, "e9m9|exponent"),
        ({"block_size": 24}, "block_size: 24 does not divide the 32 features of the model"),
        ({"targets": ("P0",)}, "targets: unknown value 'P0'"),
    ],
)
def test_what_cannot_be_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizedLM(**TINY | arguments)


TEXT = "\n\n".join(f"The {n}th document says that {n} times {n} is {n * n}." for n in range(400))


def test_fit_on_the_command_line(tmp_path, monkeypatch, capsys):
    """With a format from the command line; a resumed run ends with the bits of an uninterrupted one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    data = ["--data.path", "text.txt", "--data.val_fraction", "0.1", "--data.length", "16", "--data.vocab_size", "300"]
    model = ["--model.vocab_size", "300", "--model.layers", "1", "--model.fmt", "e3m2"]
    fit = ["fit", "fp-scaling", "--config", "tiny", *data, *model, "--trainer.val_check_interval", "2"]
    assert main([*fit, "--trainer.max_steps", "4"]) == 0
    assert "val/loss" in capsys.readouterr().out
    state = load_checkpoint("runs/fp-scaling/tiny/checkpoints/last.ckpt")
    assert state["hyper_parameters"]["fmt"] == "e3m2"
    assert not [name for name in state["state_dict"] if "recipe" in name]
    assert main([*fit, "--model.fmt", "e3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
