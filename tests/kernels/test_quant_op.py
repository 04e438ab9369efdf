"""The quantization ops as citizens of torch: opcheck, compile, autocast, errors, and the memory they take."""

import pytest
import torch

from tenfold.kernels import FloatFormat, dequantize, fake_quantize, quantize, use_backend
from tenfold.kernels.testing import lay_out, peak_memory, poisoned_scratch, with_margin


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("scale", [None, "tensor", "axis", "block", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [0, 4])
def test_they_are_torch_ops(scale, dtype, grad, rows):
    x = lay_out(torch.randn(rows, 6, dtype=dtype), "transposed").requires_grad_(grad)
    given = torch.rand(6) + 1 if scale == "given" else None
    kind = None if scale == "given" else scale
    seed = torch.tensor(5)
    for rounding in ("even", "stochastic"):
        arguments = (x, given, seed if rounding == "stochastic" else None, "e2m1", kind, 3, 1, rounding, "exact", "cpu")
        torch.library.opcheck(torch.ops.tenfold.fake_quantize, arguments)
        torch.library.opcheck(torch.ops.tenfold.quantize, (x.detach(), *arguments[1:]))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_they_compile_whole_and_for_any_length(compiler):
    def loss(x):
        y = fake_quantize(x * 2, "e4m3", scale="block", block_size=8) + fake_quantize(x, FloatFormat(2, 1))
        back = dequantize(quantize(x, "e3m2", scale="axis"))
        return (y**2).sum() + back.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 16).requires_grad_()
        found, plain = (f(x) for f in (compiled, loss))
        torch.testing.assert_close(found, plain)
        for a, b in zip(*(torch.autograd.grad(y, x) for y in (found, plain)), strict=True):
            torch.testing.assert_close(a, b)


def test_stochastic_rounding_compiles():
    compiled = torch.compile(
        lambda x: fake_quantize(x, "e2m1", rounding="stochastic"), fullgraph=True, backend="aot_eager"
    )
    x = torch.full((1000,), 0.7)
    first, second = compiled(x), compiled(x)
    assert set(first.tolist()) == {0.5, 1.0}
    assert not first.equal(second)


def test_autocast_changes_nothing():
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = fake_quantize(x, "e4m3", scale="axis")
    assert y.equal(fake_quantize(x, "e4m3", scale="axis"))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_scratch_and_margins_are_never_read(backend, layout):
    x = lay_out(torch.randn(6, 40), layout)
    for name, rounding in (("e4m3", "even"), ("e8m2", "even"), ("e2m0", "away"), ("e3m2", "stochastic")):
        for scale in (None, "tensor", "axis", "block"):

            def run(x, name=name, rounding=rounding, scale=scale):
                generator = torch.Generator().manual_seed(0)
                options = {"scale": scale, "block_size": 8, "rounding": rounding, "generator": generator}
                return fake_quantize(x, name, **options)

            plain = run(x)
            with poisoned_scratch():
                assert run(with_margin(x)).equal(plain)


@pytest.mark.parametrize("scale", [None, "tensor", "block", "axis"])
def test_memory_beyond_the_result_does_not_grow(scale):
    def extra(rows):
        x = torch.randn(rows, 1024)
        return peak_memory(lambda: fake_quantize(x, "e4m3", scale=scale)) - x.nbytes

    assert extra(4096) < extra(2048) + (1 << 20)  # a scale for each block
    assert extra(4096) < 6 << 20  # of 16 MB


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "e9m2"}, ValueError, r"format: there is no 'e9m2': exponent_bits: expected an integer from 0 to 8"),
        ({"format": "e8m8"}, ValueError, r"there is no 'e8m8': exponent_bits \+ mantissa_bits: expected 1 to 15"),
        ({"format": "e0m0"}, ValueError, r"there is no 'e0m0'"),
        ({"format": "e1m2ieee"}, ValueError, r"specials: 'ieee' needs 2 exponent bits"),
        ({"format": "e0m3nan"}, ValueError, r"specials: 'nan' needs 1 exponent bit"),
        ({"format": "e8m2b100"}, ValueError, r"bias: with e8m2 expected 127 to 127, got 100"),
        ({"format": "fp8"}, ValueError, r"format: cannot read 'fp8'; accepted: e<E>m<M>"),
        ({"format": 8}, TypeError, r"format: expected a FloatFormat or a name such as 'e4m3', got int"),
        ({"x": torch.ones(8, dtype=torch.int32)}, TypeError, r"x: torch.int32 is not supported"),
        ({"x": [1.0]}, TypeError, r"x: list is not supported"),
        ({"rounding": "up"}, ValueError, r"rounding: unknown 'up'; accepted: even, away, stochastic"),
        ({"scale_rounding": "e8m0"}, ValueError, r"scale_rounding: unknown 'e8m0'; accepted: exact, power_of_two, mx"),
        ({"scale": "row"}, ValueError, r"scale: unknown 'row'; accepted: None, a tensor, tensor, axis, block"),
        ({"scale": torch.ones(3)}, ValueError, r"scale: shape \(3,\) does not broadcast to x's \(2, 8\)"),
        ({"scale": torch.ones(1, 2, 8)}, ValueError, r"scale: shape \(1, 2, 8\) does not broadcast"),
        ({"scale": torch.ones(8, dtype=torch.int64)}, TypeError, r"scale: expected a floating-point tensor"),
        ({"scale": torch.ones(8, device="meta")}, ValueError, r"scale: is on meta, x on cpu"),
        ({"scale": "block", "block_size": 3}, ValueError, r"block_size: 3 does not divide x's 8 along axis 1"),
        ({"scale": "block", "block_size": 0}, ValueError, r"block_size: 0 does not divide"),
        ({"scale": "block", "axis": 2}, ValueError, r"axis: 2 is out of range for x of shape \(2, 8\)"),
        ({"scale": "axis", "x": torch.tensor(1.0)}, ValueError, r"axis: -1 is out of range for x of shape \(\)"),
    ],
)
@pytest.mark.parametrize("function", [fake_quantize, quantize])
def test_mistakes_are_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**{"x": torch.ones(2, 8), "format": "e4m3"} | arguments)


@pytest.mark.parametrize("wrong", [{"exponent_bits": 2.0}, {"mantissa_bits": -1}, {"specials": "inf"}, {"bias": 0.5}])
def test_wrong_formats_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FloatFormat(**{"exponent_bits": 2, "mantissa_bits": 1} | wrong)


def test_triton_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' was asked for"):
        fake_quantize(torch.ones(3), "e4m3")
