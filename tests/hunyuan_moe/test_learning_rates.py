"""Rates by expert and over time against the paper's numbers, and staged contexts."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tenfold.hunyuan_moe import (
    HunyuanLargeConfig,
    HunyuanLargeForCausalLM,
    MoELayer,
    batch_at_ratio,
    expert_lr_ratio,
    expert_parameter_groups,
    extend_context,
    optimal_lr,
    rope_base,
    three_phase,
)


def test_the_papers_ratio():
    assert expert_lr_ratio(0.26016) == pytest.approx(0.31, abs=1e-5)
    assert batch_at_ratio(0.31) == pytest.approx(0.26016, abs=1e-5)
    assert expert_lr_ratio(4) == pytest.approx(1)
    assert expert_lr_ratio(1e-9) == pytest.approx(0.25)
    assert expert_lr_ratio(1e9) == pytest.approx(4)
    for x in (0.01, 0.5, 7.0):
        batch, noise = 3.0, 3.0 / x
        rates = [optimal_lr(b, max_lr=2e-3, noise_batch=noise) for b in (batch / 16, batch)]
        assert rates[0] / rates[1] == pytest.approx(expert_lr_ratio(x))
    assert optimal_lr(5.0, max_lr=2e-3, noise_batch=5.0) == pytest.approx(2e-3)
    for bad in (0.25, 4.0, 5.0):
        with pytest.raises(ValueError, match=r"ratio: must be between 0.25 and 4 for 16 experts"):
            batch_at_ratio(bad)
    for bad in (0, -4):
        with pytest.raises(ValueError, match=f"experts: must be positive, got {bad}"):
            batch_at_ratio(0.5, bad)
    with pytest.raises(ValueError, match="x: must be positive, got 0"):
        expert_lr_ratio(0)


@pytest.mark.parametrize("kind", ["layer", "ours", "mixtral"])
def test_only_specialized_experts_are_scaled(kind):
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = {
        "layer": lambda: MoELayer(8, 6, 4),
        "ours": lambda: HunyuanLargeForCausalLM(HunyuanLargeConfig(**sizes, **heads, num_experts=4)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4)),
    }[kind]()
    groups = expert_parameter_groups(model, 1e-2, ratio=0.31, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    for name, parameter in model.named_parameters():
        special = ".experts." in f".{name}"
        vector = parameter.ndim == 1 or "embed" in name
        assert found[id(parameter)] == (pytest.approx(3.1e-3 if special else 1e-2), 0.0 if vector else 0.1), name
    assert sum(rate == pytest.approx(3.1e-3) for rate, _ in found.values()) == (2 if kind == "layer" else 4)


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="model: Linear has no experts stacked in one tensor"):
        expert_parameter_groups(nn.Linear(2, 2), 1e-3)
    with pytest.raises(ValueError, match="ratio: must be positive, got -1"):
        expert_parameter_groups(MoELayer(8, 6, 4), 1e-3, ratio=-1)


def rates(steps, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = three_phase(optimizer, total_steps=steps, **options)
    return [schedule.lr_lambdas[0](k) for k in range(steps + 3)]


def test_three_phases():
    """Annealing begins at 95 % and ends at a tenth; no step is larger than a continuous curve's."""
    r = rates(2000, warmup_steps=100)
    assert r[0] == pytest.approx(1 / 101)
    assert r[100] == 1 == max(r)
    assert r[1900] == pytest.approx(0.3)
    assert r[1950] == pytest.approx(0.2)
    assert r[2000:] == pytest.approx([0.1] * 3)
    assert max(abs(a - b) for a, b in pairwise(r)) < 0.011
    decay = [a - b for a, b in pairwise(r[100:1901])]
    assert 0 <= min(decay) <= max(decay) < 0.7 * math.pi / 2 / 1800 * 1.01
    annealed = [a - b for a, b in pairwise(r[1900:2001])]
    assert annealed == pytest.approx([0.002] * 100)


def test_the_schedule_keeps_the_ratio_between_groups():
    optimizer = torch.optim.SGD(expert_parameter_groups(MoELayer(8, 6, 4), 1e-2))
    schedule = three_phase(optimizer, warmup_steps=2, total_steps=20)
    for _ in range(20):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.31 * optimizer.param_groups[0]["lr"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 96}, "warmup_steps: must be from 0 to 95, where the annealing begins, got 96"),
        ({"warmup_steps": 0, "decay_ratio": 0.05}, "decay_ratio: must be from min_ratio 0.1 to 1, got 0.05"),
        ({"warmup_steps": 0, "anneal_share": 1.0}, "anneal_share: must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        rates(100, **options)


def test_the_released_base():
    assert rope_base(HunyuanLargeConfig()) == pytest.approx(1.343e9, rel=1e-3)


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_a_longer_context(kind, tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": None}
    model = HunyuanLargeForCausalLM(HunyuanLargeConfig(**sizes, num_experts=2)) if kind == "ours" else None
    model = (model or LlamaForCausalLM(LlamaConfig(**sizes))).eval()
    tokens = torch.arange(20)[None]
    before = model(tokens).logits
    extend_context(model, max_length=256, base=1e9)
    expected = 1e9 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    after = model(tokens).logits
    assert not torch.allclose(before, after)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.max_position_embeddings == 256
    torch.testing.assert_close(again(tokens).logits, after, rtol=0, atol=0)
    with pytest.raises(ValueError, match="max_length: 128 is less than the model's 256 positions"):
        extend_context(model, max_length=128, base=1e9)
    for base in (1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"base: must be above 1 and finite, got {base}"):
            extend_context(model, max_length=512, base=base)


def test_a_model_without_rotary_embeddings_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="model: GPT2LMHeadModel has no rotary embedding with one base"):
        extend_context(model, max_length=512, base=1e6)
