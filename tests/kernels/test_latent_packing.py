"""Packed latents: every code, the scales' rounding, the error they promise, and what training sees of them."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import fake_pack_latents, pack_latents, unpack_latents

TOP = {4: 7, 8: 127}
MINIFLOATS = {4: ml_dtypes.float4_e2m1fn, 8: ml_dtypes.float8_e4m3fn}
CODES = ["symmetric", "asymmetric", "float"]


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


def test_asymmetric_codes_worked_by_hand():
    # From -1 to 6.5 is 15 steps of 1/2; 0.2 is 2.4 steps above -1.
    packed = pack_latents(torch.tensor([6.5, -1.0, 0.2, 3.0]), code="asymmetric")
    assert packed.scales.tolist() == [0.5, -1.0]
    assert packed.codes.tolist() == [15 + (2 << 4), 0 + (8 << 4)]
    assert unpack_latents(packed).tolist() == [6.5, -1.0, 0.0, 3.0]
    assert pack_latents(torch.full((7,), 2.5), code="asymmetric").scales.tolist() == [0.0, 2.5]


def unpacked_codes(packed):
    """One code a byte."""
    if packed.bits == 8:
        return packed.codes
    return torch.cat([packed.codes & 15, packed.codes >> 4], -1)[..., : packed.width]


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_of_a_minifloat(bits):
    codes = np.arange(2**bits, dtype=np.uint8)
    values = torch.from_numpy(codes.view(MINIFLOATS[bits]).astype(np.float64))
    numbers = values.isfinite()
    assert numbers.sum() == {4: 16, 8: 254}[bits]
    for scale_dtype, scale in ((None, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**-24), (torch.float32, 2.0**-60)):
        packed = pack_latents(values[numbers] * scale, bits=bits, code="float", group_size=512, scale_dtype=scale_dtype)
        assert unpacked_codes(packed).equal(torch.from_numpy(codes)[numbers])
        assert unpack_latents(packed, dtype=torch.float64).equal(values[numbers] * scale)
        assert unpack_latents(packed).double().equal(values[numbers] * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_minifloats_round_as_in_ml_dtypes(bits, dtype):
    grid = torch.arange(2**bits, dtype=torch.uint8).numpy().view(MINIFLOATS[bits]).astype(np.float64)
    grid = torch.from_numpy(np.sort(grid[np.isfinite(grid)]))
    middle = (grid[1:] + grid[:-1]) / 2  # ties
    near = [middle * (1 + sign * 2.0**-20) for sign in (1, -1)]
    x = torch.cat([grid, middle, *near, torch.randn(2000, generator=torch.Generator().manual_seed(0)).double()])
    x = x.to(dtype).clamp(grid[0], grid[-1])
    expected = x.to(torch.float64).numpy().astype(MINIFLOATS[bits])
    packed = pack_latents(x, bits=bits, code="float", scale_dtype=None)
    assert unpacked_codes(packed).equal(torch.from_numpy(expected.view(np.uint8)))
    if bits == 8 and dtype != torch.float64:  # which torch rounds twice
        assert packed.codes.equal(x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("code", ["symmetric", "float"])
def test_without_scales_what_is_too_large_is_clipped(code, bits):
    top = TOP[bits] if code == "symmetric" else {4: 6, 8: 448}[bits]
    x = torch.tensor([top + 0.4, -1e30, torch.inf, -torch.inf, torch.nan, 2.0, 0.0]).requires_grad_()
    packed = pack_latents(x, bits=bits, code=code, scale_dtype=None)
    assert packed.scales is None
    assert packed.tensors == (packed.codes,)
    assert unpack_latents(packed).tolist() == [top, -top, top, -top, 0, 2, 0]
    assert bits == 4 or code == "symmetric" or (packed.codes & 127).ne(127).all()  # E4M3's NaN
    seen = fake_pack_latents(x, bits=bits, code=code, scale_dtype=None)
    assert seen.tolist() == [top, -top, top, -top, 0, 2, 0]
    (grad,) = torch.autograd.grad(seen.sum(), x)
    assert grad.tolist() == [0, 0, 0, 0, 1, 1, 1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_error_of_asymmetric_codes_is_at_most_half_a_scale(data):
    bits, group = data.draw(st.sampled_from([4, 8])), data.draw(st.integers(1, 40))
    scale_dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x = torch.randn(3, data.draw(st.integers(1, 90)), generator=generator) + data.draw(st.floats(-5, 5))
    x *= 10.0 ** data.draw(st.integers(-9, 3))
    packed = pack_latents(x, bits=bits, group_size=group, code="asymmetric", scale_dtype=scale_dtype)
    scales, offsets = (s.double() for s in packed.scales.chunk(2, -1))
    codes = unpacked_codes(packed).double()
    spread = (s.repeat_interleave(group, -1)[..., : x.shape[-1]] for s in (scales, offsets))
    scale, offset = spread
    assert unpack_latents(packed, dtype=torch.float64).equal(offset + scale * codes)
    error = (x.double() - (offset + scale * codes)).abs()
    assert (error <= scale / 2 * (1 + 1e-5) + x.abs() * 1e-6).all()
    assert (x.double() >= offset).all()
    for i in range(scales.shape[-1]):  # the next larger offset would be above the group's smallest number
        low = x[:, i * group : (i + 1) * group].double().amin(-1)
        assert (low - offsets[:, i] <= low.abs() * 2 * torch.finfo(scale_dtype).eps + 2.0**-24).all()


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
@pytest.mark.parametrize("code", ["symmetric", "float"])
def test_packing_again_changes_nothing(code, bits):
    x = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    packed = pack_latents(x, bits=bits, code=code, group_size=32)
    again = pack_latents(unpack_latents(packed), bits=bits, code=code, group_size=32)
    assert again.codes.equal(packed.codes)
    assert again.scales.equal(packed.scales)


@pytest.mark.parametrize(("group", "decibels"), [(32, 20.26), (64, 19.36), (128, 18.61), (256, 17.97), (512, 17.42)])
def test_signal_to_noise_of_a_standard_normal(group, decibels):
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    error = x - fake_pack_latents(x, group_size=group)
    assert 10 * math.log10(x.square().sum() / error.square().sum()) == pytest.approx(decibels, abs=0.05)


@pytest.mark.parametrize(
    ("options", "decibels"),
    [
        ({"code": "asymmetric"}, 20.02),
        ({"code": "float"}, 19.25),
        ({"code": "symmetric", "bits": 8}, 43.79),
        ({"code": "asymmetric", "bits": 8}, 44.62),
        ({"code": "float", "bits": 8}, 31.79),
    ],
)
def test_signal_to_noise_of_the_other_codes(options, decibels):
    """Of groups of 128, against another computation of the same: numpy's, with scales that are not rounded."""
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    error = x - fake_pack_latents(x, **options)
    assert 10 * math.log10(x.square().sum() / error.square().sum()) == pytest.approx(decibels, abs=0.05)
    groups = x.double().view(-1, 128).numpy()
    bits = options.get("bits", 4)
    if options["code"] == "float":
        scale = abs(groups).max(1, keepdims=True) / {4: 6, 8: 448}[bits]
        seen = (groups / scale).astype(MINIFLOATS[bits]).astype(np.float64) * scale
    else:
        low = groups.min(1, keepdims=True) if options["code"] == "asymmetric" else 0 * groups[:, :1]
        top = 2**bits - 1 if options["code"] == "asymmetric" else TOP[bits]
        scale = abs(groups - low).max(1, keepdims=True) / top
        seen = np.rint((groups - low) / scale) * scale + low
    truth = 10 * np.log10((groups**2).sum() / ((groups - seen) ** 2).sum())
    assert truth == pytest.approx(decibels, abs=0.05)


@pytest.mark.parametrize(
    ("options", "scales"),
    [({}, 2), ({"code": "float"}, 2), ({"code": "asymmetric"}, 4), ({"scale_dtype": None}, 0)],
)
def test_bytes_of_the_papers_cache(options, scales):
    # Latent 512 and rotary key 64 for two layers, against keys and values 2048 wide in bfloat16 for each.
    packed = [pack_latents(torch.randn(10, width), **options) for width in (512, 64)]
    stored = sum(x.untyped_storage().nbytes() for p in packed for x in p.tensors)
    assert stored == 10 * (256 + 4 * scales + 32 + scales)
    share = {0: 0.017578125, 2: 0.0182, 4: 0.0188}[scales]
    assert stored / (10 * 2 * 2 * 2048 * 2) == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("code", CODES)
def test_training_sees_what_is_read_back(code, bits, dtype):
    x = torch.randn(3, 7, 70, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    seen = fake_pack_latents(x, bits=bits, code=code, group_size=32)
    assert seen.dtype == dtype
    assert seen.equal(unpack_latents(pack_latents(x, bits=bits, code=code, group_size=32), dtype=dtype))
    grad = torch.randn_like(seen)
    assert torch.autograd.grad(seen, x, grad)[0].equal(grad)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("options", [{}, {"code": "asymmetric"}, {"code": "float"}, {"scale_dtype": None}])
def test_autocast_changes_nothing(options, bits):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = fake_pack_latents(x, bits=bits, group_size=32, **options)
        for half in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", half):
                assert fake_pack_latents(x, bits=bits, group_size=32, **options).equal(expected)


@pytest.mark.parametrize(
    "options", [{}, {"code": "asymmetric"}, {"code": "float"}, {"scale_dtype": None}, {"code": "float", "bits": 8}]
)
def test_the_straight_through_gradient_under_compile(options):
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)  # without scales, 7 / 2 is clipped
    x.requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: fake_pack_latents(2 * x, **options).square(), fullgraph=True, backend="aot_eager"
    )
    seen = compiled(x)
    assert seen.equal(fake_pack_latents(2 * x.detach(), **options).square())
    (grad,) = torch.autograd.grad(seen.sum(), x)
    assert grad.equal(4 * fake_pack_latents(2 * x.detach(), **options))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("code", CODES)
def test_zeros_stay_zeros(code, bits):
    packed = pack_latents(torch.zeros(2, 3, 33), bits=bits, code=code, group_size=16)
    assert packed.scales.eq(0).all()
    assert unpack_latents(packed).eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e8, -1e8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("code", CODES)
def test_what_a_scale_cannot_hold_reads_as_nan_in_its_group_alone(code, bits, bad):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    x[1, 40] = bad
    back = fake_pack_latents(x, bits=bits, code=code, group_size=16)
    assert back[1, 32:48].isnan().all()
    others = torch.ones(2, 64, dtype=torch.bool)
    others[1, 32:48] = False
    assert back[others].isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("options", [{}, {"code": "asymmetric"}, {"code": "float"}, {"scale_dtype": None}])
def test_vectors_stand_for_themselves(options, bits):
    x = torch.randn(3, 10, 33, generator=torch.Generator().manual_seed(0))
    packed = pack_latents(x, bits=bits, group_size=16, **options)
    assert packed.shape == x.shape
    whole = unpack_latents(packed)
    order = torch.tensor([2, 0, 2])
    for f in (
        lambda t: t[:, 4:9],
        lambda t: t[order],
        lambda t: torch.cat([t[:, :4], t[:, 4:]], 1),
        lambda t: t.repeat_interleave(2, 0),
        lambda t: t.mT.contiguous().mT,
    ):
        assert unpack_latents(packed.map(f)).equal(f(whole))
        assert packed.map(f).shape == f(x).shape
    one_by_one = [pack_latents(x[:, t : t + 1], bits=bits, group_size=16, **options).codes for t in range(10)]
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
        ({"code": "int"}, ValueError, "code: expected symmetric, asymmetric, float, got 'int'"),
        ({"code": "asymmetric", "scale_dtype": None}, ValueError, "scale_dtype: is None, but asymmetric codes need"),
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
        ({"code": "int"}, ValueError, "packed.code: expected symmetric, asymmetric, float, got 'int'"),
        ({"code": "asymmetric"}, ValueError, r"packed.scales: expected \(3, 6\) .* got \(3, 3\)"),
        ({"code": "asymmetric", "scales": None}, ValueError, "packed.scales: are None, but asymmetric codes need"),
        ({"codes": packed.codes[:, :19], "scales": None}, ValueError, r"packed.codes: expected \(…, 20\)"),
    ):
        with pytest.raises(error, match=message):
            unpack_latents(packed._replace(**change))
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point dtype, got torch\.int8"):
        unpack_latents(packed, dtype=torch.int8)
