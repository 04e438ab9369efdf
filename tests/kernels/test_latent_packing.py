"""Packed latents: every code, the scales' rounding, the error they promise, and what training sees of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import PackedLatents, fake_pack_latents, pack_latents, unpack_latents

TOP = {4: 7, 8: 127}


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_comes_back(bits, scale_dtype):
    codes = torch.arange(-TOP[bits], TOP[bits] + 1)
    for place in range(3):  # an odd width, then an even one, and each code at odd and even places
        x = torch.cat([torch.zeros(place), codes]) * 0.25
        packed = pack_latents(x, bits=bits, group_size=512, scale_dtype=scale_dtype)
        assert packed.scales.tolist() == [0.25]
        assert unpack_latents(packed).equal(x)


def test_worked_by_hand():
    # Largest magnitude 3.5, so s = 1/2 and the codes are -7, 2 (a tie, to even), 3, 0 and 4 (a tie): 5 codes,
    # 3 of them in the low halves.
    packed = pack_latents(torch.tensor([-3.5, 1.25, 1.4, 0.2, 1.75]))
    assert packed.codes.tolist() == [9 + (0 << 4), 2 + (4 << 4), 3]
    assert packed.scales.tolist() == [0.5]
    assert unpack_latents(packed).tolist() == [-3.5, 1.0, 1.5, 0.0, 2.0]
    assert packed.shape == (5,)


def test_four_bits_are_the_format_e1m2():
    # One exponent bit, two mantissa bits: m/4 of the least exponent when it is 0, (1 + m/4) when it is 1.
    magnitudes = [m / 4 for m in range(4)] + [1 + m / 4 for m in range(4)]
    x = torch.tensor([sign * m for m in magnitudes for sign in (1, -1)])
    packed = pack_latents(x)
    assert unpack_latents(packed).equal(x)
    assert packed.scales.tolist() == [0.25]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_error_is_at_most_half_a_scale(data):
    bits = data.draw(st.sampled_from([4, 8]))
    group = data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    scale_dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    shape = [data.draw(st.integers(0, 4)) for _ in range(data.draw(st.integers(0, 2)))]
    x = torch.randn(*shape, data.draw(st.integers(1, 90)), generator=generator)
    size = 10.0 ** data.draw(st.integers(-9, 4))  # down to where half-precision scales are subnormal, or 0
    x = (x * torch.rand(x.shape[-1], generator=generator).pow(3) * size).to(dtype)

    packed = pack_latents(x, bits=bits, group_size=group, scale_dtype=scale_dtype)
    codes = unpack_latents(packed._replace(scales=torch.ones_like(packed.scales)))
    assert codes.abs().le(TOP[bits]).all()
    back = unpack_latents(packed, dtype=torch.float64)
    limit = packed.scales.double().repeat_interleave(group, -1)[..., : x.shape[-1]] / 2
    # x / s is computed in float32: a tie may go to the wrong side by its rounding.
    assert ((x.double() - back).abs() <= limit * (1 + 1e-5)).all()
    # The scale is no larger than it must be: the next smaller one would clip the group's largest number.
    for i in range(packed.scales.shape[-1]):
        peak = x[..., i * group : (i + 1) * group].abs().amax(-1).double() / TOP[bits]
        scale = packed.scales[..., i]
        below = (scale.view(torch.int32 if scale_dtype == torch.float32 else torch.int16) - 1).view(scale_dtype)
        assert ((peak == 0) == (scale == 0)).all()
        assert (scale.double() >= peak * (1 - 1e-6)).all()
        assert (below.double() < peak * (1 + 1e-6))[peak > 0].all()


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_again_changes_nothing(bits):
    x = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    packed = pack_latents(x, bits=bits, group_size=32)
    again = pack_latents(unpack_latents(packed), bits=bits, group_size=32)
    assert again.codes.equal(packed.codes)
    assert again.scales.equal(packed.scales)


@pytest.mark.parametrize(("group", "decibels"), [(32, 20.26), (64, 19.36), (128, 18.61), (256, 17.97), (512, 17.42)])
def test_signal_to_noise_of_a_standard_normal(group, decibels):
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    error = x - fake_pack_latents(x, group_size=group)
    assert 10 * math.log10(x.square().sum() / error.square().sum()) == pytest.approx(decibels, abs=0.05)


def test_bytes_of_the_papers_cache():
    # Latent 512 and rotary key 64 for two layers, against keys and values 2048 wide in bfloat16 for each.
    packed = [pack_latents(torch.randn(10, width)) for width in (512, 64)]
    stored = sum(x.untyped_storage().nbytes() for p in packed for x in (p.codes, p.scales))
    assert stored == 10 * (256 + 4 * 2 + 32 + 2)
    assert stored / (10 * 2 * 2 * 2048 * 2) == pytest.approx(0.0182, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
def test_training_sees_what_is_read_back(bits, dtype):
    x = torch.randn(3, 7, 70, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    seen = fake_pack_latents(x, bits=bits, group_size=32)
    assert seen.dtype == dtype
    assert seen.equal(unpack_latents(pack_latents(x, bits=bits, group_size=32), dtype=dtype))
    grad = torch.randn_like(seen)
    assert torch.autograd.grad(seen, x, grad)[0].equal(grad)


def test_the_straight_through_gradient_under_compile():
    x = torch.randn(3, 70, requires_grad=True)
    compiled = torch.compile(lambda x: fake_pack_latents(2 * x).square(), fullgraph=True, backend="aot_eager")
    seen = compiled(x)
    assert seen.equal(fake_pack_latents(2 * x.detach()).square())
    (grad,) = torch.autograd.grad(seen.sum(), x)
    assert grad.equal(4 * fake_pack_latents(2 * x.detach()))


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits):
    packed = pack_latents(torch.zeros(2, 3, 33), bits=bits, group_size=16)
    assert packed.scales.eq(0).all()
    assert unpack_latents(packed).eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e6])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_scale_cannot_hold_reads_as_nan_in_its_group_alone(bits, bad):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    x[1, 40] = bad if bits == 4 else bad * 20
    back = fake_pack_latents(x, bits=bits, group_size=16)
    assert back[1, 32:48].isnan().all()
    others = torch.ones(2, 64, dtype=torch.bool)
    others[1, 32:48] = False
    assert back[others].isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_vectors_stand_for_themselves(bits):
    def of(p: PackedLatents, f) -> PackedLatents:
        return p._replace(codes=f(p.codes), scales=f(p.scales))

    x = torch.randn(3, 10, 33, generator=torch.Generator().manual_seed(0))
    packed = pack_latents(x, bits=bits, group_size=16)
    whole = unpack_latents(packed)
    order = torch.tensor([2, 0, 2])
    for f in (
        lambda t: t[:, 4:9],
        lambda t: t[order],
        lambda t: torch.cat([t[:, :4], t[:, 4:]], 1),
        lambda t: t.repeat_interleave(2, 0),
        lambda t: t.mT.contiguous().mT,
    ):
        assert unpack_latents(of(packed, f)).equal(f(whole))
    one_by_one = [pack_latents(x[:, t : t + 1], bits=bits, group_size=16).codes for t in range(10)]
    assert torch.cat(one_by_one, 1).equal(packed.codes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4).int()}, TypeError, "x: expected a floating-point tensor, got torch.int32"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"x: expected .* got shape \(3, 0\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected .* got shape \(\)"),
        ({"bits": 3}, ValueError, "bits: expected 4 or 8, got 3"),
        ({"group_size": 0}, ValueError, "group_size: expected at least 1, got 0"),
        ({"scale_dtype": torch.float64}, TypeError, "scale_dtype: torch.float64 is not .* accepted: torch.float16"),
    ],
)
@pytest.mark.parametrize("pack", [pack_latents, fake_pack_latents])
def test_errors_name_the_argument(pack, change, error, message):
    with pytest.raises(error, match=message):
        pack(**({"x": torch.zeros(3, 4)} | change))


def test_what_does_not_belong_together_is_refused():
    packed = pack_latents(torch.randn(3, 40), group_size=16)
    for change, error, message in (
        ({"bits": 5}, ValueError, "packed.bits: expected 4 or 8, got 5"),
        ({"codes": packed.codes.int()}, TypeError, "packed.codes: expected torch.uint8, got torch.int32"),
        ({"scales": packed.scales.int()}, TypeError, "packed.scales: dtype torch.int32 is not supported"),
        ({"codes": packed.codes[:, :19]}, ValueError, r"packed.codes: expected \(…, 20\) for 40 .* \(3, 19\)"),
        ({"scales": packed.scales[:2]}, ValueError, r"packed.scales: expected \(3, 3\) .* got \(2, 3\)"),
        ({"group_size": 8}, ValueError, r"packed.scales: expected \(3, 5\) .* got \(3, 3\)"),
        ({"bits": 8}, ValueError, r"packed.codes: expected \(…, 40\)"),
        ({"scales": packed.scales.to("meta")}, ValueError, "packed.scales: is on meta, the codes on cpu"),
    ):
        with pytest.raises(error, match=message):
            unpack_latents(packed._replace(**change))
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point dtype, got torch\.int8"):
        unpack_latents(packed, dtype=torch.int8)
