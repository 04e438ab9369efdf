"""The model against Llama and DeepSeek-V3 with the same weights, by definition, and through `generate`."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from tenfold.clla import CLLACache, CLLAConfig, CLLAForCausalLM, register, rung, sharing_layout
from tenfold.kernels import fake_pack_latents

BITS = (16, 8, 4)
OPTIONS = {
    "MHA": {"name": "MHA"},
    "GQA": {"name": "GQA", "kv_heads": 2},
    "MQA, 8 bits": {"name": "MQA", "cache_bits": 8},
    "CLA, 16 bits": {"name": "CLA", "cache_bits": 16},
    "MLA, 16 bits": {"name": "MLA", "cache_bits": 16},
    "MLA": {"name": "MLA"},
    "CLLA": {},
    "CLLA, 8 bits": {"cache_bits": 8},
    "CLLA, 16 bits": {"cache_bits": 16},
    "CLLA of three": {"share_factor": 3},
    "trailing": {"producers": sharing_layout("trailing", 5, 2)},
    "rotary key in 16 bits": {"rope_bits": 16},
    "rotary key of each layer": {"rope_key": "own"},
    "no rotary key": {"rope_key": "none"},
    "shared up-projections": {"share_up_projections": True},
    "rounded before the norm": {"quantizer": "before_norm"},
    "no norm": {"latent_norm": False},
    "a latent for the values": {"value_latent_dim": 8},
    "query latent": {"query_dim": 16},
    "a scale per vector": {"group_size": None},
    "biases": {"attention_bias": True},
    "asymmetric codes": {"cache_code": "asymmetric"},
    "FP4, the rotary key in FP8": {"cache_code": "float", "rope_bits": 8},
    "FP8 rotary key": {"rope_code": "float", "rope_bits": 8},
    "asymmetric before the norm": {"cache_code": "asymmetric", "cache_bits": 8, "quantizer": "before_norm"},
    "heads in FP4": {"name": "CLA", "cache_code": "float"},
    "steps per channel": {"cache_scales": "channel"},
    "steps in FP8": {"cache_scales": "channel", "cache_code": "float", "cache_bits": 8},
    "steps and one up-projection": {"cache_scales": "channel", "share_up_projections": True, "rope_key": "own"},
    "steps and a latent for the values": {"cache_scales": "channel", "value_latent_dim": 8, "cache_code": "float"},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@torch.no_grad()
@each_option
def test_cached_chunks_give_the_logits_of_one_pass(build, options, tokens):
    """Absorbed attention over packed codes, and expanded attention over the rounded values, are one function."""
    model = build(**options)
    cache = CLLACache(model.config)
    chunks = [tokens[:, :5], tokens[:, 5:6], tokens[:, 6:9], tokens[:, 9:10], tokens[:, 10:]]
    logits = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], dim=1)
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_same_in_float32_without_rounding(build, tokens):
    model = build(cache_bits=16).float()
    cache = CLLACache(model.config)
    logits = torch.cat([model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_without_sharing_heads_are_transformers_llama(sizes, kv_heads, tokens):
    config = rung(CLLAConfig(**sizes), "GQA", kv_heads=kv_heads, cache_bits=16)
    ours = CLLAForCausalLM(config).double().eval()
    names = {name: sizes[name] for name in sizes if hasattr(LlamaConfig(), name)}
    theirs = LlamaForCausalLM(LlamaConfig(**names, num_key_value_heads=kv_heads)).double().eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("query_dim", [None, 16])
def test_without_sharing_and_rounding_clla_is_transformers_mla(build, sizes, query_dim, tokens):
    """DeepSeek-V3's attention, caching the expanded keys in no case: the scale is 1/√(d_h + d_r), d_c + d_r is 30."""
    ours = build("MLA", cache_bits=16, query_dim=query_dim)
    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{name: sizes[name] for name in sizes if hasattr(DeepseekV3Config(), name)},
            num_key_value_heads=4,
            kv_lora_rank=24,
            q_lora_rank=query_dim,
            qk_rope_head_dim=6,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=5,
            rope_interleave=False,
            num_mtp_layers=0,
        )
    )
    theirs = theirs.double().eval()
    state = {}
    for name, weight in ours.state_dict().items():
        layer, _, part = name.partition(".self_attn.")
        deepseek = {
            "q_proj.0.weight": "q_a_proj.weight",
            "q_proj.1.weight": "q_a_layernorm.weight",
            "q_proj.2.weight": "q_b_proj.weight",
            "kv_norm.weight": "kv_a_layernorm.weight",
        }
        state[f"{layer}.self_attn.{deepseek.get(part, part)}" if part else name] = weight
    for layer in (f"model.layers.{i}.self_attn." for i in range(5)):
        down, rope = state.pop(layer + "kv_down_proj.weight"), state.pop(layer + "k_rope_proj.weight")
        state[layer + "kv_a_proj_with_mqa.weight"] = torch.cat([down, rope])
        up = [state.pop(layer + f"{kind}_up_proj.weight").unflatten(0, (4, 8)) for kind in "kv"]
        state[layer + "kv_b_proj.weight"] = torch.cat(up, dim=1).flatten(0, 1)
    theirs.load_state_dict(state)
    expected = theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(ours(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-12)
    cache = CLLACache(ours.config)
    ours(tokens[:, :-1], past_key_values=cache)
    absorbed = ours(tokens[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(absorbed, expected[:, -1:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_pair_by_its_definition(build, tokens):
    """Layer 1 attends, with its own queries and up-projections, to what layer 0 wrote; written out head by head."""
    model = build(num_hidden_layers=2)
    states = {}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, out, i=i: states.update({i: (kwargs["hidden_states"], out[0])}),
            with_kwargs=True,
        )
    model(tokens, use_cache=False)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert not any(hasattr(second, name) for name in ("kv_down_proj", "kv_norm", "k_rope_proj"))

    h, (x, expected) = states[0][0], states[1]
    c = F.rms_norm(h @ first.kv_down_proj.weight.T, (24,), first.kv_norm.weight, 1e-6)
    c = fake_pack_latents(c, bits=4, group_size=8)
    angles = torch.arange(13.0)[:, None] / 10_000 ** (torch.arange(0, 6, 2) / 6)
    turn = torch.polar(torch.ones(13, 3), angles)

    def rope(v):  # pairs (i, i + 3) as complex numbers
        turned = torch.complex(v[..., :3], v[..., 3:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    k = fake_pack_latents(rope(h @ first.k_rope_proj.weight.T), bits=4, group_size=8)
    heads = []
    for i in range(4):
        q = (x @ second.q_proj.weight.T)[..., 14 * i : 14 * (i + 1)]
        key = c @ second.k_up_proj.weight[8 * i : 8 * (i + 1)].T
        value = c @ second.v_up_proj.weight[8 * i : 8 * (i + 1)].T
        scores = (q[..., :8] @ key.mT + rope(q[..., 8:]) @ k.mT) / 14**0.5
        scores = scores.masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -torch.inf)
        heads.append(scores.softmax(-1) @ value)
    torch.testing.assert_close(torch.cat(heads, -1) @ second.o_proj.weight.T, expected, rtol=0, atol=1e-6)


@torch.no_grad()
@each_option
def test_the_last_token_is_not_seen_by_those_before_it(build, options, tokens):
    model = build(**options)
    other = tokens.clone()
    other[:, -1] = tokens[:, -1] % 96 + 1
    before, after = model(tokens).logits, model(other).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["GQA", "MLA", "CLLA"])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_changes_nothing(build, name, bits, attention, tokens):
    model = build(name, cache_bits=bits)
    if attention == "eager":  # in float64 its mask overflows the float32 of its softmax
        model.float().set_attn_implementation(attention)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens[:1, :5]], 1), tokens[1:, :9]])
    together = model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=6, do_sample=False)
    alone = [model.generate(t, max_new_tokens=6, do_sample=False) for t in (tokens[:1, :5], tokens[1:, :9])]
    assert torch.equal(together[:1, 4:], alone[0])
    assert torch.equal(together[1:], alone[1])


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        *({"name": name} for name in ("GQA", "CLA", "MLA", "CLLA")),
        {"cache_code": "asymmetric"},
        {"cache_code": "float", "rope_bits": 8},
        {"cache_scales": "channel"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},  # guesses, then crops what was wrong
    ],
    ids=str,
)
def test_generate_with_and_without_a_cache_agree(build, options, settings, tokens):
    model = build(**options)
    prompt = tokens[:1, :7] if "prompt_lookup_num_tokens" in settings else tokens[:, :7]
    plain = {k: v for k, v in settings.items() if k.startswith("num_")}
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False, **plain)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False, **settings), expected)


@torch.no_grad()
def test_sampling_with_and_without_a_cache_agrees(build, tokens):
    model = build()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(tokens, max_new_tokens=8, do_sample=True, use_cache=use_cache))
    assert torch.equal(*drawn)


@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache(build, tokens):
    model = build()
    first = model.generate(tokens[:, :5], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, CLLACache)
    longer = torch.cat([first.sequences, tokens[:, 5:9]], dim=1)
    cache = first.past_key_values
    assert torch.equal(
        model.generate(longer, past_key_values=cache, max_new_tokens=4, do_sample=False),
        model.generate(longer, max_new_tokens=4, do_sample=False),
    )


@torch.no_grad()
def test_the_cache_goes_by_both_of_its_names(build, tokens):
    """`past_key_values`, and what transformers from 5.24 on calls it."""
    model = build()
    caches = [CLLACache(model.config) for _ in range(2)]
    first = model.model(tokens, past_key_values=caches[0]).last_hidden_state
    second = model.model(tokens, cache=caches[1]).last_hidden_state
    assert torch.equal(first, second)
    assert [cache.get_seq_length() for cache in caches] == [13, 13]


@torch.no_grad()
@each_option
def test_saved_and_loaded(build, options, tokens, tmp_path):
    register()
    model = build(**options)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is CLLAForCausalLM
    assert loaded.config.cache_formats(0) == model.config.cache_formats(0)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-12)


@each_option
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(build, options, checkpointing, tokens):
    model = build(**options).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())
    if checkpointing:
        plain = build(**options).train()
        plain(tokens, labels=tokens).loss.backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)


def test_a_producer_learns_from_both_layers_of_its_pair(build, tokens):
    model = build(num_hidden_layers=2).train()
    producer, reader = (layer.self_attn for layer in model.model.layers)
    parts = []
    for silent in (producer, reader):
        model.zero_grad()
        weight = silent.o_proj.weight.detach().clone()
        silent.o_proj.weight.data.zero_()  # the gradient comes through the other layer alone
        model(tokens, labels=tokens).loss.backward()
        parts.append(producer.kv_down_proj.weight.grad.abs().sum())
        silent.o_proj.weight.data.copy_(weight)
    assert all(part > 0 for part in parts)


def test_the_straight_through_gradient_is_that_of_the_identity():
    from tenfold.clla.formats import Format

    for normalize in (None, 1e-6):
        x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(3, 10, dtype=torch.float64)
        (grad,) = torch.autograd.grad((Format(1, 10, 4, None, normalize).round(x) * weights).sum(), x)
        if normalize is None:
            assert torch.equal(grad, weights)
        else:  # that of the norm, at what was rounded
            y = fake_pack_latents(x.detach(), bits=4, group_size=10).requires_grad_()
            (expected,) = torch.autograd.grad((F.rms_norm(y, (10,), None, normalize) * weights).sum(), y)
            torch.testing.assert_close(grad, expected)


def test_compiles_without_graph_breaks(build, tokens):
    model = build().float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    "changes", [{}, {"cache_code": "asymmetric"}, {"cache_code": "float"}, {"cache_scales": "channel"}]
)
def test_trains_and_decodes_in_half_precision(build, changes, tokens):
    model = build(**changes).float().train()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model = model.bfloat16().eval()
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 16)


def test_documents_masked_apart(build, tokens):
    """Packed documents, told apart by their positions, as core's CausalLM asks for them."""
    model = build()
    positions = torch.cat([torch.arange(6), torch.arange(7)]).expand(2, -1)
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits
        apart = [model(part, use_cache=False).logits for part in (tokens[:, :6], tokens[:, 6:])]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=0, atol=1e-10)


@torch.no_grad()
def test_attention_weights_and_hidden_states_come_out(build, tokens):
    model = build()
    model.set_attn_implementation("eager")
    out = model(tokens, use_cache=False, output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in out.attentions] == [(2, 4, 13, 13)] * 5
    torch.testing.assert_close(out.attentions[1].sum(-1), torch.ones(2, 4, 13, dtype=torch.float64))
    assert len(out.hidden_states) == 6


@torch.no_grad()
def test_bits_can_change_after_training(build, tokens):
    """Post-training quantization is a change of the config."""
    model = build(cache_bits=16)
    exact = model(tokens).logits
    model.config.cache_bits = 4
    rounded = model(tokens).logits
    cache = CLLACache(model.config)
    assert 0.001 < (rounded - exact).abs().max() < exact.abs().max()
    logits = torch.cat([model(t, past_key_values=cache).logits for t in tokens.split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, rounded, rtol=0, atol=1e-10)


def test_what_a_model_refuses(build, tokens):
    model = build()
    with pytest.raises(TypeError, match=r"past_key_values: expected a CLLACache\(model.config\), got a DynamicCache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="past_key_values: made for another config"):
        model(tokens, past_key_values=CLLACache(build(cache_bits=8).config))
    with pytest.raises(ValueError, match=r"input_ids: 65 tokens, cache included, but .* is 64"):
        model(tokens[:, :1].expand(2, 65))
    with pytest.raises(ValueError, match=r"cache_implementation: accepted are 'dynamic', .* got 'quantized'"):
        model.generate(tokens, max_new_tokens=1, cache_implementation="quantized")
    cache = CLLACache(model.config)
    model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask: a float mask must hold 0"):
        model(tokens[:, :1], past_key_values=cache, attention_mask=torch.rand(2, 1, 1, 14))
    with pytest.raises(ValueError, match="input_ids: missing, and there are no inputs_embeds either"):
        model()
    model.config.cache_scales = "channel"
    with pytest.raises(ValueError, match="cache_scales: the model was made without steps per channel"):
        model(tokens)


@pytest.mark.parametrize("options", [{"name": "CLA"}, {"name": "GQA", "cache_bits": 16}, {"name": "MLA"}], ids=str)
def test_gradients_where_the_cache_has_a_past(build, options, tokens):
    """Heads: those of one pass, in which the tokens before are constants. Latents, read as they lie: a clear error."""
    model = build(**options)
    cache, weight = CLLACache(model.config), model.model.layers[0].self_attn.o_proj.weight
    with torch.no_grad():
        model(tokens[:, :5], past_key_values=cache)
    loss = model(tokens[:, 5:], past_key_values=cache).logits.square().sum()
    if options["name"] == "MLA":
        with pytest.raises(RuntimeError, match="latent_attention has no gradient"):
            loss.backward()
        return
    attention = [layer.self_attn for layer in model.model.layers if layer.self_attn.produces]
    ours = torch.autograd.grad(loss, [weight, *(a.v_proj.weight for a in attention)])

    hooks = [  # keys and values of the first five tokens without their gradients
        projection.register_forward_hook(lambda module, args, out: torch.cat([out[:, :5].detach(), out[:, 5:]], 1))
        for a in attention
        for projection in (a.k_proj, a.v_proj)
    ]
    loss = model(tokens, use_cache=False).logits[:, 5:].square().sum()
    theirs = torch.autograd.grad(loss, [weight, *(a.v_proj.weight for a in attention)])
    for hook in hooks:
        hook.remove()
    assert all(gradient.any() for gradient in ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_steps_take_part_before_anything_is_rounded(build, tokens):
    """With a gradient of zero: DDP stops at parameters that have none."""
    model = build(cache_scales="channel", cache_bits=16).train()
    exact = build(cache_bits=16).train()
    exact.load_state_dict({k: v for k, v in model.state_dict().items() if "latent_steps" not in k})
    loss = model(tokens, labels=tokens).loss
    assert torch.equal(loss, exact(tokens, labels=tokens).loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any() == ("latent_steps" not in name), name


@pytest.mark.parametrize(
    "options", [{}, {"share_up_projections": True}, {"cache_scales": "channel"}, {"query_dim": 12}], ids=str
)
def test_adapters_on_every_layer_learn_and_merge(build, options, tokens):
    """Whose layers are called, all of them: the up-projections too, which decoding absorbs."""
    model = build(**options)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.double()(tokens, labels=tokens).loss.backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if "lora_" in name}
    assert sum("k_up_proj" in name for name in grads) >= 2 * (2 if options.get("share_up_projections") else 5)
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []
    adapted.eval()
    with torch.no_grad():
        whole = adapted(tokens).logits
        first = adapted(tokens[:, :9], use_cache=True)
        later = adapted(tokens[:, 9:], past_key_values=first.past_key_values).logits
        merged = adapted.merge_and_unload()(tokens).logits
    torch.testing.assert_close(later, whole[:, 9:])
    torch.testing.assert_close(merged, whole)
