"""Codes, their packing to the real width, and the memory they take."""

import pytest
import torch

from tenfold.kernels import FloatFormat, dequantize, fake_quantize, quantize, use_backend
from tenfold.kernels.quant.codes import pack, unpack
from tenfold.kernels.testing import assert_same_bits, bit_patterns

NAMES = ["e0m1", "e0m7", "e1m1", "e2m1", "e2m2", "e3m0", "e3m2", "e4m3", "e4m3fn", "e5m2ocp", "e4m4", "e5m5"]
NAMES += ["e5m6", "e6m6", "e5m8", "e6m8", "e5m10ieee", "e8m7ieee", "e8m7"]  # of 2 to 16 bits


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_back_from_the_codes_comes_what_fake_quantize_gives(backend, name, dtype):
    ordinary = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    bits = bit_patterns(torch.float32 if dtype == torch.float64 else dtype, 4 * 9 * 16).to(dtype).view(4, 9, 16)
    given = torch.rand(9, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    for x in (ordinary, bits):
        for options in (
            {"scale": "tensor"},
            {"scale": "axis", "axis": 1},
            {"scale": "block", "block_size": 8, "scale_rounding": "power_of_two"},
            {"scale": "block", "block_size": 3, "axis": -2, "rounding": "away"},
            {"scale": given},
            {},
        ):
            quantized = quantize(x, name, **options)
            if not options:  # without a scale, NaN has no code in most formats
                quantized = quantize(x.nan_to_num(nan=0.0), name)
                assert_same_bits(dequantize(quantized), fake_quantize(x.nan_to_num(nan=0.0), name))
            elif options.get("scale") is given and FloatFormat.parse(name).specials == "none":
                found, expected = dequantize(quantized), fake_quantize(x, name, **options)
                assert found.isnan().all() if x.isnan().any() else found.equal(expected)
            else:
                assert_same_bits(dequantize(quantized), fake_quantize(x, name, **options))


def test_nan_without_a_scale():
    x = torch.tensor([1.0, torch.nan, 2.0])
    for name in ("e4m3fn", "e5m2ocp"):
        assert_same_bits(dequantize(quantize(x, name)), x)
    assert dequantize(quantize(x, "e2m1")).isnan().all()
    assert dequantize(quantize(x, "e2m1", scale=torch.ones(3))).isnan().all()


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("length", [0, 1, 3, 8, 13, 64])
def test_codes_are_a_stream_of_bits_low_ones_first(bits, length):
    codes = torch.randint(1 << bits, (3, length), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, (length * bits + 7) // 8)
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert bytes(stored) == stream.to_bytes(len(stored), "little")
    assert unpack(packed, bits, length).equal(codes)


def test_codes_are_the_bytes_of_torchs_own_dtypes(backend):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    for name, dtype in {
        "e4m3fn": torch.float8_e4m3fn,
        "e5m2ocp": torch.float8_e5m2,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }.items():
        assert quantize(x, name).codes.equal(x.to(dtype).view(torch.uint8))


def test_every_code_is_decoded_to_its_number():
    for name in NAMES:
        format = FloatFormat.parse(name)
        numbers = format.values()
        finite = numbers.abs() <= torch.finfo(torch.float32).max
        codes = torch.arange(2**format.bits, dtype=torch.int32)[finite]
        quantized = quantize(numbers[finite].float(), format)
        assert unpack(quantized.codes, format.bits, len(codes)).equal(codes), name
        assert dequantize(quantized).double().equal(numbers[finite])


def test_memory_is_that_of_the_real_width():
    x = torch.randn(256, 512)
    quantized = quantize(x, "e3m2", scale="block", block_size=128)
    assert quantized.codes.untyped_storage().nbytes() == x.numel() * 6 // 8  # 4 codes in 3 bytes
    assert quantized.nbytes == x.numel() * 6 // 8 + x.numel() // 128 * 4
    assert quantize(x, "e2m1", scale="tensor").nbytes == x.numel() // 2 + 4
    assert quantize(x, "e4m3fn").nbytes == x.numel()
    assert quantized.scales.shape == (256, 4)
    assert quantize(x, "e2m1", scale="axis", axis=0).scales.shape == (1, 512)


def test_stochastic_codes():
    x = torch.randn(64, 64)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    options = {"scale": "axis", "rounding": "stochastic"}
    expected = fake_quantize(x, "e2m1", generator=generators[0], **options)
    assert_same_bits(dequantize(quantize(x, "e2m1", generator=generators[1], **options)), expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 4), (1,)])
def test_small_shapes(backend, shape):
    x = torch.full(shape, 1.3)
    for scale in (None, "tensor"):
        quantized = quantize(x, "e2m1", scale=scale)
        assert dequantize(quantized).equal(fake_quantize(x, "e2m1", scale=scale))
        assert dequantize(quantized).shape == shape


def test_scales_are_divisions_rounded_once(backend):
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    scales = quantize(x, "e4m3", scale="axis").scales.squeeze(1)
    assert scales.equal((480 / x.abs().amax(1).double()).float())  # of 24 digits, doubles are enough to be exact
