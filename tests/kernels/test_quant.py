"""Formats and rounding on the CPU against the paper's table, ml_dtypes, gfloat, torchao, and numbers by hand."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import Domain, FormatInfo, RoundMode, round_ndarray
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import FloatFormat, fake_quantize, use_backend
from tenfold.kernels.quant.philox import random_words
from tenfold.kernels.testing import assert_same_bits, bit_patterns

EVERY_FORMAT = [FloatFormat(E, M) for E in range(9) for M in range(11) if 1 <= E + M <= 15]
SOME_FORMATS = ["e0m3", "e1m1", "e2m1", "e3m0", "e3m2", "e4m3", "e4m3fn", "e5m2ocp", "e5m10ieee", "e7m8", "e8m7"]
ROUNDINGS = {"even": RoundMode.TiesToEven, "away": RoundMode.TiesToAway}
ML_DTYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3ieee": ml_dtypes.float8_e4m3,
    "e3m4ieee": ml_dtypes.float8_e3m4,
    "e5m2ocp": ml_dtypes.float8_e5m2,
    "e3m2fn": ml_dtypes.float6_e3m2fn,
    "e2m3fn": ml_dtypes.float6_e2m3fn,
    "e2m1fn": ml_dtypes.float4_e2m1fn,
}


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def as_gfloat(format: FloatFormat) -> FormatInfo:
    """The same format, as gfloat describes it."""
    M = format.mantissa_bits
    return FormatInfo(
        *(format.name, format.bits, M + 1),
        bias=format.bias,
        is_signed=True,
        domain=Domain.Extended if format.specials == "ieee" else Domain.Finite,
        has_nz=True,
        num_high_nans={"none": 0, "nan": 1, "ieee": 2**M - 1}[format.specials],
        has_subnormals=True,
        is_twos_complement=False,
    )


def magnitudes(format):
    return format.values()[: format.max_code + 1]


def neighbourhood(format):
    """Every number, every midpoint, and the float32 on either side of each, where float32 has them."""
    numbers = magnitudes(format)
    points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    exact = points.float()[points.float().double() == points]
    up, down = (torch.nextafter(exact, torch.tensor(to)) for to in (math.inf, -1.0))
    points = torch.cat([exact, up, down])
    points = points[points.isfinite()]
    return torch.cat([points, -points])


@pytest.mark.parametrize(
    ("name", "largest", "normal", "subnormal"),
    [  # the paper's formats
        ("e1m1", 3, 2, 1),
        ("e1m2", 3.5, 2, 0.5),
        ("e2m1", 6, 1, 0.5),
        ("e2m2", 7, 1, 0.25),
        ("e2m3", 7.5, 1, 0.125),
        ("e3m1", 24, 0.25, 0.125),
        ("e3m2", 28, 0.25, 2**-4),
        ("e4m1", 384, 2**-6, 2**-7),
        ("e4m3", 480, 2**-6, 2**-9),
        ("e4m5", 504, 2**-6, 2**-11),
        ("e5m1", 98304, 2**-14, 2**-15),
        ("e5m2", 114688, 2**-14, 2**-16),
        ("e1m6", 3.96875, 2, 2**-5),
        ("e6m1", 1.5 * 2**32, 2**-30, 2**-31),
        # others'
        ("e4m3fn", 448, 2**-6, 2**-9),
        ("e5m2ocp", 57344, 2**-14, 2**-16),
        ("float16", 65504, 2**-14, 2**-24),
        ("bfloat16", torch.finfo(torch.bfloat16).max, 2**-126, 2**-133),
        ("e0m7", 127 / 64, None, 1 / 64),  # OCP's int8, without -128
        ("e3m0", 16, 0.25, None),
        ("e4m3nanb11", 28, 2**-10, 2**-13),
    ],
)
def test_the_table_of_formats(name, largest, normal, subnormal):
    format = FloatFormat.parse(name)
    assert (format.max, format.smallest_normal, format.smallest_subnormal) == (largest, normal, subnormal)


@pytest.mark.parametrize("specials", ["none", "nan", "ieee"])
def test_every_format_has_its_numbers_in_order_and_a_name(specials):
    count = 0
    for E in range(9):
        for M in range(11):
            try:
                format = FloatFormat(E, M, specials)
            except ValueError:
                continue
            count += 1
            values = format.values()
            assert len(values) == 2**format.bits == 2 ** (E + M + 1)
            numbers = magnitudes(format)
            assert (numbers.diff() > 0).all()
            assert numbers[-1] == format.max
            assert values[: len(values) // 2].isnan().sum() == {"none": 0, "nan": 1, "ieee": 2**M - 1}[specials]
            assert FloatFormat.parse(str(format)) == format
            if E <= 1 and specials == "none":
                assert numbers.diff().unique().numel() == 1  # uniform
    # Of 9 · 11 splits e0m0 and 6 of more than 16 bits are none; NaN has no code in e0m* and e1m0; infinity needs more.
    assert count == {"none": 92, "nan": 81, "ieee": 64}[specials]


def test_names_of_others():
    same = {"e4m3ocp": "e4m3fn", "e5m2ocp": "float8_e5m2", "e3m2fn": "e3m2", "e2m1fn": "float4_e2m1fn"}
    for one, other in same.items():
        assert FloatFormat.parse(one) == FloatFormat.parse(other)
    assert str(FloatFormat(4, 3, "nan")) == "e4m3fn"
    assert str(FloatFormat(4, 3, bias=11)) == "e4m3b11"
    assert FloatFormat.parse(FloatFormat(2, 1)) == FloatFormat(2, 1)


def test_every_number_and_every_midpoint_of_every_format(backend):
    for format in EVERY_FORMAT:
        numbers = magnitudes(format)
        numbers = numbers[numbers < torch.finfo(torch.float32).max]
        points = (numbers[1:] + numbers[:-1]) / 2
        lower = torch.arange(len(points))
        exact = points.float().double() == points  # in e8m*, midpoints of subnormals may be too small for float32
        points, lower = points[exact].float(), lower[exact]
        for rounding, of_tie in (("even", lower + lower % 2), ("away", lower + 1)):
            expected = [(numbers.float(), numbers), (points, numbers[of_tie])]
            expected += [(torch.nextafter(points, torch.tensor(math.inf)), numbers[lower + 1])]
            expected += [(torch.nextafter(points, torch.tensor(0.0)), numbers[lower])]
            for x, y in expected:
                for sign in (1.0, -1.0):
                    found = fake_quantize(sign * x, format, rounding=rounding)
                    assert_same_bits(found, sign * y.float(), name=f"{format}, {rounding}")


def test_the_papers_ties():
    ties = torch.tensor([0.25, 2.5, 5.0, -0.25, -2.5, -5.0])
    assert fake_quantize(ties, "e2m1").tolist() == [0.0, 2.0, 4.0, -0.0, -2.0, -4.0]
    assert fake_quantize(ties, "e2m1", rounding="away").tolist() == [0.5, 3.0, 6.0, -0.5, -3.0, -6.0]


@pytest.mark.parametrize("name", list(ML_DTYPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_difference_from_ml_dtypes(backend, name, dtype):
    format = FloatFormat.parse(name)
    x = (
        bit_patterns(dtype)
        if dtype != torch.float32
        else torch.cat([bit_patterns(dtype, 1 << 17), neighbourhood(format)])
    )
    x = x[~x.isnan()]
    # Beyond the largest number we saturate; theirs may give infinity or NaN.
    expected = x.float().clamp(-format.max, format.max).numpy().astype(ML_DTYPES[name]).astype(np.float32)
    assert_same_bits(fake_quantize(x, format), torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
@pytest.mark.parametrize(
    "name", [*SOME_FORMATS, "e0m7", "e1m10", "e2m9nan", "e3m0nan", "e6m1", "e7m0", "e7m8ieee", "e8m0"]
)
def test_no_difference_from_gfloat(backend, name, rounding):
    format = FloatFormat.parse(name)
    x = torch.cat([neighbourhood(format), bit_patterns(torch.float32, 1 << 14)])
    x = x[~x.isnan()]
    expected = round_ndarray(as_gfloat(format), x.double().numpy(), ROUNDINGS[rounding], sat=True)
    # e8m* have numbers that float32 has not: to those nothing is rounded.
    expected = torch.from_numpy(expected).float()
    top = format.largest_within(torch.finfo(torch.float32).max)
    assert_same_bits(fake_quantize(x, format, rounding=rounding), expected.clamp(-top, top))


@pytest.mark.parametrize(("mode", "ours"), [("FLOOR", "mx"), ("RCEIL", "power_of_two")])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2ocp", "e2m1"])
def test_powers_of_two_are_those_of_torchaos_mx_formats(backend, name, mode, ours):
    to_mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode

    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None]
    element = {"e4m3fn": torch.float8_e4m3fn, "e5m2ocp": torch.float8_e5m2, "e2m1": torch.float4_e2m1fn_x2}[name]
    scale, codes = to_mx.to_mx(x, element, 32, ScaleCalculationMode[mode])
    theirs = to_mx.to_dtype(codes, scale, element, 32, torch.float32)
    found = fake_quantize(x, name, scale="block", block_size=32, scale_rounding=ours)
    assert found.equal(theirs.view_as(x))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(x=st.lists(floats, min_size=2, max_size=40), name=st.sampled_from(SOME_FORMATS), data=st.data())
def test_properties_without_a_scale(x, name, data):
    rounding = data.draw(st.sampled_from(["even", "away"]))
    x = torch.tensor(x).sort().values
    y = fake_quantize(x, name, rounding=rounding)
    assert fake_quantize(y, name, rounding=rounding).equal(y)
    assert (y.diff() >= 0).all()
    assert_same_bits(fake_quantize(-x, name, rounding=rounding), -y)
    numbers = magnitudes(FloatFormat.parse(name)).float()
    distance = (x.abs()[:, None].double() - numbers[numbers.isfinite()]).abs().amin(1)
    assert (x.double() - y.double()).abs().equal(distance)  # there is no nearer number


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_properties_with_a_scale(data):
    name = data.draw(st.sampled_from(SOME_FORMATS))
    seed, length = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([1, 2, 3, 16, 100]))
    options = {"scale": data.draw(st.sampled_from(["tensor", "axis", "block"])), "block_size": length}
    options["scale_rounding"] = data.draw(st.sampled_from(["exact", "power_of_two", "mx"]))
    x = torch.randn(6, 2 * length, generator=torch.Generator().manual_seed(seed))
    y = fake_quantize(x, name, **options)
    assert_same_bits(fake_quantize(-x, name, **options), -y)
    shift = 2.0 ** data.draw(st.integers(-20, 20))
    if name[:2] != "e8":  # whose scale has no room above
        assert fake_quantize(x * shift, name, **options).equal(y * shift)
    if options["scale_rounding"] == "exact" and options["scale"] == "block":
        blocks, found = x.view(-1, length), y.view(-1, length)
        top = blocks.abs().argmax(1, keepdim=True)
        torch.testing.assert_close(found.gather(1, top), blocks.gather(1, top), rtol=3e-7, atol=0)


def test_uniform_formats_of_one_width_are_one(backend):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for scale in ("tensor", "axis", "block"):
        for M in range(2, 11):
            ones = fake_quantize(x, FloatFormat(1, M - 1), scale=scale)
            assert_same_bits(fake_quantize(x, FloatFormat(0, M), scale=scale), ones)
    levels = 127 * x / x.abs().amax(1, keepdim=True)
    symmetric_int8 = levels.round() * x.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(fake_quantize(x, "e0m7", scale="axis"), symmetric_int8)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("layout", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_groups_lie_along_any_axis_in_any_layout(backend, axis, layout):
    x = torch.randn(12, 18, 24, generator=torch.Generator().manual_seed(0)).permute(layout)
    last = x.movedim(axis, -1)
    for scale, parts in (("block", last.split(6, -1)), ("axis", [last])):
        expected = torch.cat(
            [
                torch.stack([fake_quantize(group, "e3m2", scale="tensor") for group in part.flatten(0, -2)])
                for part in (p.contiguous() for p in parts)
            ],
            -1,
        )
        found = fake_quantize(x, "e3m2", scale=scale, block_size=6, axis=axis)
        assert found.is_contiguous()
        assert_same_bits(found.movedim(axis, -1).reshape(expected.shape), expected)


@pytest.mark.parametrize(
    "shape", [(), (1,), (5, 1), (1, 7), (4, 5, 1), (4, 1, 7), (1, 5, 1), (5, 7), (4, 5, 7), (1, 1, 1)]
)
def test_a_given_scale_multiplies_and_divides(backend, shape):
    x = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 8 + 0.1
    assert_same_bits(fake_quantize(x, "e2m1", scale=scale), fake_quantize(x * scale, "e2m1") / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_a_number(backend, dtype):
    x = torch.tensor([[1.0, math.nan, -math.inf, 0.3], [math.inf, 1, 2, 3], [1, 2, 3, 4], [0, -0.0, 0, 0]], dtype=dtype)
    plain = fake_quantize(x, "e2m1")
    assert plain.isnan().equal(x.isnan())
    assert plain[0, 2] == -6
    assert plain[1, 0] == 6
    for scale in ("axis", "block"):
        for scale_rounding in ("exact", "power_of_two", "mx"):
            y = fake_quantize(x, "e2m1", scale=scale, block_size=4, scale_rounding=scale_rounding)
            assert y[:2].isnan().all()
            assert y[2:].isfinite().all()
            assert y[3].signbit().equal(x[3].signbit())
            assert y[3].eq(0).all()
    assert fake_quantize(x, "e2m1", scale="tensor").isnan().all()
    assert fake_quantize(x[2:], "e2m1", scale="tensor").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale_rounding", ["exact", "power_of_two", "mx"])
def test_the_largest_and_the_smallest_groups_stay_finite(backend, dtype, scale_rounding):
    limits = torch.finfo(dtype)
    small = limits.smallest_normal
    tops = torch.tensor([limits.max, limits.max * 0.999, small, small * 0.99, small * limits.eps], dtype=torch.float64)
    x = (tops[:, None] * torch.linspace(-1, 1, 17, dtype=torch.float64)).to(dtype)
    for format in EVERY_FORMAT:
        y = fake_quantize(x, format, scale="axis", scale_rounding=scale_rounding)
        assert y.isfinite().all(), format
        assert (y * x >= 0).all(), format
        if scale_rounding == "exact" and format.exponent_bits:
            torch.testing.assert_close(y[:2, [0, -1]], x[:2, [0, -1]], rtol=4e-3, atol=0)


def test_signal_to_noise_of_gaussian_data():
    expected = {"e1m1": 11.25, "e2m1": 19.26, "e1m2": 18.61, "e3m1": 19.86, "e2m2": 25.42, "e1m3": 25.23, "e3m2": 25.80}
    expected |= {"e2m3": 31.54, "e4m3": 31.86, "e5m2": 25.80, "e3m4": 37.92, "e2m5": 43.68, "e1m6": 43.78}
    x = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    for name, decibel in expected.items():
        noise = (fake_quantize(x, name, scale="block", block_size=128) - x).square().mean(dtype=torch.float64)
        assert 10 * math.log10(x.square().mean(dtype=torch.float64) / noise) == pytest.approx(decibel, abs=0.05), name


def test_the_gradient_goes_straight_through(backend):
    x = torch.randn(8, 16).requires_grad_()
    grad = torch.randn(8, 16)
    for scale in (None, "tensor", "axis", "block", torch.tensor(2.0)):
        y = fake_quantize(x, "e1m1", scale=scale, block_size=4)
        assert torch.autograd.grad(y, x, grad)[0].equal(grad)


def test_philox_gives_the_published_numbers():
    zero = random_words(torch.tensor(0), 0, 4)
    assert zero.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seed = torch.tensor(123456789012345678)
    whole = random_words(seed, 0, 1000)
    assert torch.cat([random_words(seed, 0, 333), random_words(seed, 333, 667)]).equal(whole)
    beyond = random_words(seed, (1 << 34) - 2, 4)  # the counter's second word begins to count
    assert beyond[:2].equal(random_words(seed, (1 << 34) - 4, 4)[2:])
    assert not beyond[2:].equal(whole[:2])


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e0m3", "e8m2"])
def test_stochastic_rounding_has_the_right_mean_and_takes_a_neighbour(backend, name):
    numbers = magnitudes(FloatFormat.parse(name)).float()
    a, b = numbers[2], numbers[3]
    shares = torch.tensor([0.0, 0.1, 0.5, 0.75])
    x = (a + (b - a) * shares).repeat(20_000)
    y = fake_quantize(x, name, rounding="stochastic", generator=torch.Generator().manual_seed(1))
    assert (y.eq(a) | y.eq(b)).all()
    up = y.eq(b).view(-1, 4).double().mean(0)
    torch.testing.assert_close(up, shares.double(), rtol=0, atol=0.015)
    assert up[0] == 0
    again = fake_quantize(x, name, rounding="stochastic", generator=torch.Generator().manual_seed(1))
    other = fake_quantize(x, name, rounding="stochastic", generator=torch.Generator().manual_seed(2))
    assert again.equal(y)
    assert not other.equal(y)
    torch.manual_seed(3)
    drawn = fake_quantize(x, name, rounding="stochastic")
    torch.manual_seed(3)
    assert fake_quantize(x, name, rounding="stochastic").equal(drawn)


@pytest.mark.parametrize("rounding", ["even", "away", "stochastic"])
@pytest.mark.parametrize("name", SOME_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_cpu_path_has_the_bits_of_the_definition(monkeypatch, name, dtype, rounding):
    from tenfold.kernels.quant import cpu

    monkeypatch.setattr(cpu, "PIECE", 1000)  # many pieces, and rows longer than one
    bits = bit_patterns(torch.float32 if dtype == torch.float64 else dtype, 36 * 64).to(dtype)
    ordinary = torch.randn(36 * 64, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for x in (bits.view(4, 9, 64), ordinary.view(4, 9, 64), ordinary.view(2, 1152)):
        for options in ({}, {"scale": "tensor"}, {"scale": "block", "block_size": 16}, {"scale": "axis", "axis": 0}):
            for scale_rounding in ("exact", "power_of_two", "mx") if options else ("exact",):

                def run(x=x, options=options, scale_rounding=scale_rounding):
                    generator = torch.Generator().manual_seed(4)
                    full = {"rounding": rounding, "scale_rounding": scale_rounding, "generator": generator} | options
                    return fake_quantize(x, name, **full)

                with use_backend("reference"):
                    expected = run()
                assert_same_bits(run(), expected)
