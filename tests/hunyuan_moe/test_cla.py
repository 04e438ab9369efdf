"""Shared keys and values in others' models, against the same models with a cache that hands them on."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MoshiConfig,
    MoshiForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tenfold.hunyuan_moe import CLAMixin, share_key_values

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 6}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {}),
    "olmo": (OlmoConfig, OlmoForCausalLM, {"clip_qkv": 0.5}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, EXPERTS),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS),
}


def plain(family, dtype=torch.float64, **changes):
    """A model whose norms' weights are not 1, so that it matters whose norm a key went through."""
    make_config, make_model, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = make_model(make_config(**SIZES | extra | changes)).eval().to(dtype)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the only one in float64
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def shared(family, factor=2, dtype=torch.float64, **changes):
    return share_key_values(plain(family, dtype, **changes), factor)


class HandingCache(DynamicCache):
    """Gives every layer of a run what the first one of it was given."""

    factor = 2

    def update(self, key, value, layer_idx, *args, **kwargs):
        given = super().update(key, value, layer_idx, *args, **kwargs)
        if layer_idx % self.factor == 0:
            self.given = given
        return self.given


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_readers_attend_to_the_final_keys_of_their_producer(family, tokens):
    theirs, ours = plain(family), shared(family)
    expected = theirs(tokens, past_key_values=HandingCache(config=theirs.config)).logits
    assert not torch.allclose(expected, theirs(tokens).logits, atol=1e-2)
    torch.testing.assert_close(ours(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-12)
    cache = DynamicCache(config=ours.config)
    steps = [ours(part, past_key_values=cache).logits for part in tokens.split([5, 1, 4, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-12)
    assert [layer.keys is not None for layer in cache.layers] == [True, False, True, False]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_from_all_layers_of_a_run(family, tokens):
    theirs, ours = plain(family).train(), shared(family).train()
    theirs(tokens, labels=tokens, past_key_values=HandingCache(config=theirs.config), use_cache=True).loss.backward()
    ours(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    gone = {n for n in expected if ".k_" in n or ".v_" in n} & {n for n in expected if ".1." in n or ".3." in n}
    assert all(expected.pop(name) is None for name in gone)
    assert len(gone) == (6 if family == "qwen3" else 4)
    found = {name: p.grad for name, p in ours.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_checkpointing_gives_the_same_gradients(tokens):
    model = shared("qwen3").train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        # two passes before the backward: neither may see the other's keys
        (model(tokens, labels=tokens).loss + model(tokens.flip(1), labels=tokens).loss).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant: such checkpointing loses the gradients"):
        model(tokens)


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_cache_bytes_and_parameters(factor, tokens):
    before = plain("llama", torch.bfloat16)
    whole = before.num_parameters()
    model = shared("llama", factor, torch.bfloat16)
    cache = model(tokens, use_cache=True).past_key_values
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    producers = -(-4 // factor)
    assert sum(x.untyped_storage().nbytes() for x in tensors) == 2 * 2 * 13 * 2 * 2 * 8 * producers
    assert whole - model.num_parameters() == (4 - producers) * 2 * 32 * 16
    assert model.state_dict().keys() <= before.state_dict().keys()
    assert sum("k_proj" in name for name, _ in model.named_modules()) == producers


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generate(family, settings, tokens):
    model = shared(family)
    padded = tokens[:, :7].clone()
    padded[0, :3] = 0
    mask = (padded != 0).long()
    options = {"max_new_tokens": 6, "do_sample": False, **settings}
    expected = padded
    if "num_beams" in settings:
        expected = model.generate(padded, attention_mask=mask, **options, use_cache=False)
    else:
        for _ in range(6):
            logits = model(expected, attention_mask=(expected != 0).long(), use_cache=False).logits
            logits[..., 0] = -torch.inf  # so that the mask can be told from the tokens
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
        options["suppress_tokens"] = [0]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options), expected)


@torch.no_grad()
def test_attention_functions(tokens):
    eager, sdpa = (shared("qwen3", attn_implementation=name) for name in ("eager", "sdpa"))
    torch.testing.assert_close(eager(tokens).logits, sdpa(tokens).logits, rtol=0, atol=1e-5)  # softmax in float32
    assert eager(tokens, output_attentions=True).attentions[3].shape == (2, 4, 13, 13)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_in_one_graph(mode, tokens):
    model = getattr(shared("qwen3", dtype=torch.float32, num_hidden_layers=2), mode)()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4
    )


class SharedQwen3(CLAMixin, Qwen3ForCausalLM):
    """As in the docstring."""


@torch.no_grad()
def test_the_mixin_reads_the_config_and_is_saved(tokens, tmp_path):
    model = SharedQwen3(Qwen3Config(**SIZES, cla_share_factor=2)).eval()
    model.save_pretrained(tmp_path)
    for again in (SharedQwen3.from_pretrained(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert again.state_dict().keys() == model.state_dict().keys()
    assert SharedQwen3(Qwen3Config(**SIZES)).num_parameters() == Qwen3ForCausalLM(Qwen3Config(**SIZES)).num_parameters()


@torch.no_grad()
def test_a_saved_model_that_no_longer_shares(tokens, tmp_path):
    SharedQwen3(Qwen3Config(**SIZES, cla_share_factor=2)).save_pretrained(tmp_path)
    whole = SharedQwen3.from_pretrained(tmp_path, cla_share_factor=1)
    for model in (whole, Qwen3ForCausalLM.from_pretrained(tmp_path)):  # new projections, of which transformers warns
        assert model.num_parameters() == Qwen3ForCausalLM(Qwen3Config(**SIZES)).num_parameters()
        expected = model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(tokens, max_new_tokens=3, do_sample=False), expected)


@torch.no_grad()
def test_a_plain_checkpoint_through_auto_classes(tokens, tmp_path, monkeypatch):
    mapping = AutoModelForCausalLM._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    plain("qwen3", torch.float32).save_pretrained(tmp_path / "plain")
    AutoModelForCausalLM.register(Qwen3Config, SharedQwen3, exist_ok=True)
    unchanged = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(unchanged(tokens).logits, plain("qwen3", torch.float32)(tokens).logits)
    model = SharedQwen3.from_pretrained(tmp_path / "plain", cla_share_factor=2)
    torch.testing.assert_close(model(tokens).logits, shared("qwen3", dtype=torch.float32)(tokens).logits)
    model.save_pretrained(tmp_path / "shared")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shared")
    assert type(again) is SharedQwen3
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_sharded_by_fsdp(checkpointing, tokens, tmp_path):
    """Which looks into all containers that pass through its layers, and rebuilds them."""
    one, sharded = (shared("qwen3", dtype=torch.float32).train() for _ in range(2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        if checkpointing:
            sharded.activation_checkpointing_enable()
        policy = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=True)
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        for model in (one, sharded):
            model(tokens, labels=tokens).loss.backward()
        for (name, weight), other in zip(one.named_parameters(), sharded.parameters(), strict=True):
            found = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
            torch.testing.assert_close(found, weight.grad, msg=name)
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_inside_a_vision_language_model():
    text = LlamaConfig(**SIZES)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=96, vision_feature_select_strategy="default"
    )
    model = LlavaForConditionalGeneration(config).eval()
    count = model.num_parameters()
    share_key_values(model)
    assert count - model.num_parameters() == 2 * 2 * 32 * 16
    assert model.config.text_config.cla_share_factor == 2
    tokens, image = torch.tensor([[1, 96, 96, 96, 96, 5, 6, 7]]), torch.randn(1, 3, 8, 8)
    expected = model(input_ids=tokens, pixel_values=image, use_cache=False).logits
    cache = model(input_ids=tokens[:, :6], pixel_values=image, use_cache=True).past_key_values
    assert [layer.keys is not None for layer in cache.layers] == [True, False, True, False]
    torch.testing.assert_close(model(input_ids=tokens[:, 6:], past_key_values=cache).logits, expected[:, 6:])


def test_the_mean_of_a_run():
    before, model = plain("qwen2"), share_key_values(plain("qwen2"), 3, init="mean")
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight"):
        several = torch.stack([before.get_parameter(f"model.layers.{i}.self_attn.{name}") for i in range(3)])
        torch.testing.assert_close(model.get_parameter(f"model.layers.0.self_attn.{name}"), several.mean(0))
        last = f"model.layers.3.self_attn.{name}"
        assert torch.equal(model.get_parameter(last), before.get_parameter(last))


def test_what_cannot_share(build):
    sizes = {**SIZES, "num_local_experts": 4}
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    for model, message in [
        (GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2)), "has 0 attention layers .* found GPT2Attention"),
        (SmolLM3ForCausalLM(SmolLM3Config(**sizes)), "layers 2 and 3 cannot share, they differ in use_rope: 1 and 0"),
        (plain("qwen2", **windows), "layers 2 and 3 cannot share, they differ in .*: .*"),
        (T5ForConditionalGeneration(T5Config(num_layers=2, d_model=8, d_ff=8, vocab_size=9)), "an encoder-decoder"),
        (build(), "shares keys and values between layers already"),
        (NemotronForCausalLM(NemotronConfig(**SIZES)), "NemotronDecoderLayer of .* does not hand its .* to self_attn"),
        (StableLmForCausalLM(StableLmConfig(**SIZES)), "StableLmDecoderLayer of .* does not hand its .* to self_attn"),
        (MoshiForCausalLM(MoshiConfig(**SIZES | {"ffn_dim": 48})), "MoshiLinear of .* has no out_features"),
        (shared("llama"), "layer 1 of LlamaForCausalLM has no k_proj and v_proj, but q_proj, o_proj"),
    ]:
        count, names = model.num_parameters(), [n for n, _ in model.named_modules()]
        with pytest.raises(ValueError, match=message):
            share_key_values(model)
        assert (model.num_parameters(), [n for n, _ in model.named_modules()]) == (count, names)
    with pytest.raises(TypeError, match="model: expected a transformers model, got Linear"):
        share_key_values(nn.Linear(2, 2))
    for options, message in [
        ({"factor": 0}, "factor: must be a whole number of layers, at least 1, got 0"),
        ({"factor": 1.5}, "factor: must be a whole number"),
        ({"init": "first"}, "init: must be 'producer' or 'mean', got 'first'"),
    ]:
        with pytest.raises(ValueError, match=message):
            share_key_values(plain("llama"), **options)


def test_a_layer_alone_says_what_it_misses(tokens):
    layer = shared("llama").model.layers[1]
    assert isinstance(layer, nn.Module)
    with pytest.raises(ValueError, match="shared_key_values: not passed to layer 1"):
        layer(torch.zeros(1, 2, 32, dtype=torch.float64))
