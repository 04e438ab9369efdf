"""`attn_implementation="cog"` in transformers models: values, masks, caches, and no sight of the future."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BloomConfig,
    CLIPConfig,
    CLIPModel,
    DynamicCache,
    FalconConfig,
    GPTNeoConfig,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    ViTConfig,
    ViTModel,
)

from tenfold.cog_attention import attention_weights, keep_softmax, register
from tenfold.cog_attention.transformers import cog_attention_forward

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
T = 20


@pytest.fixture(params=["all cog", "softmax first and last"])
def model(request):
    register()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="cog")).eval()
    if request.param != "all cog":
        keep_softmax(model)
    return model


@pytest.fixture
def tokens():
    return torch.randint(1, 97, (2, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_last_token_is_not_seen_by_those_before_it(model, tokens):
    other = tokens.clone()
    other[:, -1] = tokens[:, -1] % 96 + 1
    before, after = model(tokens).logits, model(other).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=32)])
def test_cached_chunks_give_the_logits_of_one_pass(model, tokens, cache):
    cache = cache(config=model.config)
    chunks = [tokens[:, :7], tokens[:, 7:13], *tokens[:, 13:].split(1, dim=1)]
    logits = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], dim=1)
    torch.testing.assert_close(logits, model(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, tokens, side):
    pads = torch.zeros(1, 6, dtype=torch.long)
    parts, ones = [pads, tokens[:1, 6:]], [torch.zeros(1, 6), torch.ones(1, 14)]
    if side == "right":
        parts, ones = parts[::-1], ones[::-1]
    padded = torch.cat([torch.cat(parts, 1), tokens[1:]])
    mask = torch.cat([torch.cat(ones, 1), torch.ones(1, T)]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[:1][mask[:1] == 1], model(tokens[:1, 6:]).logits[0])
    torch.testing.assert_close(logits[1], model(tokens[1:]).logits[0])
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_follows_the_full_passes(model, tokens, cache):
    generated = model.generate(tokens[:, :5], max_new_tokens=8, do_sample=False, cache_implementation=cache)
    expected = tokens[:, :5]
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


@torch.no_grad()
def test_left_padded_generation_equals_each_alone(model, tokens):
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens[:1, :5]], 1), tokens[1:, :8]])
    mask = (padded != 0).long()
    together = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    alone = model.generate(tokens[:1, :5], max_new_tokens=6, do_sample=False)
    assert torch.equal(together[0, 3:], alone[0])


@torch.no_grad()
def test_a_sliding_window_reaches_the_attention(tokens):
    register()
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4, attn_implementation="cog")).eval()
    other = tokens.clone()
    other[:, 0] = tokens[:, 0] % 96 + 1
    before, after = model(tokens).logits, model(other).logits
    reach = 3 * SIZES["num_hidden_layers"]  # three earlier tokens a layer
    assert not torch.equal(before[:, reach], after[:, reach])
    torch.testing.assert_close(before[:, reach + 1 :], after[:, reach + 1 :], rtol=0, atol=0)


@torch.no_grad()
def test_attention_weights_are_signed_and_explain_the_output(model, tokens):
    maps = model(tokens, output_attentions=True).attentions
    softmax_layers = getattr(model.config, "cog_softmax_layers", [])
    for layer, weights in enumerate(maps):
        assert weights.shape == (2, 4, T, T)
        torch.testing.assert_close(weights.abs().sum(-1), torch.ones(2, 4, T))
        assert torch.equal(weights.triu(1), torch.zeros_like(weights))
        assert bool((weights < 0).any()) == (layer not in softmax_layers)
    module = model.model.layers[1].self_attn
    q, k, v = torch.randn(3, 2, 4, T, 8, generator=torch.Generator().manual_seed(2)).unbind()
    out, weights = cog_attention_forward(module, q, k[:, :2], v[:, :2], None, scaling=0.3, output_attentions=True)
    torch.testing.assert_close(out.transpose(1, 2), weights @ v[:, :2].repeat_interleave(2, 1))


def test_one_layer_is_cog_and_the_others_softmax(tokens):
    """With every layer kept, the model is the stock softmax Llama with the same weights."""
    register()
    torch.manual_seed(0)
    cog = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="cog")).eval()
    softmax = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa")).eval()
    softmax.load_state_dict(cog.state_dict())
    with torch.no_grad():
        assert not torch.allclose(cog(tokens).logits, softmax(tokens).logits)
        keep_softmax(cog, range(3))
        assert torch.equal(cog(tokens).logits, softmax(tokens).logits)


@torch.no_grad()
def test_a_saved_model_loads_as_cog_again_and_again(model, tokens, tmp_path):
    """Transformers does not save the attention's name: by default the weights would load into a softmax model."""
    expected = model(tokens).logits
    loaded = model
    for folder in (tmp_path / "first", tmp_path / "second"):
        loaded.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(loaded(tokens).logits, expected)


def test_a_saved_model_does_not_load_as_softmax_where_cog_is_unknown(model, tokens, tmp_path):
    model(tokens)
    model.save_pretrained(tmp_path)
    load = f"from transformers import LlamaForCausalLM as L; L.from_pretrained({str(tmp_path)!r})"
    answer = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert answer.returncode
    assert 'attn_implementation="cog"` is not supported' in answer.stderr


def test_models_whose_layers_cannot_be_told_apart_are_refused():
    register()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vit = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4, attn_implementation="cog"))
    bart = BartModel(
        BartConfig(
            vocab_size=50,
            d_model=32,
            encoder_layers=2,
            decoder_layers=3,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            attn_implementation="cog",
        )
    )
    for model in (vit, bart):
        with pytest.raises(ValueError, match="does not number its attention layers from 0 to 1"):
            keep_softmax(model)


def test_gradients_reach_every_parameter(model, tokens):
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_compiles_without_graph_breaks(model, tokens):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)


def test_attention_weights_against_a_hand_computation():
    query, key = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[2.0, 5.0], [-1.0, 0.0], [0.0, 3.0]]]])
    e = torch.tensor([2.0, 1.0, 0.0]).exp()
    expected = torch.tensor([1.0, -1.0, 0.0]) * e / e.sum()
    torch.testing.assert_close(attention_weights(query, key, scale=1.0)[0, 0, 0], expected)
    torch.testing.assert_close(
        attention_weights(query, key, kind="softmax", scale=1.0)[0, 0, 0], torch.tensor([2.0, -1.0, 0.0]).softmax(0)
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [((3,), "layers: the model has 3 attention layers, there is no layer 3"), ((-4,), "no layer -4")],
)
def test_a_layer_that_is_not_there(model, layers, message):
    with pytest.raises(ValueError, match=message):
        keep_softmax(model, layers)


def test_keeping_softmax_in_a_softmax_model():
    with pytest.raises(ValueError, match=r"model: runs 'sdpa' attention; call register"):
        keep_softmax(LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa")))


def test_dropout_and_biases_are_refused(tokens):
    register()
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1, attn_implementation="cog")).train()
    with pytest.raises(ValueError, match=r"attention_dropout: .* got 0\.1"):
        model(tokens)
    with pytest.raises(ValueError, match="attention_mask: a float mask must hold 0"):
        model.eval()(tokens, attention_mask=torch.rand(2, 1, T, T))


@torch.no_grad()
def test_a_float_mask_of_zeros_and_minima_is_understood(model, tokens):
    causal = torch.full((T, T), torch.finfo(torch.float32).min).triu(1).expand(2, 1, T, T)
    torch.testing.assert_close(model(tokens, attention_mask=causal).logits, model(tokens).logits)


@pytest.mark.parametrize("parts", ["cog", {"text_config": "cog"}])
def test_composite_configs_keep_their_attention_before_any_forward(tmp_path, parts):
    register()
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    text = vision | {"vocab_size": 50, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4}, projection_dim=8)
    config._attn_implementation = parts
    model = CLIPModel(config)
    model.save_pretrained(tmp_path)
    loaded = CLIPModel.from_pretrained(tmp_path)
    assert loaded.config.text_config._attn_implementation == "cog"
    assert (loaded.config.vision_config._attn_implementation == "cog") == (parts == "cog")


def test_what_is_set_last_is_saved(model, tokens, tmp_path):
    model(tokens)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("config", [BloomConfig, FalconConfig, GPTNeoConfig])
def test_models_outside_the_interface_are_refused_when_they_are_built(config):
    register()
    with pytest.raises(ValueError, match=r"attn_implementation: .* does not call transformers' attention interface"):
        AutoModelForCausalLM.from_config(config(vocab_size=9, hidden_size=32), attn_implementation="cog")


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks", "s_aux", "softcap", "unheard_of"])
def test_keywords_that_are_not_understood_are_refused(model, name):
    q = torch.randn(1, 4, 3, 8)
    with pytest.raises(ValueError, match=f"^{name}: Cog attention does not know it"):
        cog_attention_forward(model.model.layers[1].self_attn, q, q, q, None, **{name: torch.ones(1)})


def test_hybrids_count_their_attention_layers():
    register()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 6}
    config = JambaConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_offset=1,
        attn_layer_period=2,
        num_experts=2,
        use_mamba_kernels=False,
        attn_implementation="cog",
    )
    model = JambaForCausalLM(config)
    keep_softmax(model)
    assert model.config.cog_softmax_layers == [1, 5]


def test_values_of_another_width_are_refused():
    register()
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="cog"))
    q = torch.randn(1, 4, 3, 8)
    with pytest.raises(
        ValueError, match=r"value: LlamaAttention has values of width 6 and keys of width 8 \(as in MLA"
    ):
        cog_attention_forward(model.model.layers[1].self_attn, q, q, q[..., :6], None)
