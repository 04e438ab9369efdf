"""Bytes per token against the numbers of the paper's method sheet, and the command that shows them."""

import pytest
from transformers import LlamaConfig

from tenfold.clla import CLLAConfig, bytes_per_token, rung
from tenfold.clla.budget import ladder_costs
from tenfold.clla.ladder import RUNGS
from tenfold.clla.verbs import load_config
from tenfold.core.cli import main

# Width: MLA and CLLA in bfloat16, all in 4 bits, the rotary key in bfloat16, no rotary key (all without scales), and
# all in 4 bits with a float16 scale per 128; % of MHA, for pairs of layers, a latent of 512 and a rotary key of 64.
SHARES = {
    1536: (18.75, 9.38, 2.34, 3.12, 2.08, 2.43),
    1728: (16.67, 8.33, 2.08, 2.78, 1.85, 2.16),
    2048: (14.06, 7.03, 1.76, 2.34, 1.56, 1.82),
    2304: (12.50, 6.25, 1.56, 2.08, 1.39, 1.62),
    2560: (11.25, 5.62, 1.41, 1.88, 1.25, 1.46),
    4096: (7.03, 3.52, 0.88, 1.17, 0.78, 0.91),
}


def base(width, **changes):
    return CLLAConfig(hidden_size=width, num_attention_heads=width // 64, num_hidden_layers=12, **changes)


@pytest.mark.parametrize("width", SHARES)
def test_shares_of_mha(width):
    mha = bytes_per_token(rung(base(width), "MHA", cache_bits=16))
    assert mha == 4 * width * 12
    sizes = (
        bytes_per_token(rung(base(width), "MLA", cache_bits=16)),
        bytes_per_token(base(width, cache_bits=16)),
        bytes_per_token(base(width), scales=False),
        bytes_per_token(base(width, rope_bits=16), scales=False),
        bytes_per_token(base(width, rope_key="none"), scales=False),
        bytes_per_token(base(width)),
    )
    assert [100 * size / mha for size in sizes] == pytest.approx(SHARES[width], abs=0.00501)


def test_the_headline():
    mha = bytes_per_token(rung(base(2048), "MHA", cache_bits=16))
    assert bytes_per_token(base(2048), scales=False) / mha == 0.017578125
    assert mha / bytes_per_token(base(2048), scales=False) == pytest.approx(56.89, abs=0.005)
    assert bytes_per_token(base(2048)) / mha == pytest.approx(0.0182, abs=0.00005)


def test_what_the_other_codes_cost():
    """With steps per channel only the rotary key keeps a scale: 1.77 %, and the headline's 1.7578 % without it."""
    mha = bytes_per_token(rung(base(2048), "MHA", cache_bits=16))
    shares = [
        100 * bytes_per_token(base(2048, **changes)) / mha
        for changes in (
            {"cache_scales": "channel"},
            {"cache_scales": "channel", "rope_key": "none"},
            {"cache_code": "float"},
            {"cache_code": "asymmetric"},
            {"cache_code": "float", "rope_bits": 8},
        )
    ]
    assert shares == pytest.approx([1.7700, 1.5625, 1.8188, 1.8799, 2.0142], abs=5e-5)


def test_the_small_model_of_the_sheet():
    """Width 256, 6 layers, latent 64, rotary key 8: 6144, 864, 432, 108 without scales and 120 with one per vector."""
    small = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 6, "latent_dim": 64, "rope_dim": 8}
    clla = CLLAConfig(**small)
    assert bytes_per_token(rung(clla, "MHA", cache_bits=16)) == 6144
    assert bytes_per_token(rung(clla, "MLA", cache_bits=16)) == 864
    assert bytes_per_token(rung(clla, "CLLA", cache_bits=16)) == 432
    assert bytes_per_token(clla, scales=False) == 108
    assert bytes_per_token(clla) == 120


def test_cla_of_its_paper():
    """Brandon et al. at 1 B, 20 layers of 16 heads of 128: bytes per token of MHA, GQA4, MQA, MQA-CLA2, GQA2-CLA2."""
    cla = CLLAConfig(hidden_size=2048, num_attention_heads=16, num_hidden_layers=20, cache_bits=16)
    sizes = [
        bytes_per_token(rung(cla, name, kv_heads=n))
        for name, n in (("MHA", None), ("GQA", 4), ("MQA", None), ("CLA", 1), ("CLA", 2))
    ]
    assert sizes == [163_840, 40_960, 10_240, 5_120, 10_240]


def test_the_papers_config():
    costs = {(c.name, c.bits): c for c in ladder_costs(load_config("paper"))}
    sizes = {name: costs[name, 16].bytes_per_token for name in RUNGS}
    assert sizes == {"MHA": 196_608, "GQA": 49_152, "MQA": 12_288, "CLA": 98_304, "MLA": 27_648, "CLLA": 13_824}
    assert costs["CLLA", 8].bytes_per_token == 12 * (512 + 8 + 64 + 2)
    assert costs["CLLA", 4].bytes_per_token == 12 * (256 + 8 + 32 + 2) == 3576
    assert costs["MHA", 4].bytes_per_token == 24 * 2 * 16 * (64 + 2)
    assert costs["CLLA", 4].ratio == pytest.approx(0.0182, abs=0.00005)
    assert costs["CLLA", 4].tokens(80e9) == 22_371_364


def test_the_command(capsys, tmp_path):
    assert main(["clla", "budget", "--config", "paper", "--plot", str(tmp_path / "budget.svg")]) == 0
    printed = capsys.readouterr().out
    assert "3,576" in printed
    assert "1.82 %" in printed
    assert "22,371,364" in printed
    assert (tmp_path / "budget.svg").read_text().startswith("<svg")


def test_the_command_reads_a_saved_model(build, tmp_path, capsys):
    model = build(rope_bits=16)
    model.save_pretrained(tmp_path / "model")
    assert main(["clla", "budget", "--config", str(tmp_path / "model"), "--memory", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "5 layers of 4 heads of 8, latent 24, rotary key 6" in printed
    assert f"As configured, cache_bits 4 and rope_bits 16: {bytes_per_token(model.config):,} bytes" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "papr"], "unknown name 'papr'; did you mean 'paper'?"),
        (["--memory", "0"], "memory: must be positive, got 0"),
        (["--kv_heads", "3"], "kv_heads: must be positive and divide num_attention_heads 16, got 3"),
        (["--kv_heads", "0"], "kv_heads: must be positive and divide num_attention_heads 16, got 0"),
        (["--kv_heads", "-4"], "kv_heads: must be positive and divide num_attention_heads 16, got -4"),
        (["--config", "FOLDER/none.yaml"], "none.yaml: heads: must be at least 1, got 0"),
        (["--config", "FOLDER/words.yaml"], "Field 'dim' expected int, got str (value: 'abc')"),
        (["--config", "FOLDER/llama"], "is not that of a CLLA model, its model_type is 'llama'"),
        (["--config", "FOLDER/half"], "half: "),
        (["--config", "FOLDER/list.yaml"], "expected model.init_args of a CLLAModule"),
        (["--config", "FOLDER/wrong.yaml"], "must be one of 4, 8, 16, got 5"),
    ],
)
def test_what_the_command_refuses(arguments, words, tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "wrong.yaml").write_text("model: {init_args: {vocab_size: 9, cache_bits: 5}}")
    (tmp_path / "none.yaml").write_text("model: {init_args: {vocab_size: 9, heads: 0}}")
    (tmp_path / "words.yaml").write_text("model: {init_args: {vocab_size: 9, dim: abc}}")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"model_type": "clla", "hidden_size": "abc"}')
    assert main(["clla", "budget", *(a.replace("FOLDER", str(tmp_path)) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
