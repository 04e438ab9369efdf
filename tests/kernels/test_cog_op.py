"""`cog_attention` as a citizen of torch: opcheck, compile, autocast, errors, and the memory it promises."""

from contextlib import nullcontext

import pytest
import torch

from tenfold.kernels import cog_attention, use_backend
from tenfold.kernels.cog import cpu
from tenfold.kernels.testing import cog_inputs, peak_memory

QKV = ("query", "key", "value")


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def inputs(time, mask, grads, dtype, layout):
    tensors = cog_inputs(2, 4, time, 7, 8, kv_heads=2, mask=mask, dtype=dtype, layout=layout)
    query, key, value = (tensors[name].requires_grad_(name in grads) for name in QKV)
    shown = tensors["mask"].expand(2, 4, time, 7) if mask else None
    return query, key, value, shown


@pytest.mark.parametrize("time", [0, 1, 5])
@pytest.mark.parametrize("mask", [None, (2, 1, 1, 7)])
@pytest.mark.parametrize("grads", [(), ("value",), QKV])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_it_is_a_torch_op(time, mask, grads, dtype, layout):
    arguments = *inputs(time, mask, grads, dtype, layout), True, 0.25, "cpu"
    torch.library.opcheck(torch.ops.tenfold.cog_attention, arguments)


@pytest.mark.parametrize("time", [0, 5])
@pytest.mark.parametrize("mask", [None, (1, 1, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_its_backward_is_a_torch_op(time, mask, dtype, layout):
    query, key, value, shown = inputs(time, mask and (1, 1, time, 7), (), dtype, layout)
    out, lse = torch.ops.tenfold.cog_attention(query, key, value, shown, True, 0.25, "cpu")
    arguments = torch.ones_like(out), query, key, value, shown, out, lse, True, 0.25, "cpu"
    torch.library.opcheck(torch.ops.tenfold.cog_attention_backward, arguments)


def compare_compiled(compiler, masked):
    def loss(query, key, value, mask):
        return (cog_attention(query * 2, key, value, causal=True, mask=mask) ** 2).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler, dynamic=True)
    for time in (9, 17):
        tensors = cog_inputs(1, 2, time, time, 8, mask=(time, time) if masked else None)
        leaves = [tensors[name].requires_grad_() for name in QKV]
        found, plain = (f(*leaves, tensors.get("mask")) for f in (compiled, loss))
        torch.testing.assert_close(found, plain)
        for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (found, plain)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_whole_and_for_any_length(backend, compiler, masked):
    compare_compiled(compiler, masked)


def test_inductor_compiles_it():
    compare_compiled("inductor", masked=False)


def test_autocast_computes_as_the_same_inputs_in_half_precision(backend):
    tensors = cog_inputs(1, 2, 9, 9, 8)
    half = {name: x.bfloat16() for name, x in tensors.items()}
    leaves = [tensors[name].requires_grad_() for name in QKV]
    with torch.autocast("cpu", torch.bfloat16):
        out = cog_attention(*leaves, causal=True)
        wide = cog_attention(*(x.double() for x in leaves))
        grads = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    assert out.equal(cog_attention(**half, causal=True))
    assert out.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    assert all(g.dtype == torch.float32 for g in grads)
    for inside, outside in zip(grads, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert inside.equal(outside)


def test_dtypes_are_kept(backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        leaves = [x.requires_grad_() for x in cog_inputs(1, 2, 5, 5, 4, dtype=dtype).values()]
        out = cog_attention(*leaves)
        assert out.dtype == dtype
        assert all(g.dtype == dtype for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"), [(0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_attend_gives_zeros(backend, batch, heads, queries, keys, causal):
    leaves = [x.requires_grad_() for x in cog_inputs(batch, heads, queries, keys, 4, kv_heads=2).values()]
    out = cog_attention(*leaves, causal=causal)
    assert out.shape == (batch, heads, queries, 4)
    assert out.eq(0).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_a_second_derivative_is_refused_not_wrong():
    leaves = [x.requires_grad_() for x in cog_inputs(1, 1, 4, 4, 4).values()]
    (first,) = torch.autograd.grad(cog_attention(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cog_attention_backward"):
        first.sum().backward()


def test_forward_mode_is_refused_not_zero():
    query, key, value = cog_inputs(1, 1, 4, 4, 4).values()

    def f(query):
        return cog_attention(query, key, value)

    with pytest.raises(NotImplementedError, match="query: forward-mode"):
        torch.func.jvp(f, (query,), (query,))
    with use_backend("reference"):
        assert torch.func.jvp(f, (query,), (query,))[1].any()


@pytest.mark.parametrize("name", ["cpu", "triton", "reference", None])
def test_meta_tensors_have_shapes(name):
    leaves = [x.requires_grad_() for x in cog_inputs(2, 4, 5, 7, 8, kv_heads=2, device="meta").values()]
    with use_backend(name) if name else nullcontext():
        out = cog_attention(*leaves, causal=True)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (2, 4, 5, 8)
    assert [g.shape for g in grads] == [x.shape for x in leaves]


def test_memory_grows_with_the_length_not_its_square():
    def peaks(time):
        query, key, value = (x.requires_grad_() for x in cog_inputs(1, 1, time, time, 64).values())
        forward = peak_memory(lambda: cog_attention(query.detach(), key.detach(), value.detach(), causal=True))
        return forward, peak_memory(lambda: cog_attention(query, key, value, causal=True).sum().backward())

    tensor = 64 * 4  # bytes per token of a query, say
    tile = 4 * cpu.TILE
    found = {time: peaks(time) for time in (1024, 2048, 4096, 8192, 16384)}
    for time, (forward, both) in found.items():
        assert forward < 2 * tile + 2.5 * time * tensor + 1e6, time
        assert both < 3 * tile + 7 * time * tensor + 1e6, time
    assert found[16384][1] < 4 * 16384**2 / 20


def test_memory_with_a_padding_mask():
    tensors = cog_inputs(2, 2, 4096, 4096, 32, mask=(2, 1, 1, 4096))
    leaves = [tensors[name].requires_grad_() for name in QKV]
    peak = peak_memory(lambda: cog_attention(*leaves, mask=tensors["mask"]).sum().backward())
    assert peak < 2 * 2 * 4096**2 / 2  # a bool per score, of which there should be two for a tile


def good():
    return {name: torch.zeros(2, 4, 5, 8) for name in QKV}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(4, 5, 8)}, ValueError, r"query: expected \(batch, .* got shape \(4, 5, 8\)"),
        ({"key": torch.zeros(4, 5, 8)}, ValueError, r"key: expected \(batch, .* got shape \(4, 5, 8\)"),
        (
            {"query": torch.zeros(2, 4, 5, 8).int()},
            TypeError,
            "query: dtype torch.int32 is not .* accepted: ",
        ),
        ({"key": torch.zeros(2, 4, 5, 8).half()}, TypeError, "key: dtype torch.float16 differs from query's"),
        ({"value": torch.zeros(2, 4, 5, 8).double()}, TypeError, "value: dtype torch.float64 differs"),
        ({"value": torch.zeros(2, 4, 5, 8, device="meta")}, ValueError, "value: is on meta, query on cpu"),
        ({"key": torch.zeros(1, 4, 5, 8)}, ValueError, r"key: expected \(2, .*, 8\) .* shape \(1, 4, 5, 8\)"),
        ({"key": torch.zeros(2, 4, 5, 7)}, ValueError, r"key: expected \(2, .*, 8\) .* shape \(2, 4, 5, 7\)"),
        ({"value": torch.zeros(2, 4, 6, 8)}, ValueError, r"value: expected key's .* got \(2, 4, 6, 8\)"),
        (
            {"key": torch.zeros(2, 3, 5, 8), "value": torch.zeros(2, 3, 5, 8)},
            ValueError,
            "key: 3 heads do not",
        ),
        (
            {"key": torch.zeros(2, 0, 5, 8), "value": torch.zeros(2, 0, 5, 8)},
            ValueError,
            "key: 0 heads do not",
        ),
        (dict.fromkeys(QKV, torch.zeros(2, 4, 5, 0)), ValueError, "query: the last dimension is 0"),
        ({"mask": torch.zeros(5, 5)}, TypeError, "mask: expected a bool .* True = attend, got torch.float32"),
        ({"mask": torch.ones(5, 4).bool()}, ValueError, r"mask: shape \(5, 4\) .* \(2, 4, 5, 5\)"),
        ({"mask": torch.ones(1, 2, 4, 5, 5).bool()}, ValueError, "mask: shape .* does not broadcast"),
        ({"mask": torch.ones(5, 5, device="meta").bool()}, ValueError, "mask: is on meta, query on cpu"),
        ({"query": None}, TypeError, "query: expected a tensor, got NoneType"),
        ({"mask": [[True]]}, TypeError, "mask: expected a tensor, got list"),
        ({"causal": "no"}, TypeError, "causal: expected a bool, got 'no'"),
        ({"scale": torch.tensor(0.3)}, TypeError, "scale: expected a number, got Tensor"),
        ({"scale": float("nan")}, ValueError, "scale: must be finite, got nan"),
        ({"scale": float("inf")}, ValueError, "scale: must be finite, got inf"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message):
    with pytest.raises(error, match=message):
        cog_attention(**good() | change)


@pytest.mark.parametrize("scale", [1e300, -1e39])
def test_a_scale_beyond_float32(backend, scale):
    with pytest.raises(ValueError, match=r"scale: must be at most 1e\+38 in magnitude for torch\.float32"):
        cog_attention(**cog_inputs(1, 1, 2, 2, 4), scale=scale)
    assert cog_attention(**cog_inputs(1, 1, 2, 2, 4, dtype=torch.float64), scale=scale).isfinite().all()
