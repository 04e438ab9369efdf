"""`cog_attention` by its Triton kernels against the float64 definition: on the GPU, else interpreted."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tenfold.kernels import cog_attention, use_backend
from tenfold.kernels.testing import check_op, cog_inputs, lay_out, poisoned_scratch, with_margin

kernels = pytest.importorskip("tenfold.kernels.cog.triton", exc_type=ImportError)

QKV = ("query", "key", "value")


def triton(**arguments):
    with use_backend("triton"):
        return cog_attention(**arguments)


def reference(**arguments):
    with use_backend("reference"):
        return cog_attention(**arguments)


def output_and_gradients(tensors, **options):
    leaves = {name: x.detach().requires_grad_(name in QKV) for name, x in tensors.items()}
    out = triton(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out)
    return out.detach(), *torch.autograd.grad(out, [leaves[name] for name in QKV], grad)


def check(tensors, *, causal=False, **options):
    """The error budget. Where no row attends two keys, dQ and dK are 0 but for rounding, and not checked."""
    Tq, Tk = tensors["query"].shape[2], tensors["key"].shape[2]
    attended = torch.ones(Tq, Tk, dtype=torch.bool, device=tensors["query"].device)
    if causal:
        attended = attended.tril(Tk - Tq)
    if "mask" in tensors:
        attended = attended & tensors["mask"]
    grads = QKV if attended.sum(-1).gt(1).any() else ("value",)
    check_op(triton, reference, tensors, grads=grads, causal=causal, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "mask"),
    [
        (150, 150, 64, None),  # more than one tile each way, none of them full
        (70, 200, 24, None),  # more keys: decoding against a cache
        (200, 70, 40, None),  # more queries: under `causal`, the first attend nothing
        (1, 150, 16, None),
        (150, 140, 16, (150, 140)),
    ],
)
def test_output_and_gradients_are_within_the_budget(device, dtype, causal, queries, keys, dim, mask):
    tensors = cog_inputs(1, 2, queries, keys, dim, kv_heads=1, mask=mask, dtype=dtype, device=device)
    check(tensors, causal=causal)


def test_whole_tiles(device):
    check(cog_inputs(1, 1, 256, 256, 16, device=device), causal=True)


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_any_sizes(device, data):
    batch, kv_heads, group = (data.draw(st.integers(1, 2)) for _ in range(3))
    queries, keys, dim = (data.draw(st.integers(low, high)) for low, high in ((0, 140), (0, 140), (1, 40)))
    heads = kv_heads * group
    shape = tuple(data.draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys))
    tensors = cog_inputs(
        *(batch, heads, queries, keys, dim),
        kv_heads=kv_heads,
        mask=data.draw(st.sampled_from([None, shape[data.draw(st.integers(0, 3)) :]])),
        layout=data.draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])),
        device=device,
        seed=data.draw(st.integers(0, 99)),
    )
    check(tensors, causal=data.draw(st.booleans()), scale=data.draw(st.sampled_from([None, -0.25, 0.0])))


def test_a_zero_score_has_no_weight_but_its_share(device):
    # Scores 0, 1, -1 of row 0: the softmax of |s| is (1, e, e) / (1 + 2e). Row 1 is zero: so are all its
    # scores.
    query = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device).view(1, 1, 2, 2)
    key = torch.tensor([[0.0, 5.0], [1.0, 0.0], [-1.0, 7.0]], device=device).view(1, 1, 3, 2)
    value = torch.tensor([[8.0, 1.0], [2.0, 0.0], [1.0, 0.0]], device=device).view(1, 1, 3, 2)
    for x in (query, key, value):
        x.requires_grad_()
    out = triton(query=query, key=key, value=value, scale=1.0)
    share = torch.tensor(1.0).exp() / (1 + 2 * torch.tensor(1.0).exp())
    torch.testing.assert_close(out[0, 0].cpu(), torch.tensor([[2 * share - share, 0.0], [0.0, 0.0]]))
    dq, dk, dv = torch.autograd.grad(out.sum(), (query, key, value))
    assert dq[0, 0, 1].eq(0).all()
    assert dk[0, 0, 0].eq(0).all()
    assert dv[0, 0, 0].eq(0).all()
    torch.testing.assert_close(dv[0, 0, 1:].cpu(), torch.stack([share, -share])[:, None].expand(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores_stay_right(device, dtype):
    tensors = cog_inputs(1, 2, 70, 140, 100, dtype=dtype, device=device)
    largest = (tensors["query"].float() @ tensors["key"].float().mT).abs().max()
    scale = float(1e8 / largest)
    check_op(triton, reference, tensors, scale=scale)

    # The backward sums in another order: a score can come back one rounding step, many powers of 2, above L.
    q, k, v = (tensors[name] for name in QKV)
    out, lse = kernels.forward(q, k, v, None, False, scale)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    lse = torch.nextafter(lse, torch.zeros_like(lse))
    dq, dk, dv = kernels.backward(grad, q, k, v, out, lse, None, False, scale)
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert (dv.float().abs() <= 1.01 * grad.float().abs().sum(2, keepdim=True)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_no_row_attends_changes_nothing(device, bad):
    tensors = cog_inputs(1, 2, 150, 150, 24, kv_heads=1, device=device)
    mask = torch.ones(150, 150, dtype=torch.bool, device=device)
    mask[:, [3, 66, 149]] = False
    poisoned = {name: x.clone() for name, x in tensors.items()}
    for name in ("key", "value"):
        poisoned[name][:, :, [3, 66, 149]] = bad
    for causal in (False, True):
        clean = output_and_gradients(tensors | {"mask": mask}, causal=causal)
        dirty = output_and_gradients(poisoned | {"mask": mask}, causal=causal)
        for a, b in zip(clean, dirty, strict=True):
            assert a.equal(b)
        assert all(x[:, :, [3, 66, 149]].eq(0).all() for x in dirty[2:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["key", "value"])
def test_the_future_does_not_leak(device, bad, name):
    tensors = cog_inputs(1, 2, 150, 150, 24, device=device)
    poisoned = {which: x.clone() for which, x in tensors.items()}
    poisoned[name][:, :, 100:] = bad
    clean, dirty = (output_and_gradients(x, causal=True) for x in (tensors, poisoned))
    for a, b in zip(clean[:2], dirty[:2], strict=True):  # rows of the output and of dQ
        assert a[:, :, :100].equal(b[:, :, :100])
        assert b[:, :, 100:].isnan().any(-1).all()


def test_rows_that_attend_a_nan_see_it(device):
    tensors = cog_inputs(1, 1, 70, 140, 16, device=device)
    mask = torch.rand(70, 140, generator=torch.Generator().manual_seed(0)).lt(0.5).to(device)
    for name in ("key", "value"):
        poisoned = tensors | {name: tensors[name].clone()}
        poisoned[name][:, :, 90, 0] = torch.nan
        out = triton(**poisoned, mask=mask)
        assert out[0, 0].isnan().any(-1).equal(mask[:, 90])


def test_rows_that_attend_nothing_take_no_part(device):
    tensors = cog_inputs(1, 2, 150, 70, 16, kv_heads=1, device=device)
    mask = torch.ones(150, 1, dtype=torch.bool, device=device)
    mask[[5, 80, 149]] = False
    for options, empty in (({"mask": mask}, [5, 80, 149]), ({"causal": True}, list(range(80)))):
        clean = output_and_gradients(tensors, **options)
        assert clean[0][:, :, empty].eq(0).all()
        assert clean[1][:, :, empty].eq(0).all()
        poisoned = tensors | {"query": tensors["query"].clone()}
        poisoned["query"][:, :, empty] = torch.nan
        for a, b in zip(clean, output_and_gradients(poisoned, **options), strict=True):
            assert a.equal(b)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_nothing_is_read_outside_the_tensors(device, layout):
    tensors = cog_inputs(2, 2, 70, 150, 24, kv_heads=1, layout=layout, mask=(2, 1, 70, 150), device=device)
    plain = output_and_gradients(tensors, causal=True)
    with poisoned_scratch():
        guarded = output_and_gradients({name: with_margin(x) for name, x in tensors.items()}, causal=True)
    for a, b in zip(plain, guarded, strict=True):
        assert a.equal(b)


def test_masks_in_any_layout(device):
    tensors = cog_inputs(2, 2, 70, 90, 16, device=device)
    mask = torch.rand(2, 2, 70, 90, generator=torch.Generator().manual_seed(0)).lt(0.5).to(device)
    expected = triton(**tensors, mask=mask)
    for layout in ("transposed", "sliced"):
        assert triton(**tensors, mask=lay_out(mask, layout)).equal(expected)
    assert triton(**tensors, mask=mask.mT.contiguous().mT).equal(expected)


def test_an_expanded_gradient(device):
    tensors = cog_inputs(1, 2, 20, 20, 16, device=device)
    leaves = [tensors[name].requires_grad_() for name in QKV]
    ours = torch.autograd.grad(triton(**tensors).sum(), leaves)
    truth = torch.autograd.grad(reference(**tensors).sum(), leaves)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_decoding_continues_the_full_causal_pass(device):
    tensors = cog_inputs(1, 2, 140, 140, 16, device=device)
    full = triton(**tensors, causal=True)
    for first, last in ((139, 140), (60, 130)):
        chunk = {"query": tensors["query"][:, :, first:last]}
        chunk |= {name: tensors[name][:, :, :last] for name in ("key", "value")}
        torch.testing.assert_close(triton(**chunk, causal=True), full[:, :, first:last])


def test_too_wide_heads_are_refused(device):
    with pytest.raises(ValueError, match="query: the triton backend takes a last dimension up to 256, got 257"):
        triton(**cog_inputs(1, 1, 2, 2, 257, device=device))


def test_it_is_a_torch_op(device):
    tensors = cog_inputs(1, 2, 9, 9, 16, device=device)
    leaves = [tensors[name].requires_grad_() for name in QKV]
    torch.library.opcheck(torch.ops.tenfold.cog_attention, (*leaves, None, True, 0.25, "triton"))
