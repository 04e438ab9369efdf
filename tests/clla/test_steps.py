"""Steps per channel: LSQ's gradient by hand, that nothing but codes is cached, and calibration against known optima."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tenfold.clla import CLLACache, CLLAForCausalLM, calibrate_steps
from tenfold.clla.formats import Format
from tenfold.clla.steps import initial_step, learned_step, least_squares_steps, normal_step
from tenfold.kernels.latent.packing import unpack_latents

TOPS = {("symmetric", 4): 7, ("symmetric", 8): 127, ("float", 4): 6, ("float", 8): 448}
each_code = pytest.mark.parametrize(("code", "bits"), TOPS)


@each_code
def test_the_gradient_is_lsqs(code, bits):
    """By hand: round(v) - v inside, ±Q outside, divided by √Q; and to c, 1 inside and 0 outside."""
    format, top = Format(1, 6, bits, code=code, scales=False), TOPS[code, bits]
    steps = torch.tensor([0.5, 0.25, -1.0, 2.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[2.2, -1.4, 0.3, top + 5.0, -top - 0.6, 0.0], [-3.1, 2.7, 5.2, 1.2, 0.9, 1e4]]).double()
    c = (v * steps.detach().abs()).requires_grad_()
    sigma = learned_step(steps, format)
    assert sigma.tolist() == [0.5, 0.25, 1.0, 2.0, 1.0, 0.5]
    seen = sigma * format.round(c / sigma)
    weights = torch.arange(1.0, 13.0, dtype=torch.float64).view(2, 6)
    by_step, by_latent = torch.autograd.grad((seen * weights).sum(), (steps, c))

    inside = v.abs() <= top
    rounded = (seen / sigma).detach()
    if code == "symmetric":
        assert rounded[inside].equal(v[inside].round())
    expected = torch.where(inside, rounded - v, top * v.sign()) * weights
    torch.testing.assert_close(by_step, expected.sum(0) / math.sqrt(top) * steps.detach().sign())
    torch.testing.assert_close(by_latent, weights * inside)


@each_code
def test_steps_begin_where_lsq_begins_them(build, code, bits):
    expected = 2 * math.sqrt(2 / math.pi) / math.sqrt(TOPS[code, bits])
    assert initial_step(Format(1, 24, bits, code=code, scales=False)) == pytest.approx(expected)
    model = build(cache_scales="channel", cache_code=code, cache_bits=bits)
    steps = {name: p for name, p in model.named_parameters() if "latent_steps" in name}
    assert list(steps) == [f"model.layers.{i}.self_attn.latent_steps" for i in (0, 2, 4)]
    assert all(p.shape == (24,) and torch.allclose(p, p.new_tensor(expected)) for p in steps.values())


@torch.no_grad()
def test_the_cache_holds_codes_alone_and_the_layers_see_codes_times_steps(build, tokens):
    model = build(cache_scales="channel", num_hidden_layers=2)
    producer = model.model.layers[0].self_attn
    producer.latent_steps.copy_(torch.linspace(0.05, 0.9, 24))
    seen = {}
    producer.kv_norm.register_forward_hook(lambda module, args, out: seen.update(c=out))
    cache = CLLACache(model.config)
    model(tokens, past_key_values=cache)
    latents = cache.layers[0].streams[0].read()
    assert latents.scales is None
    codes = unpack_latents(latents, dtype=torch.float64)[:, 0]
    assert codes.equal((seen["c"] / producer.latent_steps).round().clamp(-7, 7))
    # A model without rounding that is given ĉ: the norm's output replaced.
    exact = build(num_hidden_layers=2, cache_bits=16, rope_bits=4)
    exact.load_state_dict({k: v for k, v in model.state_dict().items() if "latent_steps" not in k})
    exact.model.layers[0].self_attn.kv_norm.register_forward_hook(lambda *_: codes * producer.latent_steps)
    expected = exact(tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-10)


def test_the_best_step_for_normal_numbers_is_the_known_one():
    """Max (1960), quantizing for minimum distortion: 15 uniform levels for a normal density, computed here anew."""
    x = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.1, 20.0])
    steps = least_squares_steps(x, Format(1, 3, 4, scales=False), torch.ones(3)) / torch.tensor([1.0, 0.1, 20.0])
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2)
    tried = torch.linspace(0.2, 0.6, 401, dtype=torch.float64)
    errors = torch.stack([((s * (grid / s).round().clamp(-7, 7) - grid).square() * density).sum() for s in tried])
    best = tried[errors.argmin()]
    assert best == pytest.approx(0.353, abs=0.002)
    torch.testing.assert_close(steps, best.float().expand(3), rtol=0.06, atol=0)
    assert normal_step(Format(1, 3, 4, scales=False)) == pytest.approx(best.item(), rel=0.03)
    noise = (steps[0] * (x[:, 0] / steps[0]).round().clamp(-7, 7) - x[:, 0]).square().mean()
    assert 10 * math.log10(x[:, 0].square().mean() / noise) == pytest.approx(18.8, abs=0.1)


@each_code
def test_calibration_of_a_trained_model(build, tokens, tmp_path, code, bits):
    """Steps set on a text round it better than those that training begins with, for odd channels above all."""
    trained = build(cache_bits=16)
    for layer in trained.model.layers:
        if layer.self_attn.produces:
            layer.self_attn.kv_norm.weight.data.copy_(torch.logspace(-2, 2, 24))
            layer.self_attn.k_up_proj.weight.data /= torch.logspace(-2, 2, 24)
    trained.save_pretrained(tmp_path)
    model = CLLAForCausalLM.from_pretrained(
        tmp_path, cache_scales="channel", cache_code=code, cache_bits=bits, dtype=torch.float64
    )
    steps = model.model.layers[0].self_attn.latent_steps
    assert steps.allclose(steps.new_tensor(initial_step(Format(1, 24, bits, code=code))))

    def loss(m):
        with torch.no_grad():
            return F.mse_loss(m(tokens, use_cache=False).logits, trained(tokens, use_cache=False).logits)

    before = loss(model)
    calibrate_steps(model.train(), tokens)
    assert model.training
    assert steps.requires_grad
    assert loss(model.eval()) < before / 3
    assert not any(module._forward_hooks for module in model.modules())


def test_channels_of_zeros_keep_their_steps():
    x = torch.tensor([[0.0, 1.0], [0.0, -3.0]])
    found = least_squares_steps(x, Format(1, 2, 4, scales=False), torch.tensor([0.7, 0.7]))
    assert found[0] == torch.tensor(0.7)
    assert found[1] < 0.7


@pytest.mark.parametrize("changes", [{}, {"cache_scales": "channel", "cache_bits": 16}, {"name": "MHA"}], ids=str)
def test_what_calibration_refuses(build, tokens, changes):
    with pytest.raises(ValueError, match="model: has no steps to calibrate; they need attention 'latent', cache_scal"):
        calibrate_steps(build(**changes), tokens)


@torch.no_grad()
def test_decoding_scales_no_weights(build, tokens):
    """Steps go to the query and to the output; the weights, of which there are far more, stay as they are."""
    model = build(cache_scales="channel").float()
    cache = CLLACache(model.config)
    model(tokens, past_key_values=cache)
    weight = model.model.layers[0].self_attn.k_up_proj.weight
    products = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.mul, torch.Tensor.__mul__, torch.mul):
                products.append(max(x.numel() for x in args if isinstance(x, torch.Tensor)))
            return function(*args, **(kwargs or {}))

    with Watch():
        model(tokens[:, :1], past_key_values=cache)
    assert products
    assert max(products) < weight.numel()


@pytest.mark.parametrize("part", [slice(0), 0], ids=["none", "a row"])
def test_calibration_needs_rows_of_tokens(build, tokens, part):
    with pytest.raises(ValueError, match=r"tokens: expected \(rows, time\), not empty, got \("):
        calibrate_steps(build(cache_scales="channel"), tokens[part])
