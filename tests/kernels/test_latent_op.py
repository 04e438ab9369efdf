"""`latent_attention` as a citizen of torch: opcheck, compile, autocast, errors, and the memory it promises."""

import pytest
import torch

from tenfold.kernels import latent_attention, pack_latents, use_backend
from tenfold.kernels.latent import cpu
from tenfold.kernels.testing import latent_inputs, peak_memory


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("packed", [None, {}, {"code": "asymmetric"}, {"code": "float", "scale_dtype": None}])
@pytest.mark.parametrize("rope", [0, 5])
@pytest.mark.parametrize(
    ("queries", "mask", "dtype", "layout"),
    [
        (3, None, torch.float32, "transposed"),
        (3, (2, 1, 1, 7), torch.bfloat16, "contiguous"),
        (0, (2, 1, 1, 7), torch.float32, "transposed"),
        (3, (2, 1, 1, 7), torch.float32, "transposed"),
    ],
)
def test_it_is_a_torch_op(queries, mask, packed, rope, dtype, layout):
    tensors = latent_inputs(2, 3, queries, 7, 8, rope=rope, mask=mask, dtype=dtype, layout=layout)

    def cached(name):
        if name not in tensors or packed is None:
            return tensors.get(name), None, 0, 0, ""
        x = pack_latents(tensors[name], group_size=4, **packed)
        return x.codes, x.scales, x.bits, x.group_size, x.code

    shown = tensors["mask"].expand(2, 3, queries, 7) if mask else None
    query, query_rope = tensors["query_latent"], tensors.get("query_rope")
    arguments = query, query_rope, *cached("latent"), *cached("rope"), shown, True, 0.25, "cpu"
    torch.library.opcheck(torch.ops.tenfold.latent_attention, arguments)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("format", [None, {}, {"code": "float", "scale_dtype": None}])
def test_it_compiles_whole_and_for_any_length(backend, compiler, format):
    def step(query, query_rope, latent, rope):
        cache = (latent, rope) if format is None else (pack_latents(latent, **format), pack_latents(rope, **format))
        return latent_attention(query * 2, query_rope, *cache, scale=0.3, causal=True)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=True)
    for keys in (9, 17):
        tensors = latent_inputs(2, 3, 4, keys, 12)
        found, plain = (
            f(*(tensors[n] for n in ("query_latent", "query_rope", "latent", "rope"))) for f in (compiled, step)
        )
        torch.testing.assert_close(found, plain)


def test_autocast_computes_as_the_same_queries_in_half_precision(backend):
    tensors = latent_inputs(1, 2, 3, 9, 8)
    cache = pack_latents(tensors["latent"]), pack_latents(tensors["rope"])
    queries = tensors["query_latent"], tensors["query_rope"]
    with torch.autocast("cpu", torch.bfloat16):
        out = latent_attention(*queries, *cache, scale=0.3)
        wide = latent_attention(*(x.double() for x in queries), *cache, scale=0.3)
    assert out.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    assert out.equal(latent_attention(*(x.bfloat16() for x in queries), *cache, scale=0.3))


def test_the_querys_dtype_is_kept_whatever_the_cache_holds(backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for latent_dtype in (torch.float32, torch.bfloat16):
            tensors = latent_inputs(1, 2, 3, 9, 8, dtype=dtype, latent_dtype=latent_dtype)
            out = latent_attention(*(tensors[n] for n in tensors), scale=0.3)
            assert out.dtype == dtype


def test_there_is_no_gradient_but_in_the_reference():
    tensors = latent_inputs(1, 2, 3, 9, 8)
    arguments = [tensors[name].requires_grad_() for name in ("query_latent", "query_rope", "latent", "rope")]
    out = latent_attention(*arguments, scale=0.3)
    with pytest.raises(RuntimeError, match=r"latent_attention has no gradient; .* use_backend\('reference'\)"):
        out.sum().backward()
    with use_backend("reference"):
        wide = [x.detach().double().requires_grad_() for x in arguments]
        assert torch.autograd.gradcheck(lambda *a: latent_attention(*a, scale=0.3, causal=True), wide)


@pytest.mark.parametrize("format", [{}, {"bits": 8}, {"code": "float"}, {"code": "asymmetric", "bits": 8}])
@pytest.mark.parametrize("queries", [1, 64])
def test_no_unpacked_copy_of_the_cache_is_made(format, queries):
    def peak(keys):
        tensors = latent_inputs(1, 4, queries, keys, 512, rope=64)
        cache = pack_latents(tensors["latent"], **format), pack_latents(tensors["rope"], **format)
        run = (tensors["query_latent"], tensors["query_rope"], *cache)
        return peak_memory(lambda: latent_attention(*run, scale=0.3, causal=True))

    found = {keys: peak(keys) for keys in (4096, 8192, 16384)}
    # A block, its scores and their like, and codes on their way; the largest cache in 16 bits takes 18.9 MB.
    block = cpu.KEYS * 576 * 4
    assert all(size < 2 * block + 4 * queries * (3 * cpu.KEYS + 6 * 576) * 4 for size in found.values()), found
    assert found[16384] - found[4096] < 16384, found


def good():
    tensors = latent_inputs(2, 4, 5, 6, 8, rope=4)
    return {name: tensors[name] for name in ("query_latent", "query_rope", "latent", "rope")}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_latent": torch.zeros(4, 5, 8)}, ValueError, r"query_latent: expected \(batch, .* \(4, 5, 8\)"),
        ({"query_latent": torch.zeros(2, 4, 5, 8).int()}, TypeError, "query_latent: dtype torch.int32 is not"),
        ({"query_rope": torch.zeros(2, 4, 5, 4).half()}, TypeError, "query_rope: dtype torch.float16 differs"),
        ({"query_rope": torch.zeros(2, 4, 1, 4)}, ValueError, r"query_rope: expected \(2, 4, 5, dim\)"),
        ({"query_rope": torch.zeros(2, 4, 5, 0)}, ValueError, "query_rope: the last dimension is 0"),
        ({"query_rope": torch.zeros(2, 4, 5, 4, device="meta")}, ValueError, "query_rope: is on meta"),
        ({"query_rope": None}, ValueError, "query_rope: is None, but rope is not"),
        ({"rope": None}, ValueError, "rope: is None, but query_rope is not"),
        ({"latent": torch.zeros(2, 6, 9)}, ValueError, r"latent: expected \(2, time, 8\) .* \(2, 6, 9\)"),
        ({"latent": torch.zeros(6, 8)}, ValueError, r"latent: expected \(2, time, 8\) .* \(6, 8\)"),
        ({"latent": torch.zeros(1, 6, 8)}, ValueError, r"latent: expected \(2, time, 8\) .* \(1, 6, 8\)"),
        ({"latent": torch.zeros(2, 6, 8).int()}, TypeError, "latent: dtype torch.int32 is not supported"),
        ({"latent": torch.zeros(2, 6, 8, device="meta")}, ValueError, "latent: is on meta, query_latent on cpu"),
        ({"rope": torch.zeros(2, 7, 4)}, ValueError, r"rope: expected \(2, 6, 4\) .* \(2, 7, 4\)"),
        ({"rope": pack_latents(torch.zeros(2, 6, 5))}, ValueError, r"rope: expected \(2, 6, 4\) .* \(2, 6, 5\)"),
        (
            {"latent": pack_latents(torch.zeros(2, 6, 8))._replace(bits=8)},
            ValueError,
            r"latent.codes: expected \(…, 8\) for 8 numbers",
        ),
        ({"mask": torch.zeros(5, 6)}, TypeError, "mask: expected a bool .* True = attend, got torch.float32"),
        ({"mask": torch.ones(5, 5).bool()}, ValueError, r"mask: shape \(5, 5\) .* \(2, 4, 5, 6\)"),
        ({"mask": torch.ones(5, 6, device="meta").bool()}, ValueError, "mask: is on meta, query_latent on cpu"),
        ({"scale": float("nan")}, ValueError, "scale: must be finite, got nan"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message):
    with pytest.raises(error, match=message):
        latent_attention(**({"scale": 0.3} | good() | change))


def test_the_scale_has_no_default():
    with pytest.raises(TypeError, match="scale"):
        latent_attention(**good())
