"""`cog_attention` on the CPU and by its reference: against definitions written here, and values by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from tenfold.kernels import cog_attention, use_backend
from tenfold.kernels.cog import cpu
from tenfold.kernels.testing import check_op, cog_inputs, lay_out, poisoned_scratch, with_margin

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "sliced", "expanded"]
QKV = ("query", "key", "value")


def attended_keys(query, key, *, causal=False, mask=None):
    Tq, Tk = query.shape[2], key.shape[2]
    row, column = torch.arange(Tq)[:, None], torch.arange(Tk)
    attended = column <= row + (Tk - Tq) if causal else torch.ones(Tq, Tk, dtype=torch.bool)
    return attended if mask is None else attended & mask


def definition(query, key, value, *, mask=None, causal=False, scale=None):
    """Eq. 3 as printed: SignExp over the sum of its absolute values, every exponent shifted by max|s|."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    group = query.shape[1] // key.shape[1]
    key, value = (torch.cat([x[:, [h // group]] for h in range(query.shape[1])], 1) for x in (key, value))
    s = torch.einsum("bhid,bhjd->bhij", query, key) * scale
    exponent = torch.where(attended_keys(query, key, causal=causal, mask=mask), s.abs(), -torch.inf)
    if s.numel():
        exponent = exponent - exponent.detach().amax(-1, keepdim=True).clamp(min=0)
    signexp = torch.sign(s) * exponent.exp()
    total = exponent.exp().sum(-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bhid", signexp / total.where(total > 0, 1.0), value)


def check(tensors, **options):
    """The error budget. Where no row attends two keys, dQ and dK are 0 but for rounding, and not checked."""
    attended = attended_keys(
        tensors["query"], tensors["key"], mask=tensors.get("mask"), causal=options.get("causal", False)
    )
    grads = QKV if attended.sum(-1).gt(1).any() else ("value",)
    check_op(cog_attention, definition, tensors, grads=grads, **options)


def output_and_gradients(tensors, **options):
    leaves = {name: x.detach().requires_grad_(name in QKV) for name, x in tensors.items()}
    out = cog_attention(**leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, [leaves[name] for name in QKV], grad)


def weights(logits):
    """The weights of rows of logits, read off the op itself: the values are unit vectors."""
    rows, n = logits.shape
    query = torch.eye(rows, n, dtype=logits.dtype)
    key = F.pad(logits.T, (0, n - rows))
    value = torch.eye(n, dtype=logits.dtype)
    return cog_attention(*(x[None, None] for x in (query, key, value)), scale=1.0)[0, 0]


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles each way at the sizes of a test."""
    monkeypatch.setattr(cpu, "ROWS", 16)
    monkeypatch.setattr(cpu, "TILE", 1 << 11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "mask"),
    [
        (67, 67, 64, None),  # more than one tile each way, the last ones not full
        (64, 64, 8, None),  # whole tiles
        (31, 97, 24, None),  # more keys: decoding against a cache
        (97, 31, 40, None),  # more queries: under `causal`, the first attend nothing
        (1, 97, 20, None),
        (97, 1, 20, None),
        (1, 1, 1, None),
        (67, 61, 24, (67, 61)),
        (67, 67, 24, (2, 1, 1, 67)),  # padding
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_output_and_gradients_are_within_the_budget(backend, dtype, causal, queries, keys, dim, mask):
    check(cog_inputs(2, 4, queries, keys, dim, kv_heads=2, mask=mask, dtype=dtype), causal=causal)


def test_tiles_of_the_shipped_size():
    check(cog_inputs(2, 4, 300, 1500, 12), causal=True)
    check(cog_inputs(1, 2, 513, 513, 12, kv_heads=1, mask=(513, 513)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes_in_any_tiles(data):
    batch, kv_heads, group = (data.draw(st.integers(low, 3)) for low in (0, 1, 1))
    queries, keys, dim = (data.draw(st.integers(low, high)) for low, high in ((0, 40), (0, 40), (1, 20)))
    heads = kv_heads * group
    shape = tuple(data.draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys))
    tensors = cog_inputs(
        *(batch, heads, queries, keys, dim),
        kv_heads=kv_heads,
        mask=data.draw(st.sampled_from([None, shape[data.draw(st.integers(0, 3)) :]])),
        dtype=data.draw(st.sampled_from(DTYPES)),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        seed=data.draw(st.integers(0, 99)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "ROWS", data.draw(st.integers(1, 50)))
        patch.setattr(cpu, "TILE", data.draw(st.integers(1, 5000)))
        check(tensors, causal=data.draw(st.booleans()), scale=data.draw(st.sampled_from([None, -0.3, 0.0])))


@pytest.mark.usefixtures("small_tiles")
def test_two_softmax_passes_make_the_same(backend):
    """The halves s > 0 and s < 0, by torch's FlexAttention, merged by their log-sum-exp."""
    tensors = cog_inputs(2, 2, 50, 50, 24, dtype=torch.float64)
    query, key, value = (tensors[name] for name in QKV)
    ours = cog_attention(query, key, value, causal=True, scale=0.3)
    halves = []
    for sign in (1, -1):

        def half(score, b, h, i, j, sign=sign):
            return torch.where((score * sign >= 0) & (j <= i), score * sign, -torch.inf)

        out, aux = flex_attention(query, key, value, score_mod=half, scale=0.3, return_aux=AuxRequest(lse=True))
        halves.append((out.nan_to_num(), aux.lse[..., None]))  # a row may have no score of that sign
    (plus, up), (minus, down) = halves
    # A score of 0 is in both halves, where it cancels; it counts once in the denominator.
    scores = query @ key.mT
    zeros = ((scores == 0).tril().sum(-1, keepdim=True)).double()
    merged = (plus * up.exp() - minus * down.exp()) / (up.exp() + down.exp() - zeros)
    torch.testing.assert_close(ours, merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("c", [0.5, 3.0, 40.0])
def test_opposite_logits_by_hand(backend, c):
    share = math.exp(c) / (2 * math.exp(c) + 4)
    expected = torch.tensor([[share, -share, 0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(weights(torch.tensor([[c, -c, 0, 0, 0, 0]], dtype=torch.float64)), expected)


def test_the_jump_at_zero_by_hand(backend):
    for second, expected in ((1e-9, 0.3302), (-1e-9, -0.3302), (0.0, 0.0)):
        found = weights(torch.tensor([[math.sqrt(0.5), second]], dtype=torch.float64))[0]
        assert found.tolist() == pytest.approx([0.6698, expected], abs=5e-5)
    assert found[1] == 0  # and its share of the denominator is lost


@pytest.mark.parametrize("D", [3, 7, 24, 100])
def test_products_that_cancel_have_no_weight(backend, D):
    # The products sum to exactly 0, which no rounding of the scale 1/√D may undo.
    query = torch.tensor([3.0, 1.0, -7.0]).repeat(1, 1, 5, 1)
    key = torch.tensor([[5.0, -1.0, 2.0], [1.0, 4.0, 1.0], [2.0, 0.0, 0.0]])[None, None]
    query, key = F.pad(query, (0, D - 3)), F.pad(key, (0, D - 3))
    value = torch.tensor([[1e6], [1e6], [1.0]]).expand(1, 1, 3, D)
    share = math.exp(6 / math.sqrt(D))
    expected = torch.full((1, 1, 5, D), share / (share + 2))
    torch.testing.assert_close(cog_attention(query, key, value), expected)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_absolute_weights_sum_to_one(backend, dtype, error):
    logits = 3 * torch.randn(30, 40, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = weights(logits)
    assert (found.abs().sum(-1) - 1).abs().max() <= error
    assert found.sum(-1).abs().max() < 1
    assert found.sign().equal(logits.sign())


def test_scores_of_one_sign_are_a_softmax(backend):
    tensors = cog_inputs(2, 2, 20, 30, 8)
    query, key, value = tensors["query"].abs() + 0.25, tensors["key"].abs(), tensors["value"]
    softmax = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(cog_attention(query, key, value), softmax)
    torch.testing.assert_close(cog_attention(-query, key, value), -softmax)


@pytest.mark.usefixtures("small_tiles")
def test_symmetries(backend):
    tensors = cog_inputs(2, 2, 50, 60, 12, dtype=torch.float64)
    query, key, value = (tensors[name] for name in QKV)
    out = cog_attention(query, key, value)
    assert cog_attention(-query, key, value).equal(-out)
    assert cog_attention(-query, key, -value).equal(out)
    assert cog_attention(query, key, value, scale=-1 / math.sqrt(12)).equal(-out)
    assert cog_attention(query, key, value, scale=0.0).eq(0).all()
    assert cog_attention(query, key, 4 * value).equal(4 * out)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cog_attention(query, key[:, :, order], value[:, :, order]), out)


def test_the_first_row_is_the_signed_value(backend):
    tensors = cog_inputs(2, 3, 9, 9, 8)
    sign = (tensors["query"][:, :, 0] * tensors["key"][:, :, 0]).sum(-1, keepdim=True).sign()
    assert len(sign.unique()) > 1
    expected = sign * tensors["value"][:, :, 0]
    assert cog_attention(**tensors, causal=True)[:, :, 0].equal(expected)


@pytest.mark.parametrize("seed", [19, 25, 31])
def test_half_precision_with_nearly_one_hot_weights(seed):
    """Gradients that are small differences: from an output rounded to half precision they came out too far off."""

    def reference(**arguments):
        with use_backend("reference"):
            return cog_attention(**arguments)

    tensors = cog_inputs(3, 4, 200, 2, 64, kv_heads=2, dtype=torch.bfloat16, seed=seed)
    check_op(cog_attention, reference, tensors, grads=QKV, causal=True, scale=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_tiles")
def test_huge_scores(dtype):
    tensors = cog_inputs(1, 2, 40, 60, 100, dtype=dtype)
    largest = (tensors["query"].float() @ tensors["key"].float().mT).abs().max()
    check_op(cog_attention, definition, tensors, grads=("value",), scale=float(1e8 / largest))
    assert all(x.isfinite().all() for x in output_and_gradients(tensors, scale=float(1e8 / largest)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
@pytest.mark.usefixtures("small_tiles")
def test_what_no_row_attends_changes_nothing(bad):
    tensors = cog_inputs(1, 2, 50, 50, 24, kv_heads=1)
    mask = torch.ones(50, 50, dtype=torch.bool)
    mask[:, [3, 26, 49]] = False
    poisoned = {name: x.clone() for name, x in tensors.items()}
    for name in ("key", "value"):
        poisoned[name][:, :, [3, 26, 49]] = bad
    for causal in (False, True):
        clean = output_and_gradients(tensors | {"mask": mask}, causal=causal)
        dirty = output_and_gradients(poisoned | {"mask": mask}, causal=causal)
        for a, b in zip(clean, dirty, strict=True):
            assert a.equal(b)
        assert all(x[:, :, [3, 26, 49]].eq(0).all() for x in dirty[2:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -3e38])
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.usefixtures("small_tiles")
def test_the_future_does_not_leak(bad, name):
    tensors = cog_inputs(1, 2, 50, 50, 24)
    changed = {which: x.clone() for which, x in tensors.items()}
    changed[name][:, :, 30:] = bad
    clean, dirty = (output_and_gradients(x, causal=True) for x in (tensors, changed))
    for a, b in zip(clean[:2], dirty[:2], strict=True):  # rows of the output and of dQ
        assert a[:, :, :30].equal(b[:, :, :30])
        assert not math.isnan(bad) or b[:, :, 30:].isnan().any(-1).all()


def test_a_later_token_leaves_earlier_rows_bit_equal(backend):
    tensors = cog_inputs(1, 2, 33, 33, 16)
    changed = {name: x.clone() for name, x in tensors.items()}
    for x in changed.values():
        x[:, :, -1] += 1
    before, after = (cog_attention(**x, causal=True) for x in (tensors, changed))
    assert before[:, :, :-1].equal(after[:, :, :-1])
    assert not before[:, :, -1].equal(after[:, :, -1])


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.usefixtures("small_tiles")
def test_rows_that_attend_a_nan_see_it(backend, name):
    tensors = cog_inputs(1, 1, 40, 60, 16, mask=(40, 60))
    tensors[name][:, :, 50, 0] = torch.nan
    sees = cog_attention(**tensors)[0, 0].isnan().any(-1)
    if backend == "cpu" or name == "key":
        assert sees.equal(tensors["mask"][:, 50])
    tensors.pop("mask")
    assert cog_attention(**tensors)[0, 0].isnan().any(-1).all()


@pytest.mark.usefixtures("small_tiles")
def test_rows_that_attend_nothing_take_no_part(backend):
    tensors = cog_inputs(1, 2, 50, 30, 16, kv_heads=1)
    mask = torch.ones(50, 1, dtype=torch.bool)
    mask[[5, 26, 49]] = False
    for options, empty in (({"mask": mask}, [5, 26, 49]), ({"causal": True}, list(range(20)))):
        clean = output_and_gradients(tensors, **options)
        assert clean[0][:, :, empty].eq(0).all()
        assert clean[1][:, :, empty].eq(0).all()
        assert all(x.isfinite().all() for x in clean)
        if backend == "cpu":
            poisoned = tensors | {"query": tensors["query"].clone()}
            poisoned["query"][:, :, empty] = torch.nan
            for a, b in zip(clean, output_and_gradients(poisoned, **options), strict=True):
                assert a.equal(b)


@pytest.mark.usefixtures("small_tiles")
def test_decoding_and_chunked_prefill_continue_the_full_causal_pass(backend):
    tensors = cog_inputs(2, 4, 40, 40, 16, kv_heads=2)
    full = cog_attention(**tensors, causal=True)
    steps = [slice(0, 17), slice(17, 30), *(slice(i, i + 1) for i in range(30, 40))]
    for rows in steps:
        chunk = {"query": tensors["query"][:, :, rows]}
        chunk |= {name: tensors[name][:, :, : rows.stop] for name in ("key", "value")}
        torch.testing.assert_close(cog_attention(**chunk, causal=True), full[:, :, rows])


def test_chunks_of_keys_merge_by_their_log_sum_exp(backend):
    tensors = cog_inputs(1, 2, 9, 40, 16, dtype=torch.float64)
    query, key, value = (tensors[name] for name in QKV)
    parts = [slice(0, 7), slice(7, 30), slice(30, 40)]
    outs = torch.stack([cog_attention(query, key[:, :, p], value[:, :, p]) for p in parts])
    lse = torch.stack([(query @ key[:, :, p].mT / 4).abs().logsumexp(-1, keepdim=True) for p in parts])
    torch.testing.assert_close((outs * lse.softmax(0)).sum(0), cog_attention(query, key, value))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("small_tiles")
def test_nothing_is_read_outside_the_tensors(layout):
    tensors = cog_inputs(2, 2, 30, 50, 24, kv_heads=1, layout=layout, mask=(2, 1, 30, 50))
    for options in ({"causal": True}, {"causal": False}):
        plain = output_and_gradients(tensors, **options)
        with poisoned_scratch():
            guarded = output_and_gradients({name: with_margin(x) for name, x in tensors.items()}, **options)
        for a, b in zip(plain, guarded, strict=True):
            assert a.equal(b)


def test_masks_in_any_layout(backend):
    tensors = cog_inputs(2, 2, 30, 40, 16, mask=(2, 2, 30, 40))
    mask = tensors.pop("mask")
    expected = cog_attention(**tensors, mask=mask)
    for layout in ("transposed", "sliced"):
        assert cog_attention(**tensors, mask=lay_out(mask, layout)).equal(expected)
    assert cog_attention(**tensors, mask=mask.mT.contiguous().mT).equal(expected)


@pytest.mark.usefixtures("small_tiles")
def test_an_expanded_gradient():
    tensors = cog_inputs(1, 2, 40, 40, 16)
    leaves = [tensors[name].requires_grad_() for name in QKV]
    ours = torch.autograd.grad(cog_attention(**tensors).sum(), leaves)
    truth = torch.autograd.grad(definition(**tensors).sum(), leaves)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(backend, causal):
    generator = torch.Generator().manual_seed(2)
    query, key, value = torch.randn(3, 1, 2, 4, 3, generator=generator, dtype=torch.float64)
    assert (query @ key.mT).abs().min() > 1e-3  # finite differences must not step over the jump
    leaves = [x.requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(lambda q, k, v: cog_attention(q, k, v, causal=causal), leaves)
