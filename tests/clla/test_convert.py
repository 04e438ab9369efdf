"""Conversion: exact where nothing is left out, right errors where something is, and clear refusals."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tenfold.clla import CLLAForCausalLM, register
from tenfold.clla.convert import convert_model
from tenfold.clla.factorize import Run, factorize, rotary_components, square_root
from tenfold.clla.steps import normal_step
from tenfold.core.cli import main

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
SOURCES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama with biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True)),
    "llama 3": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
    ),
    "yarn": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None, head_dim=16)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
}


def make(name, dtype=torch.float64):
    kind, config = SOURCES[name]
    torch.manual_seed(0)
    model = kind(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which begin at 1 and 0
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("calibrated", [False, True])
def test_nothing_left_out_nothing_changed(name, calibrated, tokens):
    """Check 5 of the method, from the other side: with room for every key and value, CLLA is the source."""
    source = make(name)
    heads = 2 * source.model.layers[0].self_attn.head_dim
    model, errors = convert_model(
        source,
        latent_dim=heads,
        rope_dim=heads,
        share_factor=1,
        cache_bits=16,
        calibration=tokens if calibrated else None,
    )
    torch.testing.assert_close(model(tokens).logits, source(tokens).logits, rtol=0, atol=1e-5)
    assert all(error < 1e-5 for layer in errors for error in layer.values())
    longer = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(longer, source.generate(tokens, max_new_tokens=6, do_sample=False))


@torch.no_grad()
def test_a_pair_with_the_same_maps_shares_without_loss(tokens):
    """Without calibration the reader's norm is accounted for: the maps are those of the producer's input."""
    source = make("llama")
    first, second = source.model.layers[0], source.model.layers[1]
    ratio = first.input_layernorm.weight / second.input_layernorm.weight
    for name in ("k_proj", "v_proj"):
        second.self_attn.get_submodule(name).weight.copy_(first.self_attn.get_submodule(name).weight * ratio)
    _, errors = convert_model(source, latent_dim=16, rope_dim=16, cache_bits=16)
    assert all(error < 1e-6 for layer in errors[:2] for error in layer.values())


def test_errors_are_those_of_the_best_reduction():
    """Against numpy's idea of it: the values' error is what the singular values left out amount to."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = ([torch.randn(n, 8, 20, generator=generator, dtype=torch.float64)] for n in (4, 2, 2))
    samples = (
        torch.randn(500, 20, generator=generator, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 21)).double()
    )
    root = square_root(samples.T @ samples / 500, ridge=0)
    frequencies = 1 / 100 ** (torch.arange(4) / 4).double()
    run = Run(query, key, value, root)
    components = rotary_components([run], frequencies, rope_dim=16, window=50)
    assert components == [2, 2, 2, 2]  # everything: two heads at each of four frequencies
    with pytest.raises(ValueError, match="rope_dim: at most 16"):
        rotary_components([run], frequencies, rope_dim=18, window=50)
    factors = factorize(run, frequencies, components, latent_dim=5, window=50)
    outputs = samples @ value[0].flatten(0, 1).T
    left, sigma, right = torch.linalg.svd(outputs, full_matrices=False)
    best = (left[:, :5] * sigma[:5]) @ right[:5]
    ours = samples @ factors.down.T @ factors.value_up[0][[0, 2]].flatten(0, 1).T
    torch.testing.assert_close(ours, best, rtol=1e-6, atol=1e-6)
    expected = (outputs - best).norm() / outputs.norm()
    assert factors.errors[0]["values"] == pytest.approx(expected.item(), rel=1e-6)
    latents = samples @ factors.down.T
    torch.testing.assert_close(latents.T @ latents / 500, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_calibration_lowers_the_loss_of_the_values(tokens):
    source = make("llama")
    text = torch.randint(1, 97, (20, 40), generator=torch.Generator().manual_seed(2))
    white, measured = (
        convert_model(source, latent_dim=12, rope_dim=8, cache_bits=16, calibration=c)[0] for c in (None, text)
    )
    errors = []
    states = []
    hook = source.model.layers[0].input_layernorm.register_forward_hook(lambda m, a, out: states.append(out))
    with torch.no_grad():
        source(tokens)
    hook.remove()
    true = source.model.layers[0].self_attn.v_proj(states[0])
    for model in (white, measured):
        module = model.model.layers[0].self_attn
        value = module.v_up_proj(module.kv_down_proj(states[0])).unflatten(-1, (4, 8))[:, :, [0, 2]].flatten(2)
        errors.append((value - true).norm())
    assert errors[1] < errors[0]


@torch.no_grad()
def test_slow_frequencies_need_no_rotation():
    """Over 10 tokens a frequency of 10⁻⁶ turns nothing: the room goes to the fast one, and nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = ([torch.randn(1, 4, 6, generator=generator).double()] for _ in range(3))
    run = Run(query, key, value, torch.eye(6, dtype=torch.float64))
    frequencies = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    components = rotary_components([run], frequencies, rope_dim=2, window=10)
    assert components == [1, 0]
    assert factorize(run, frequencies, components, latent_dim=6, window=10).errors[0]["rotation"] < 1e-4


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a real architecture, random weights, and a byte-level tokenizer."""
    make("qwen2", torch.float32).save_pretrained(tmp_path / "qwen")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator(["a b"], trainers.BpeTrainer(vocab_size=90, special_tokens=["<|endoftext|>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "qwen")
    (tmp_path / "text.txt").write_text("a b b a " * 400 + "\n\n" + "b a " * 400)
    return tmp_path / "qwen"


OPTIONS = ("--latent_dim", "16", "--rope_dim", "8")


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_command_writes_a_model_that_loads_and_generates(checkpoint, calibrated, tokens, capsys):
    options = ("--calibration", str(checkpoint.with_name("text.txt")), "--tokens", "200") if calibrated else ()
    assert main(["clla", "convert", str(checkpoint), *OPTIONS, *options]) == 0
    printed = capsys.readouterr().out
    assert "Relative errors" in printed
    assert "train it before use" in printed
    register()
    output = checkpoint.with_name("qwen-clla")
    model = AutoModelForCausalLM.from_pretrained(output)
    assert isinstance(model, CLLAForCausalLM)
    assert model.config.cache_producers == [0, 0, 2]
    assert model.config.cache_bits == 4
    assert len(model.config.rope_frequencies) == 4
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (2, 17)
    assert (output / "tokenizer.json").exists()
    source = Qwen2ForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, source.model.layers[1].mlp.up_proj.weight)
    model.train()(tokens, labels=tokens).loss.backward()  # ready for healing
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_command_converts_to_other_codes_and_to_steps(checkpoint, calibrated, tokens, capsys):
    options = ("--calibration", str(checkpoint.with_name("text.txt")), "--tokens", "200") if calibrated else ()
    options += ("--cache_code", "float", "--cache_scales", "channel")
    assert main(["clla", "convert", str(checkpoint), *OPTIONS, *options]) == 0
    model = CLLAForCausalLM.from_pretrained(checkpoint.with_name("qwen-clla"))
    assert (model.config.cache_code, model.config.cache_scales) == ("float", "channel")
    steps = model.model.layers[2].self_attn.latent_steps
    assert (steps.std() > 1e-6) == calibrated
    assert (steps > 0).all()
    if not calibrated:
        assert steps.allclose(steps.new_tensor(normal_step(model.config.cache_formats(2)[0])))
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (2, 17)


@pytest.mark.parametrize("inside", [".", "model", ".."])
def test_the_output_lies_beside_the_checkpoint(checkpoint, inside, monkeypatch, capsys):
    (checkpoint / "model").mkdir()
    monkeypatch.chdir({".": checkpoint, "model": checkpoint.parent, "..": checkpoint / "model"}[inside])
    given = "qwen" if inside == "model" else inside
    assert main(["clla", "convert", given, *OPTIONS]) == 0
    assert (checkpoint.parent / "qwen-clla" / "config.json").exists()
    assert not list(checkpoint.rglob("*-clla"))


@torch.no_grad()
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("share_factor", [1, 2])
def test_the_limits_are_the_ranks(name, calibrated, share_factor, tokens):
    source, calibration = make(name), tokens if calibrated else None
    with pytest.raises(ValueError, match=r"latent_dim: at most .* rope_dim: at most") as told:
        convert_model(source, latent_dim=999, rope_dim=998, share_factor=share_factor, calibration=calibration)
    latent, rope = map(int, re.findall(r"at most (\d+)", str(told.value)))
    convert_model(source, latent_dim=latent, rope_dim=rope, share_factor=share_factor, calibration=calibration)


def damage(checkpoint, kind):
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    state, settings = load_file(weights), json.loads(config.read_text())
    if kind == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif kind == "missing":
        state.pop("model.layers.1.self_attn.k_proj.weight")
        save_file(state, weights, {"format": "pt"})
    elif kind == "mismatched":
        state["model.norm.weight"] = torch.ones(5)
        save_file(state, weights, {"format": "pt"})
    elif kind == "not finite":
        state["model.norm.weight"][3] = torch.nan
        save_file(state, weights, {"format": "pt"})
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "half a config":
        config.write_text(config.read_text()[:40])
    else:
        config.write_text(json.dumps(settings | kind))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", ["is damaged or not whole"]),
        ("missing", ["missing keys: model.layers.1.self_attn.k_proj.weight"]),
        ("mismatched", ["mismatched keys: model.norm.weight"]),
        ("not finite", ["model.norm.weight holds numbers that are not finite"]),
        ("no weights", ["is damaged or not whole"]),
        ("no config", ["is not a folder with a config.json"]),
        ("half a config", ["config.json cannot be read"]),
        ({"model_type": "qwen3"}, ["model_type 'qwen3' cannot be converted; accepted: llama, mistral, qwen2"]),
        ({"layer_types": ["sliding_attention"] * 3}, ["has sliding windows"]),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ["rope_type 'dynamic' cannot be converted"],
        ),
    ],
    ids=str,
)
def test_a_checkpoint_that_cannot_be_converted(checkpoint, kind, words, capsys):
    damage(checkpoint, kind)
    before = sorted(checkpoint.parent.iterdir())
    assert main(["clla", "convert", str(checkpoint), *OPTIONS]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert len([line for line in error.splitlines() if line.startswith("tenfold: ")]) == 1
    assert sorted(checkpoint.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--latent_dim", "500", "--rope_dim", "8"), "latent_dim: at most 32, got 500: the keys"),
        (("--latent_dim", "16", "--rope_dim", "500"), "rope_dim: at most 16, got 500: the keys"),
        (
            (),
            "latent_dim: at most 32, got 512; rope_dim: at most 16, got 64: the keys and values of a run",
        ),
        (("--latent_dim", "0", "--rope_dim", "8"), "latent_dim: must be at least 1, got 0"),
        ((*OPTIONS, "--share_factor", "0"), "share_factor: must be at least 1"),
        ((*OPTIONS, "--cache_bits", "5"), "cache_bits: must be one of 4, 8, 16"),
        ((*OPTIONS, "--cache_code", "asymmetric", "--cache_scales", "channel"), "cache_scales: 'channel' does not go"),
        ((*OPTIONS, "--window", "0"), "window: must be at least 1"),
        ((*OPTIONS, "--output", "OTHER"), "is there already"),
        ((*OPTIONS, "--calibration", "OTHER/none.txt"), "calibration: "),
        ((*OPTIONS, "--calibration", "OTHER/text.txt", "--tokens", "3"), "tokens: must be at least 64"),
    ],
)
def test_options_that_make_no_sense(checkpoint, options, words, capsys):
    os.truncate(checkpoint / "model.safetensors", 100)  # which is found later: loading takes long
    options = [option.replace("OTHER", str(checkpoint.parent)) for option in options]
    before = sorted(checkpoint.parent.iterdir())
    assert main(["clla", "convert", str(checkpoint), *options]) == 2
    assert words in capsys.readouterr().err
    assert sorted(checkpoint.parent.iterdir()) == before


def test_attention_that_is_not_softmax_is_refused(tmp_path, capsys):
    """A checkpoint of Cog Attention would become a softmax model without a word."""
    source = make("llama", torch.float32)
    source.save_pretrained(tmp_path / "cog")
    config = json.loads((tmp_path / "cog" / "config.json").read_text())
    (tmp_path / "cog" / "config.json").write_text(json.dumps(config | {"attn_implementation": "cog"}))
    assert main(["clla", "convert", str(tmp_path / "cog"), "--latent_dim", "24", "--rope_dim", "6"]) == 2
    assert "its attention is 'cog'; a CLLA model has softmax attention" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "cog-clla").exists()
    source.config._attn_implementation_internal = "cog"
    with pytest.raises(ValueError, match="its attention is 'cog'"):
        convert_model(source, latent_dim=24, rope_dim=6)
