"""`quant_matmul` on the CPU against float64 products of operands that `fake_quantize` has rounded."""

import pytest
import torch

from tenfold.kernels import fake_quantize, quant_matmul, use_backend
from tenfold.kernels.testing import assert_within_budget, lay_out

CASES = [
    {"b_format": "e2m1", "block_size": 16},
    {"a_format": "e4m3", "b_format": "e3m2", "block_size": 32},
    {"a_format": "e1m1", "scale": "axis", "rounding": "away"},
    {"a_format": "e4m3fn", "b_format": "e5m2ocp", "scale": "tensor", "scale_rounding": "power_of_two"},
    {"a_format": "e2m1", "b_format": "e4m3", "a_scale": None, "b_scale": "axis", "scale_rounding": "mx"},
    {"a_format": "e7m3", "b_format": "e3m10", "block_size": 12},
]


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def operands(rows=37, columns=50, depth=96, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, depth, generator=generator).to(dtype) for n in (rows, columns))


def quantized(x, format, scale, options):
    if format is None:
        return x
    names = ("block_size", "rounding", "scale_rounding")
    return fake_quantize(x, format, scale=scale, **{name: options[name] for name in names if name in options})


def quantized_operands(a, b, options):
    scale = options.get("scale", "block")
    return (
        quantized(x, options.get(f"{side}_format"), options.get(f"{side}_scale", scale), options)
        for side, x in (("a", a), ("b", b))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_it_multiplies_what_fake_quantize_gives(backend, options, dtype):
    a, b = operands(dtype=dtype)
    qa, qb = quantized_operands(a, b, options)
    ours = quant_matmul(a, b, **options)
    assert ours.dtype == dtype
    assert_within_budget(ours, qa @ qb.t(), qa.double() @ qb.double().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_go_straight_through(backend, dtype):
    options = {"a_format": "e4m3", "b_format": "e2m1", "block_size": 32}
    a, b = (x.requires_grad_() for x in operands(dtype=dtype))
    grad = torch.randn(37, 50).to(dtype)
    da, db = torch.autograd.grad(quant_matmul(a, b, **options), (a, b), grad)
    qa, qb = quantized_operands(a.detach(), b.detach(), options)
    assert_within_budget(da, grad @ qb, grad.double() @ qb.double())
    assert_within_budget(db, grad.t() @ qa, grad.double().t() @ qa.double())


def test_leading_dimensions_and_layouts(backend):
    a, b = torch.randn(2, 3, 5, 32), torch.randn(7, 32)
    options = {"a_format": "e4m3", "b_format": "e4m3", "scale": "axis"}
    flat = quant_matmul(a.view(-1, 32), b, **options)
    for layout in ("contiguous", "transposed", "sliced"):
        out = quant_matmul(lay_out(a, layout), lay_out(b, layout), **options)
        torch.testing.assert_close(out, flat.view(2, 3, 5, 7))
    torch.testing.assert_close(quant_matmul(a[0, 0, 0], b, **options), flat[0])


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (3, 0), (1, 1)])
def test_few_rows(backend, rows, columns):
    a, b = operands(rows, columns, 32)
    assert quant_matmul(a, b, a_format="e4m3", block_size=32).shape == (rows, columns)


@pytest.mark.parametrize("grads", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_torch_op(grads, dtype):
    a, b = (x.requires_grad_(g) for x, g in zip(operands(5, 7, 16, dtype), grads, strict=True))
    arguments = (a, b, "e4m3", None, "axis", None, 128, "even", "exact", "cpu")
    torch.library.opcheck(torch.ops.tenfold.quant_matmul, arguments)


def test_it_compiles_whole():
    def loss(a, b):
        return quant_matmul(a, b, a_format="e4m3", b_format="e2m1", block_size=16).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        leaves = [x.requires_grad_() for x in operands(rows, 7, 32)]
        found, plain = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
        for x, y in zip(found, plain, strict=True):
            torch.testing.assert_close(x, y)


def test_autocast_computes_in_half_precision():
    a, b = operands()
    with torch.autocast("cpu", torch.bfloat16):
        out = quant_matmul(a, b, b_format="e4m3", scale="axis")
    assert out.equal(quant_matmul(a.bfloat16(), b.bfloat16(), b_format="e4m3", scale="axis"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"a": torch.ones(2, 9)}, ValueError, r"b: expected \(N, 9\) to go with a, got shape \(3, 8\)"),
        ({"b": torch.ones(8)}, ValueError, r"b: expected \(N, 8\)"),
        ({"a": torch.ones(2, 0)}, ValueError, r"a: expected \(..., K\) with K at least 1"),
        ({"a": torch.ones(2, 8, dtype=torch.int32)}, TypeError, r"a: dtype torch.int32 is not supported"),
        ({"b": torch.ones(3, 8, dtype=torch.float16)}, TypeError, r"b: dtype torch.float16 differs from a's"),
        ({"b": torch.ones(3, 8, device="meta")}, ValueError, r"b: is on meta, a on cpu"),
        ({"a_format": "e9m1"}, ValueError, r"format: there is no 'e9m1'"),
        ({"b_format": "e2m1", "block_size": 3}, ValueError, r"block_size: 3 does not divide b's last dimension, 8"),
        ({"scale": "row"}, ValueError, r"a_scale: unknown 'row'; accepted: None, tensor, axis, block"),
        ({"b_scale": "row"}, ValueError, r"b_scale: unknown 'row'"),
        ({"rounding": "stochastic"}, ValueError, r"rounding: unknown 'stochastic'; accepted: even, away"),
        ({"scale_rounding": "up"}, ValueError, r"scale_rounding: unknown 'up'"),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        quant_matmul(**{"a": torch.ones(2, 8), "b": torch.ones(3, 8)} | arguments)
