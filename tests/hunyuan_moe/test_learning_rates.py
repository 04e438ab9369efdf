"""Rates by expert and over time against the paper's numbers, and staged contexts."""

import math
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GPT2Config,
    GPT2LMHeadModel,
    JetMoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SwitchTransformersConfig,
)

from tenfold.hunyuan_moe import (
    Experts,
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
    with pytest.raises(ValueError, match="model: Linear has no specialized experts"):
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


def rotary_models():
    """Small models whose rotary scalings are kept elsewhere too, with what becomes of them."""
    common = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"intermediate_size": 8, "max_position_embeddings": 64, "pad_token_id": None}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    mla = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    for kind in (DeepseekV2Config, DeepseekV3Config):
        yield kind(**common, **mla, first_k_dense_replace=2, rope_parameters=dict(yarn)), True
    scaled = yarn | {"llama_4_scaling_beta": 0.1}
    yield Ministral3Config(**common, num_key_value_heads=1, head_dim=8, rope_parameters=scaled), False


@pytest.mark.parametrize(("config", "works"), rotary_models(), ids=lambda x: getattr(x, "model_type", None))
def test_a_longer_context_is_the_same_after_saving_or_is_refused(config, works, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens, before = torch.arange(20)[None], model.config.to_dict()
    if not works:
        with pytest.raises(ValueError, match="llama_4_scaling_beta, which a new base would lose"):
            extend_context(model, max_length=256, base=1e6)
        assert model.config.to_dict() == before
        return
    extend_context(model, max_length=256, base=1e6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].self_attn.scaling == model.model.layers[0].self_attn.scaling == 16**-0.5
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_a_model_with_several_kinds_of_positions_is_left_as_it_was():
    text = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 8, "num_key_value_heads": 1, "max_position_embeddings": 64}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="mrope_section, which a new base would lose"):
        extend_context(model, max_length=256, base=1e6)
    assert model.config.to_dict() == before


def experts_of(config):
    """The names of the parameters that learn at the experts' rate."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    return special_names(model), model


def special_names(model):
    groups = expert_parameter_groups(model, lr=1.0, ratio=0.5)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    chosen = {id(p) for group in groups if group["lr"] == 0.5 for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def test_experts_that_are_no_stack_of_feed_forwards():
    names, _ = experts_of(JetMoeConfig(**SMALL, num_key_value_heads=1, kv_channels=8, num_local_experts=2))
    assert names == {
        f"layers.{i}.{part}.{linear}_linear.weight"
        for i in range(2)
        for part in ("self_attention.experts", "mlp")
        for linear in ("input", "output")
    }
    switch = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 2, "num_heads": 2, "num_experts": 2}
    names, model = experts_of(SwitchTransformersConfig(**switch, num_sparse_encoder_layers=1))
    assert names
    assert names == {name for name, _ in model.named_parameters() if ".experts." in name}


def test_shared_experts_learn_as_the_rest():
    layer = nn.Module()
    layer.experts, layer.shared_experts = Experts(8, 4, 2), Experts(8, 4, 2)
    assert special_names(layer) == {"experts.gate_up_proj", "experts.down_proj"}


def test_adapters_on_experts_learn_at_their_rate():
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2))
    lora = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"], target_modules=["q_proj"])
    names = special_names(get_peft_model(model, lora))
    assert len(names) == 4  # two matrices in each of two layers
    assert all("mlp.experts.lora_" in name for name in names)
