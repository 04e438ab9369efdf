"""Quantized linear layers: the three products of Eq. 8, operand by operand, and models that contain them."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from tenfold.fp_scaling import QuantLinear, QuantRecipe, dequantize_, quant_linear, quantize_linears_
from tenfold.kernels import fake_quantize

OPERANDS = ("P1", "P2", "P3", "P4", "P5", "P6")
NOTHING = QuantRecipe(targets=())


def tensors(tokens=(6, 8), inputs=32, outputs=64, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(*tokens, inputs, dtype=dtype, requires_grad=True)
    weight = torch.randn(outputs, inputs, dtype=dtype, requires_grad=True)
    b = torch.randn(outputs, dtype=dtype, requires_grad=True) if bias else None
    return x, weight, b


def results(function, x, weight, bias, seed=1):
    """Output and gradients."""
    out = function(x, weight, bias)
    torch.manual_seed(seed)
    grad = torch.randn_like(out)
    wanted = [t for t in (x, weight, bias) if t is not None]
    return [out, *torch.autograd.grad(out, wanted, grad)], grad


def same(ours, theirs):
    return [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("tokens", [(48,), (6, 8), (2, 3, 8), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_with_nothing_quantized_it_is_the_plain_layer_to_the_bit(tokens, bias):
    x, weight, b = tensors(tokens, bias=bias)
    ours, _ = results(lambda *t: quant_linear(*t, NOTHING), x, weight, b)
    theirs, _ = results(nn.functional.linear, x, weight, b)
    assert all(same(ours, theirs))


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("tokens", [(48,), (6, 8), ()])
def test_one_operand_changes_one_product(operand, tokens):
    """With P2 alone, dX uses the unquantized W; with P4 alone the forward is unchanged; and so on, to the bit."""
    x, weight, b = tensors(tokens)
    # Of one token every element is its own block, which loses nothing: a format without scales changes it too.
    recipe = QuantRecipe("e2m1", targets=(operand,), scale="block" if tokens else None, block_size=16)
    ours, _ = results(lambda *t: quant_linear(*t, recipe), x, weight, b)
    plain, _ = results(nn.functional.linear, x, weight, b)
    close = [torch.allclose(a, c, rtol=1e-5, atol=1e-5) for a, c in zip(ours, plain, strict=True)]
    product = {"P1": 0, "P2": 0, "P3": 1, "P4": 1, "P5": 2, "P6": 2}[operand]
    assert close == [i != product for i in range(4)]


def blocks(x, axis, size, grid):
    """Absmax-scaled rounding to `grid`, by search over all its numbers, in float64."""
    x = np.moveaxis(np.asarray(x, dtype=np.float64), axis, -1)
    grid = np.concatenate([-grid[::-1], grid])
    groups = x.reshape(*x.shape[:-1], -1, size)
    scale = grid.max() / np.abs(groups).max(-1, keepdims=True)
    nearest = grid[np.abs(groups[..., None] * scale[..., None] - grid).argmin(-1)] / scale
    return np.moveaxis(nearest.reshape(x.shape), -1, axis)


@pytest.mark.parametrize("targets", [("P2", "P4", "P6"), OPERANDS, ("P1", "P5"), ("P3", "P4")])
def test_every_product_is_that_of_the_quantized_operands(targets):
    """Against Eq. 8 in float64 NumPy with E2M1's numbers written out; blocks along the axis that is summed over."""
    x, weight, b = tensors((48,))
    ours, grad = results(lambda *t: quant_linear(*t, QuantRecipe("e2m1", targets=targets, block_size=16)), x, weight, b)
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def operand(name, t, axis):
        t = t.detach().numpy().astype(np.float64)
        return blocks(t, axis, 16, e2m1) if name in targets else t

    expected = [
        operand("P1", x, 1) @ operand("P2", weight, 1).T + b.detach().numpy(),
        operand("P3", grad, 1) @ operand("P4", weight, 0),
        operand("P5", grad, 0).T @ operand("P6", x, 0),
        grad.numpy().sum(0),
    ]
    for ours_, expected_ in zip(ours, expected, strict=True):
        np.testing.assert_allclose(ours_.detach().numpy(), expected_, rtol=1e-4, atol=1e-4)


def test_formats_of_their_own():
    x, weight, b = tensors((48,))
    recipe = QuantRecipe({"P4": "e4m3", "P2": "e2m1"}, scale="channel")
    assert recipe.targets == ("P2", "P4")
    ours, grad = results(lambda *t: quant_linear(*t, recipe), x, weight, b)
    out = x @ fake_quantize(weight, "e2m1", scale="axis", axis=1).T + b
    dx = grad @ fake_quantize(weight, "e4m3", scale="axis", axis=0)
    assert torch.allclose(ours[0], out, atol=1e-5)
    assert torch.allclose(ours[1], dx, atol=1e-5)


@pytest.mark.parametrize(("scale", "shape"), [("tensor", (1, 1)), ("channel", (64, 1)), ("block", (64, 2)), (None, ())])
def test_scales(scale, shape):
    """As many scales as the granularity says: W · 2^j in one group alone multiplies that group by 2^j, exactly."""
    _, weight, _ = tensors()
    recipe = QuantRecipe("e2m1", scale=scale, block_size=16)
    before = recipe.quantize("P2", weight)
    changed = weight.detach().clone()
    group = {(1, 1): (slice(None), slice(None)), (64, 1): (3, slice(None)), (64, 2): (3, slice(16, 32)), (): (3, 5)}[
        shape
    ]
    changed[group] *= 2.0**-7
    expected = before.clone()
    expected[group] *= 2.0**-7
    assert torch.equal(recipe.quantize("P2", changed), expected) == (scale is not None)
    assert recipe.quantize("P1", weight) is weight


@settings(max_examples=25, deadline=None)
@given(power=st.integers(-30, 30), row=st.integers(0, 63), block=st.integers(0, 1), seed=st.integers(0, 99))
def test_scale_invariance_and_zeros(power, row, block, seed):
    _, weight, _ = tensors(seed=seed)
    recipe = QuantRecipe("e3m2", block_size=16)
    where = (row, slice(16 * block, 16 * block + 16))
    for factor in (2.0**power, 0.0):
        changed, expected = weight.detach().clone(), recipe.quantize("P2", weight).detach().clone()
        changed[where] *= factor
        expected[where] *= factor
        assert torch.equal(recipe.quantize("P2", changed), expected)


def test_the_last_block_of_tokens_may_be_smaller():
    x, weight, b = tensors((37,))
    recipe = QuantRecipe("e2m1", targets=("P5", "P6"), block_size=16)
    ours, grad = results(lambda *t: quant_linear(*t, recipe), x, weight, b)

    def quantized(t):
        parts = [fake_quantize(p, "e2m1", scale="axis", axis=0) for p in t.split(16)]
        return torch.cat(parts)

    assert torch.allclose(ours[2], quantized(grad).T @ quantized(x), atol=1e-5)


def test_blocks_along_the_last_axis():
    _, weight, _ = tensors()
    recipe = QuantRecipe("e2m1", block_size=16, block_axis="last")
    assert torch.equal(recipe.quantize("P4", weight), fake_quantize(weight, "e2m1", scale="block", block_size=16))


def test_the_papers_rounding_and_a_random_one():
    weight = torch.tensor([[6.0, 2.5, -0.25, 5.0]])
    rounded = {r: QuantRecipe("e2m1", scale="tensor", rounding=r).quantize("P2", weight) for r in ("even", "away")}
    assert rounded["even"].tolist() == [[6, 2, 0, 4]]
    assert rounded["away"].tolist() == [[6, 3, -0.5, 6]]
    recipe = QuantRecipe("e2m1", scale="tensor", rounding="stochastic")
    mean = torch.stack([recipe.quantize("P2", weight) for _ in range(400)]).mean(0)
    assert torch.allclose(mean, weight, atol=0.2)


def llama(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, num_attention_heads=2, bos_token_id=0, eos_token_id=None, pad_token_id=None, **options
    )
    return LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()


RECIPE = QuantRecipe("e2m1", block_size=16)
TOKENS = torch.arange(18).reshape(2, 9) * 7 % 64


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("build", [llama, gpt2, lambda: llama(tie_word_embeddings=True)])
def test_a_transformers_model_there_and_back(build):
    model, plain = build(), build()
    before, expected = loss_and_gradients(plain)
    parameters = dict(model.named_parameters())
    assert quantize_linears_(model, RECIPE) is model
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert type(model.lm_head) is nn.Linear
    changed = [n for n, m in model.named_modules() if type(m) not in {type(p) for p in plain.modules()}]
    assert len(changed) == 2 * (4 if build is gpt2 else 7)
    loss, gradients = loss_and_gradients(model)
    assert 0 < abs(loss - before) < 0.2
    assert gradients.keys() == expected.keys()

    quantize_linears_(model, NOTHING)
    again, bits = loss_and_gradients(model)
    assert torch.equal(again, before)
    assert all(torch.equal(bits[name], expected[name]) for name in bits)
    quantize_linears_(model, RECIPE)
    assert torch.equal(loss_and_gradients(model)[0], loss)
    assert dequantize_(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(loss_and_gradients(model)[0], before)


def test_gpt2s_transposed_weights_are_quantized_along_the_contraction():
    torch.manual_seed(0)
    conv, x = Conv1D(64, 32), torch.randn(3, 5, 32)
    linear = nn.Linear(32, 64)
    linear.weight.data, linear.bias.data = conv.weight.data.T.clone(), conv.bias.data
    for recipe in (RECIPE, QuantRecipe("e2m1", targets=OPERANDS, block_size=16)):
        pair = [quantize_linears_(nn.Sequential(m), recipe) for m in (conv, linear)]
        outs = [m(x) for m in pair]
        torch.testing.assert_close(*outs)
        grads = [torch.autograd.grad(out.square().sum(), m[0].weight)[0] for out, m in zip(outs, pair, strict=True)]
        torch.testing.assert_close(grads[0].T, grads[1])


def test_checkpoints_are_ordinary(tmp_path):
    model = quantize_linears_(llama(), RECIPE)
    assert model.state_dict().keys() == llama().state_dict().keys()
    llama().load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(quantize_linears_(loaded, RECIPE)(TOKENS).logits, model.eval()(TOKENS).logits)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(copied(TOKENS).logits, model(TOKENS).logits)


def test_activation_checkpointing_changes_no_bit():
    model = quantize_linears_(llama(), RECIPE).train()
    expected = loss_and_gradients(model)
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss, gradients = loss_and_gradients(model)
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(gradients[name], g) for name, g in expected[1].items())
    layer = QuantLinear(32, 64, recipe=QuantRecipe("e2m1", block_size=16, rounding="stochastic"))
    x = torch.randn(4, 32, requires_grad=True)
    out = checkpoint(lambda x: layer(x).square().sum(), x, use_reentrant=False)
    out.backward()
    assert x.grad.isfinite().all()


def test_it_compiles_without_graph_breaks():
    model = quantize_linears_(llama(), QuantRecipe("e2m1", targets=OPERANDS, block_size=16))
    expected = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(TOKENS, labels=TOKENS).loss
    loss.backward()
    torch.testing.assert_close(loss, expected[0])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[1][name], atol=1e-5, rtol=1e-3)


def test_autocast_is_that_of_a_plain_layer():
    x, weight, b = tensors((48,))
    layer = QuantLinear(32, 64, recipe=RECIPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        inside = quant_linear(x, weight, b, RECIPE)
    assert out.dtype == torch.bfloat16
    expected = x.bfloat16() @ fake_quantize(weight.bfloat16(), "e2m1", scale="block", block_size=16).T + b.bfloat16()
    assert torch.equal(inside, expected)
    out.sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32


def test_what_is_left_alone():
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    )
    quantize_linears_(bert, RECIPE)
    assert type(bert.classifier) is nn.Linear
    assert isinstance(bert.bert.encoder.layer[0].output.dense, QuantLinear)

    class Subclass(nn.Linear):
        pass

    tied = nn.ModuleDict({"words": nn.Embedding(9, 32), "up": nn.Linear(32, 64), "out": nn.Linear(32, 9, bias=False)})
    tied["other"] = Subclass(32, 64)
    tied["out"].weight = tied["words"].weight
    quantize_linears_(tied, RECIPE)
    assert [type(m) for m in tied.values()] == [nn.Embedding, QuantLinear, nn.Linear, Subclass]

    model = quantize_linears_(llama(), RECIPE, skip=["lm_head", "*layers.0.*", "v_proj"])
    names = [name for name, m in model.named_modules() if isinstance(m, QuantLinear)]
    assert len(names) == 6
    assert all("layers.1" in name and "v_proj" not in name for name in names)
    assert isinstance(quantize_linears_(llama(), RECIPE, skip=()).lm_head, QuantLinear)


def test_attention_of_torch_gets_a_warning():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    with pytest.warns(UserWarning, match="self_attn: nn.MultiheadAttention computes with its weights itself"):
        quantize_linears_(layer, RECIPE)
    assert isinstance(layer.linear1, QuantLinear)
    assert layer(torch.randn(2, 5, 32)).shape == (2, 5, 32)


def test_products_outside_of_layers_get_a_warning():
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 4}
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes))
    experts = sum(p.numel() for name, p in mixtral.named_parameters() if ".experts." in name)
    share = round(100 * experts / sum(p.numel() for p in mixtral.parameters()))
    with pytest.warns(UserWarning, match=rf"experts.gate_up_proj: 4 stacks of matrices, {share} % of the parameters"):
        quantize_linears_(mixtral, RECIPE)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, state_size=16))
    with pytest.warns(UserWarning, match="dt_proj: MambaMixer multiplies with its weight itself"):
        quantize_linears_(mamba, QuantRecipe("e2m1", block_size=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_linears_(llama(), RECIPE)


def test_falcons_layers_gates_and_adapters():
    falcon = FalconForCausalLM(FalconConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    tokens = torch.arange(8)[None]
    plain = falcon(tokens).logits
    quantize_linears_(falcon, NOTHING)
    assert isinstance(falcon.transformer.h[0].self_attention.query_key_value, QuantLinear)
    torch.testing.assert_close(falcon(tokens).logits, plain)

    gated = nn.ModuleDict({"gate": nn.Linear(32, 1), "up": nn.Linear(32, 64)})
    quantize_linears_(gated, RECIPE)
    assert [type(m) for m in gated.values()] == [nn.Linear, QuantLinear]

    adapted = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    quantize_linears_(adapted, RECIPE)
    kinds = {name.split(".default")[0].rpartition(".")[2]: type(m) for name, m in adapted.named_modules()}
    assert (kinds["lora_A"], kinds["lora_B"], kinds["base_layer"]) == (nn.Linear, nn.Linear, QuantLinear)
    with pytest.raises(ValueError, match=r"does not divide the 4 features of .*lora_A"):
        quantize_linears_(adapted, RECIPE, adapters=True)

    class Subclass(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"no linear layer to quantize .*; its Subclass may compute something of"):
        quantize_linears_(nn.Sequential(Subclass(32, 64)), RECIPE)


def test_what_cannot_be_done_changes_nothing():
    model = llama()
    with pytest.raises(ValueError, match=r"block_size: 48 does not divide the 32 features of model.layers.0.self_attn"):
        quantize_linears_(model, QuantRecipe("e2m1", block_size=48))
    with pytest.raises(ValueError, match=r"skip: no linear layer is called 'lm_heat'; there are model\.layers\.0"):
        quantize_linears_(model, RECIPE, skip=("lm_heat",))
    with pytest.raises(TypeError, match="skip: expected several patterns"):
        quantize_linears_(model, RECIPE, skip="lm_head")
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    with pytest.raises(ValueError, match="model: has no linear layer to quantize"):
        quantize_linears_(nn.ReLU(), RECIPE)
    with pytest.raises(ValueError, match="block_size: 16 does not divide the 30 features of the layer"):
        QuantLinear(30, 64, recipe=RECIPE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "e9m3"}, "exponent"),
        ({"format": "e4m"}, "format"),
        ({"targets": ("P7",)}, "targets: unknown value 'P7'; accepted: P1, P2"),
        ({"targets": "P2"}, "targets: expected several operands"),
        ({"format": {"P2": "e4m3"}, "targets": ("P2",)}, "give one of the two"),
        ({"scale": "chanel"}, "scale: unknown value 'chanel'; did you mean 'channel'?"),
        ({"block_size": 0}, "block_size: must be a whole number of at least 1, got 0"),
        ({"block_axis": "first"}, "block_axis: unknown value 'first'"),
        ({"rounding": "up"}, "rounding: unknown value 'up'"),
    ],
)
def test_a_recipe_that_cannot_be(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        QuantRecipe(**arguments)


def test_recipes_are_values():
    assert QuantRecipe("e4m3") == QuantRecipe({"P6": "e4m3", "P2": "e4m3", "P4": "e4m3"})
    assert len({QuantRecipe("e4m3"), QuantRecipe("e4m3"), QuantRecipe("e4m3", block_size=64)}) == 2
    assert repr(QuantRecipe("e4m3", scale="channel")) == (
        "QuantRecipe(P2=e4m3, P4=e4m3, P6=e4m3, scale=channel, rounding=even)"
    )
