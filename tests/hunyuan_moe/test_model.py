"""The model against a definition written out by hand, transformers' own model, and the paper's counts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

from tenfold.hunyuan_moe import (
    HunyuanLargeConfig,
    HunyuanLargeForCausalLM,
    cache_bytes_per_token,
    count_parameters,
    register,
)


def norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, base):
    """The pairs (i, i + d/2) as complex numbers, turned."""
    d, t = x.shape[-1], x.shape[-2]
    angles = torch.arange(t)[:, None] * (1 / base ** (torch.arange(0, d, 2) / d))  # in float32, as the model's
    turn = torch.complex(angles.cos(), angles.sin()).to(torch.complex128)
    turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def by_definition(model, tokens, base=10_000 * 100_000 ** (8 / 6)):
    """The logits in loops: raw keys and values go to the second layer of a pair, which normalizes with its own norm."""
    config, state = model.config, dict(model.named_parameters())
    h = state["model.embed_tokens.weight"][tokens]
    for i in range(config.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in state.items() if k.startswith(f"model.layers.{i}.")}
        x = norm(h, w["input_layernorm.weight"])
        if i % 2 == 0:
            raw = [(x @ w[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (2, 8)).transpose(1, 2) for n in "kv"]
        q = (x @ w["self_attn.q_proj.weight"].T).unflatten(-1, (4, 8)).transpose(1, 2)
        q = norm(rotate(q, base), w["self_attn.query_layernorm.weight"])
        k = norm(rotate(raw[0], base), w["self_attn.key_layernorm.weight"])
        heads = []
        for head in range(4):
            scores = q[:, head] @ k[:, head // 2].mT / 8**0.5
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
            heads.append(scores.softmax(-1) @ raw[1][:, head // 2])
        h = h + torch.cat(heads, -1) @ w["self_attn.o_proj.weight"].T
        x = norm(h, w["post_attention_layernorm.weight"])
        p = (x @ w["mlp.gate.wg.weight"].T).softmax(-1)
        y = torch.zeros_like(x)
        for b, t in torch.cartesian_prod(*map(torch.arange, tokens.shape)):
            e = p[b, t].argmax()
            gate, up = (w["mlp.experts.gate_up_proj"][e] @ x[b, t]).chunk(2)
            y[b, t] = p[b, t, e] * (w["mlp.experts.down_proj"][e] @ (F.silu(gate) * up))
        shared = [w[f"mlp.shared_mlp.{n}_proj.weight"] for n in ("gate", "up", "down")]
        h = h + y + (F.silu(x @ shared[0].T) * (x @ shared[1].T)) @ shared[2].T
    return norm(h, state["model.norm.weight"]) @ state["model.embed_tokens.weight"].T


@torch.no_grad()
def test_by_its_definition(build, tokens):
    """Shared, normalized keys with the norm folded into the query are what per-layer keys and norms give."""
    model = build()
    expected = by_definition(model, tokens)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-12)
    cache = DynamicCache(config=model.config)
    steps = [model(part, past_key_values=cache).logits for part in tokens.split([5, 1, 4, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"cla_share_factor": 3, "num_hidden_layers": 5},
        {"use_cla": False},
        {"use_qk_norm": False},
        {"num_shared_expert": 0},
        {"num_shared_expert": 2, "moe_topk": 2},
        {"num_key_value_heads": 1},
    ],
    ids=str,
)
def test_decoding_in_other_shapes(build, tokens, changes):
    model = build(**changes)
    cache = DynamicCache(config=model.config)
    steps = [model(part, past_key_values=cache).logits for part in tokens.split([6, 1, 1, 5], dim=1)]
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-12)
    held = [layer.keys is not None for layer in cache.layers]
    assert held == [mode is None for mode in model.config.kv_sharing_modes]


@torch.no_grad()
@pytest.mark.parametrize("top_k", [2, 3])
def test_transformers_own_model_with_copied_weights(build, tokens, top_k):
    ours = build(use_cla=False, moe_topk=top_k, dtype=torch.float32)
    names = HunYuanMoEV1Config().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    settings = {name: value for name, value in ours.config.to_dict().items() if name in names}
    theirs = HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**settings))
    theirs.set_experts_implementation("eager")
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_papers_counts():
    assert count_parameters(HunyuanLargeConfig()) == (388_698_128_640, 51_318_800_640)
    assert count_parameters(HunyuanLargeConfig(tie_word_embeddings=False)) == (389_520_605_440, 52_141_277_440)
    assert count_parameters(HunyuanLargeConfig(use_cla=False)).total == 388_698_128_640 + 262_144_000


@pytest.mark.parametrize(
    ("heads", "cla", "expected"),
    [(80, False, 1_638_400), (8, False, 163_840), (1, False, 20_480), (80, True, 819_200), (8, True, 81_920)],
)
def test_cache_bytes_by_the_papers_table(heads, cla, expected):
    assert cache_bytes_per_token(HunyuanLargeConfig(num_key_value_heads=heads, use_cla=cla)) == expected


@torch.no_grad()
@pytest.mark.parametrize("cla", [True, False])
def test_cache_bytes_of_a_real_cache(cla):
    """80 heads of 80 and 8 key heads in 64 layers, as the paper's; narrow elsewhere."""
    config = HunyuanLargeConfig(
        hidden_size=8, head_dim=80, intermediate_size=2, num_experts=2, vocab_size=11, use_cla=cla
    )
    model = HunyuanLargeForCausalLM(config).bfloat16().eval()
    cache = model(torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    assert sum(x.untyped_storage().nbytes() for x in tensors) == 3 * (81_920 if cla else 163_840)


@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_neighbours(build, tokens):
    model = build(capacity_factor=1.0)
    alone = torch.cat([model(row[None]).logits for row in tokens])
    torch.testing.assert_close(model(tokens).logits, alone, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_future_is_not_seen(build, tokens, mode):
    """Nor does training leak it, as long as no expert is full: tokens in excess are the last ones."""
    model = getattr(build(routing="dropless"), mode)()
    other = tokens.clone()
    other[:, -1] = tokens[:, -1] % 96 + 1
    before, after = model(tokens).logits, model(other).logits
    torch.testing.assert_close(before[:, :-1], after[:, :-1], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, -1], after[:, -1])


@torch.no_grad()
def test_left_padding_changes_nothing(build, tokens):
    model = build()
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens[:1, :5]], 1), tokens[1:, :9]])
    together = model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=6, do_sample=False)
    alone = [model.generate(t, max_new_tokens=6, do_sample=False) for t in (tokens[:1, :5], tokens[1:, :9])]
    assert torch.equal(together[:1, 4:], alone[0])
    assert torch.equal(together[1:], alone[1])


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},  # guesses, then crops what was wrong
    ],
    ids=str,
)
def test_generate_with_and_without_a_cache_agree(build, settings, tokens):
    model = build()
    prompt = tokens[:1, :7] if "prompt_lookup_num_tokens" in settings else tokens[:, :7]
    plain = {k: v for k, v in settings.items() if k == "num_beams"}
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False, **plain)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False, **settings), expected)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_functions_and_outputs(build, attention, tokens):
    model = build(dtype=torch.float32)
    model.set_attn_implementation(attention)
    out = model(tokens, output_hidden_states=True, output_router_logits=True, output_attentions=attention == "eager")
    assert len(out.hidden_states) == 5
    assert [x.shape for x in out.router_logits] == [(26, 4)] * 4
    assert attention == "sdpa" or out.attentions[3].shape == (2, 4, 13, 13)
    torch.testing.assert_close(out.logits, build()(tokens).logits.float(), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_recycles_the_same_tokens(build, tokens):
    model = build(capacity_factor=1.0).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert sum(layer.mlp.statistics.recycled for layer in model.model.layers) > 0
        assert all(int(layer.mlp.statistics.load.sum()) == 26 for layer in model.model.layers)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    torch.manual_seed(6)
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    assert not torch.allclose(
        model.model.layers[0].mlp.experts.down_proj.grad, gradients[0]["model.layers.0.mlp.experts.down_proj"]
    )


def test_the_loss_in_training_holds_the_balance_loss(build, tokens):
    model = build(routing="dropless", router_aux_loss_coef=0.5)
    evaluated = model(tokens, labels=tokens)
    trained = model.train()(tokens, labels=tokens)
    torch.testing.assert_close(trained.loss, evaluated.loss + 0.5 * trained.aux_loss)
    assert trained.aux_loss > 0.5


def test_round_trip(build, tokens, tmp_path):
    register()
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is HunyuanLargeForCausalLM
    assert not again.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert again.config.kv_sharing_modes == [None, "reuse", None, "reuse"]
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_the_decoder_alone(build, tokens, tmp_path):
    register()
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    expected = model.model(tokens).last_hidden_state
    assert torch.equal(decoder(tokens).last_hidden_state, expected)


def test_half_precision_keeps_the_router_in_float32(build, tokens, tmp_path):
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    half = HunyuanLargeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.gate.wg.weight.dtype == torch.float32
    assert half.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    logits = half(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert F.cosine_similarity(logits.float().flatten(), model(tokens).logits.flatten(), dim=0) > 0.98
    with torch.autocast("cpu", torch.bfloat16):
        assert model.train()(tokens, labels=tokens).loss.isfinite()


@torch.no_grad()
def test_tuples(build, tokens):
    model = build()
    expected = model(tokens, labels=tokens)
    loss, balance, logits, cache = model(tokens, labels=tokens, return_dict=False)
    assert torch.equal(logits, expected.logits)
    assert (loss, balance) == (expected.loss, expected.aux_loss)
    assert cache.get_seq_length() == 13
    model.config.return_dict = False
    assert torch.equal(model(tokens)[1], expected.logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_topk": 5}, "moe_topk: 5 is more than the 4 experts"),
        ({"routing": "recylce"}, "routing: must be one of 'recycle', 'drop', 'dropless', got 'recylce'"),
        ({"capacity_factor": 0.9}, "capacity_factor: must be at least 1, recycling needs a place for every token"),
        ({"routing": "drop", "capacity_factor": 0.0}, "capacity_factor: must be positive; got 0.0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 do not divide num_attention_heads 4"),
        ({"moe_topk": [1, 2, 1, 1]}, r"moe_topk: must be the same in all layers, got \[1, 2, 1, 1\]"),
        ({"hidden_act": "gelu"}, "hidden_act: the experts are SwiGLU, 'silu'; got 'gelu'"),
        ({"cla_share_factor": 0}, "cla_share_factor: must be at least 1, got 0"),
    ],
)
def test_bad_configs(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_accumulated_gradients_are_the_whole_updates(build):
    """With unequal numbers of labels: the cross entropy over all of them, the balance losses weighted by them."""
    model = build(routing="dropless", router_aux_loss_coef=0.3).train()
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randint(1, 97, (2, length), generator=generator) for length in (13, 7)]
    labels = [tokens.clone() for tokens in batches]
    labels[0][:, :6] = -100
    labels[1][1, 3:] = -100
    counts = [int((x[:, 1:] != -100).sum()) for x in labels]
    assert counts == [14, 8]
    losses = []
    for tokens, targets, count in zip(batches, labels, counts, strict=True):
        out = model(tokens)
        entropy = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), reduction="sum")
        losses.append((entropy + 0.3 * count * out.aux_loss) / sum(counts))
    expected = torch.autograd.grad(sum(losses), list(model.parameters()))
    for items in (sum(counts), torch.tensor(sum(counts))):
        model.zero_grad()
        for tokens, targets in zip(batches, labels, strict=True):
            model(tokens, labels=targets, num_items_in_batch=items).loss.backward()
        for parameter, truth in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, truth, rtol=1e-6, atol=1e-8)


def test_packed_documents_do_not_see_each_other_in_training(build, tokens):
    model = build(routing="dropless").train()
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None].expand(2, -1)
    out = model(tokens, position_ids=positions)
    assert out.past_key_values is None
    torch.testing.assert_close(out.logits[:, :6], model(tokens[:, :6]).logits)
    torch.testing.assert_close(out.logits[:, 6:], model(tokens[:, 6:]).logits)


def test_the_router_can_be_adapted(build, tokens):
    model = get_peft_model(build(torch.float32).train(), LoraConfig(r=2, target_modules=["wg", "o_proj"]))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "wg.lora_B" in name}
    assert len(grads) == 4
    assert all(grad is not None and grad.any() for grad in grads.values())
