"""The Triton kernels of the quantization ops: on a GPU, or in Triton's interpreter. The bits are the CPU's."""

import pytest
import torch

from tenfold.kernels import FloatFormat, dequantize, fake_quantize, quant_matmul, quantize, use_backend
from tenfold.kernels.testing import (
    assert_same_bits,
    assert_within_budget,
    bit_patterns,
    poisoned_scratch,
    with_margin,
)

FORMATS = ["e0m7", "e1m1", "e2m1", "e3m0", "e3m2", "e4m3", "e4m3fn", "e5m2ocp", "e5m10ieee", "e7m8", "e8m0", "e8m7"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def both(function, x, *arguments, **options):
    """What the kernels give, and what the definition gives on the CPU."""
    for backend, tensor in (("triton", x), ("reference", x.cpu())):
        if options.get("rounding") == "stochastic":
            options["generator"] = torch.Generator().manual_seed(7)
        with use_backend(backend):
            yield function(tensor, *arguments, **options)


def check(x, *arguments, **options):
    ours, truth = both(fake_quantize, x, *arguments, **options)
    assert_same_bits(ours, truth, name=f"{arguments}, {options}")


@pytest.mark.parametrize("rounding", ["even", "away", "stochastic"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bits(device, name, rounding, dtype):
    bits = bit_patterns(dtype, 4096).to(device)
    ordinary = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    check(bits, name, rounding=rounding)
    for x in (bits, ordinary):
        for scale_rounding in ("exact", "power_of_two", "mx"):
            check(x, name, scale="block", block_size=32, rounding=rounding, scale_rounding=scale_rounding)


@pytest.mark.parametrize("name", ["e2m1", "e4m3fn", "e3m0", "e5m2ocp", "e8m2"])
@pytest.mark.parametrize("rounding", ["even", "away"])
def test_every_number_and_every_midpoint(device, name, rounding):
    numbers = FloatFormat.parse(name).values()[: FloatFormat.parse(name).max_code + 1].float()
    numbers = numbers[numbers.isfinite()]
    points = torch.cat([numbers, (numbers[1:].double() + numbers[:-1].double()).div(2).float()])
    check(torch.cat([points, -points]).to(device), name, rounding=rounding)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(4, 6, 8), (6, 20, 2), (2, 2, 2), (18, 34, 40), (2, 1040, 4), (2, 4, 9000)])
def test_groups_along_any_axis(device, axis, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    for options in ({"scale": "axis"}, {"scale": "block", "block_size": shape[axis] // 2}, {"scale": "tensor"}):
        check(x, "e3m2", axis=axis, **options)
        check(x.transpose(0, 1), "e3m2", axis=(1, 0, 2)[axis], **options)


@pytest.mark.parametrize("shape", [(), (5, 1), (1, 7), (4, 1, 7), (4, 5, 1), (4, 5, 7)])
def test_a_given_scale(device, shape):
    x = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 8 + 0.1
    with use_backend("triton"):
        ours = fake_quantize(x.to(device), "e2m1", scale=scale.to(device))
    with use_backend("reference"):
        assert_same_bits(ours, fake_quantize(x, "e2m1", scale=scale))


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e4m3", "e4m3fn", "e5m6", "e5m10ieee", "e8m7"])
def test_codes(device, name):
    for x in (bit_patterns(torch.float32, 2048), torch.randn(2048)):
        for options in ({"scale": "block", "block_size": 64}, {"scale": "tensor", "rounding": "stochastic"}, {}):
            ours, truth = both(quantize, x.view(4, 512).to(device), name, **options)
            assert ours.codes.cpu().equal(truth.codes)
            if truth.scales is not None:
                assert_same_bits(ours.scales, truth.scales)
            assert_same_bits(dequantize(ours), dequantize(truth))


def test_what_is_not_a_number(device):
    x = torch.tensor([[1.0, torch.nan, -torch.inf, 0.3], [torch.inf, 1, 2, 3], [1, 2, 3, 4], [0, -0.0, 0, 0]])
    for dtype in DTYPES:
        check(x.to(device, dtype), "e2m1")
        for scale in ("axis", "tensor"):
            check(x.to(device, dtype), "e2m1", scale=scale)
            check(x[2:].to(device, dtype), "e2m1", scale=scale)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (), (1,)])
def test_small_shapes(device, shape):
    for scale in (None, "tensor"):
        check(torch.full(shape, 1.3, device=device), "e2m1", scale=scale)


def test_scratch_and_margins_are_never_read(device):
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(device)
    for scale in (None, "tensor", "axis", "block"):
        for axis in (0, 1):
            options = {"scale": scale, "axis": axis, "block_size": 2}
            with use_backend("triton"), poisoned_scratch():
                ours = fake_quantize(with_margin(x), "e4m3", **options)
            assert_same_bits(ours, fake_quantize(x.cpu(), "e4m3", **options))


def test_float64_is_refused(device):
    with use_backend("triton"), pytest.raises(TypeError, match="x: float64 is not supported by the triton backend"):
        fake_quantize(torch.ones(3, dtype=torch.float64, device=device), "e4m3")


def test_it_is_a_torch_op(device):
    x = torch.randn(4, 32, device=device).requires_grad_()
    arguments = (x, None, None, "e4m3", "block", 16, 1, "even", "exact", "triton")
    torch.library.opcheck(torch.ops.tenfold.fake_quantize, arguments)
    torch.library.opcheck(torch.ops.tenfold.quantize, (x.detach(), *arguments[1:]))


PRODUCTS = [
    {"b_format": "e2m1", "block_size": 64},
    {"a_format": "e4m3", "b_format": "e3m2", "block_size": 32},
    {"a_format": "e4m3", "b_format": "e3m2", "block_size": 192},
    {"a_format": "e4m3fn", "b_format": "e5m2ocp", "scale": "axis", "rounding": "away"},
    {"a_format": "e3m2", "scale": "tensor", "scale_rounding": "mx"},
    {"a_format": "e2m1", "b_format": "e1m1", "a_scale": None, "b_scale": "axis"},
    {"a_format": "e4m3", "b_format": "e2m1", "block_size": 24},  # quantized before, as numbers
    {"a_format": "e7m2", "b_format": "e3m10", "scale": "axis"},
]


def quantized(x, format, scale, options):
    """In float32: the kernel does not round it to the operand's dtype."""
    names = ("block_size", "rounding", "scale_rounding")
    if format is None:
        return x.double()
    kept = {name: options[name] for name in names if name in options}
    return fake_quantize(x.float(), format, scale=scale, **kept).double()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", PRODUCTS, ids=str)
def test_products(device, monkeypatch, options, dtype, before):
    from tenfold.kernels.quant import triton_matmul

    monkeypatch.setattr(triton_matmul, "REPEATS", 0 if before else 4)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 192, generator=generator).to(dtype) for n in (37, 150))
    with use_backend("triton"):
        ours = quant_matmul(a.to(device), b.to(device), **options)
    scale = options.get("scale", "block")
    qa, qb = (
        quantized(x, options.get(f"{side}_format"), options.get(f"{side}_scale", scale), options)
        for side, x in (("a", a), ("b", b))
    )
    low = quant_matmul(a, b, **options)
    assert_within_budget(ours, low, qa @ qb.t())


@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 1, 16), (130, 3, 48), (17, 129, 80), (0, 4, 16), (3, 0, 16)]
)
def test_products_of_any_size_read_nothing_else(device, rows, columns, depth):
    a, b = (torch.randn(n, depth, generator=torch.Generator().manual_seed(n)).to(device) for n in (rows, columns))
    for options in ({"scale": "axis"}, {"block_size": 16}, {"scale": None}):
        full = {"a_format": "e4m3", "b_format": "e3m2"} | options
        with use_backend("triton"), poisoned_scratch():
            ours = quant_matmul(with_margin(a), with_margin(b), **full)
        torch.testing.assert_close(ours.cpu(), quant_matmul(a.cpu(), b.cpu(), **full))


def test_a_group_that_is_not_finite_makes_its_results_nan(device):
    a, b = torch.ones(3, 64), torch.ones(4, 64)
    a[1, 5], b[2, 40] = torch.inf, torch.nan
    with use_backend("triton"):
        ours = quant_matmul(a.to(device), b.to(device), a_format="e4m3", b_format="e4m3", block_size=32)
    expected = torch.ones(3, 4, dtype=torch.bool)
    expected[1], expected[:, 2] = False, False
    assert ours.isfinite().cpu().equal(expected)
