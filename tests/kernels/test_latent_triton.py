"""`latent_attention` by its Triton kernels against the float64 definition: on the GPU, else interpreted."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tenfold.kernels import fake_pack_latents, latent_attention, pack_latents, use_backend
from tenfold.kernels.testing import check_op, latent_inputs, lay_out, poisoned_scratch, with_margin

kernels = pytest.importorskip("tenfold.kernels.latent.triton", exc_type=ImportError)

SEQUENCES = ("latent", "rope")


def reference(query_latent, latent, query_rope=None, rope=None, **options):
    with use_backend("reference"):
        return latent_attention(query_latent, query_rope, latent, rope, **options)


def triton(bits=None, group_size=16):
    """The op over plain latents, or over what packing made of them."""

    def attend(query_latent, latent, query_rope=None, rope=None, **options):
        if bits is not None:
            latent, rope = (
                None if x is None else pack_latents(x, bits=bits, group_size=group_size) for x in (latent, rope)
            )
        with use_backend("triton"):
            return latent_attention(query_latent, query_rope, latent, rope, **options)

    return attend


def check(tensors, bits=None, group_size=16, **options):
    """The error budget; what is to be packed is what packing leaves as it is."""
    if bits is not None:
        for name in SEQUENCES:
            if name in tensors:
                tensors[name] = fake_pack_latents(tensors[name].float(), bits=bits, group_size=group_size)
    check_op(triton(bits, group_size), reference, tensors, **({"scale": 0.2} | options))


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "dim", "rope", "group"),
    [
        (16, 1, 300, 512, 64, 128),  # decoding at the paper's sizes: two groups in each half
        (3, 30, 150, 64, 0, 16),  # more than one tile each way
        (4, 20, 10, 24, 8, 32),  # more queries than keys: the first attend nothing
        (2, 3, 70, 35, 5, 16),  # odd widths, groups that the halves cut
        (1, 1, 1, 1, 1, 16),
    ],
)
def test_output_is_within_the_budget(device, bits, dtype, heads, queries, keys, dim, rope, group):
    tensors = latent_inputs(1, heads, queries, keys, dim, rope=rope, dtype=dtype, device=device)
    check(tensors, bits, group, causal=True)


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_any_sizes(device, data):
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    queries, keys = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 200))
    shape = tuple(data.draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys))
    tensors = latent_inputs(
        *(batch, heads, queries, keys, data.draw(st.integers(1, 70))),
        rope=data.draw(st.integers(0, 20)),
        mask=data.draw(st.sampled_from([None, shape[data.draw(st.integers(0, 3)) :]])),
        layout=data.draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])),
        device=device,
        seed=data.draw(st.integers(0, 99)),
    )
    check(
        *(tensors, data.draw(st.sampled_from([4, 8, None])), data.draw(st.sampled_from([4, 16, 17, 128]))),
        causal=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([0.2, -0.1, 0.0])),
    )


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_any_number_of_splits(device, monkeypatch, programs):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(latent_inputs(2, 3, 5, 400, 32, device=device), 4, causal=True)


@pytest.mark.parametrize("bits", [4, 8, None])
def test_only_rows_that_attend_a_nan_see_it(device, bits):
    tensors = latent_inputs(1, 2, 30, 130, 24, device=device)
    mask = torch.rand(30, 130, generator=torch.Generator().manual_seed(0)).lt(0.5).to(device)
    mask[3] = False
    options = {"scale": 0.2, "mask": mask, "causal": True}
    clean = triton(bits)(**tensors, **options)
    assert clean[:, :, 3].eq(0).all()
    sees = mask[:, 120] & (torch.arange(30, device=device) >= 20)
    poisoned = tensors | {"latent": tensors["latent"].clone()}
    poisoned["latent"][:, 120, 3] = torch.nan
    dirty = triton(bits)(**poisoned, **options)
    assert dirty[0, 0].isnan().all(-1).equal(sees)
    assert dirty[:, :, ~sees].equal(clean[:, :, ~sees])


@pytest.mark.parametrize("bits", [4, 8, None])
def test_nothing_is_read_outside_the_tensors(device, bits):
    tensors = latent_inputs(2, 3, 5, 150, 35, rope=5, mask=(2, 1, 1, 150), device=device)
    queries = [tensors["query_latent"], tensors["query_rope"]]
    cache = [tensors[name] if bits is None else pack_latents(tensors[name], bits=bits) for name in SEQUENCES]
    options = {"scale": 0.2, "causal": True}
    with use_backend("triton"):
        expected = latent_attention(*queries, *cache, **options, mask=tensors["mask"])
        if bits is None:
            guarded = [with_margin(x) for x in cache]
        else:
            guarded = [p._replace(codes=with_margin(p.codes), scales=with_margin(p.scales)) for p in cache]
        queries, mask = [with_margin(x) for x in queries], with_margin(tensors["mask"])
        with poisoned_scratch():
            found = latent_attention(*queries, *guarded, **options, mask=mask)
    assert found.equal(expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_latents_may_lie_in_a_larger_buffer(device, bits):
    tensors = latent_inputs(2, 3, 4, 90, 64, rope=16, device=device)
    queries = [tensors["query_latent"], tensors["query_rope"]]
    cache = [pack_latents(tensors[name], bits=bits, group_size=16) for name in SEQUENCES]

    def inside(x):
        room = torch.full((3, 200, x.shape[2]), 255 if x.dtype == torch.uint8 else torch.nan, device=device)
        room = room.to(x.dtype)
        room[1:, 7:97] = x
        return room[1:, 7:97]

    with use_backend("triton"):
        expected = latent_attention(*queries, *cache, scale=0.2, causal=True)
        for lay in (inside, lambda x: lay_out(x, "transposed"), lambda x: lay_out(x, "sliced")):
            views = [p._replace(codes=lay(p.codes), scales=lay(p.scales)) for p in cache]
            assert latent_attention(*queries, *views, scale=0.2, causal=True).equal(expected)


def test_decoding_continues_the_full_causal_pass(device):
    tensors = latent_inputs(1, 2, 90, 90, 32, device=device)
    full = triton(4)(**tensors, scale=0.2, causal=True)
    for first, last in ((89, 90), (30, 71)):
        chunk = {name: x[:, :, first:last] for name, x in tensors.items() if name.startswith("query")}
        chunk |= {name: tensors[name][:, :last] for name in SEQUENCES}
        torch.testing.assert_close(triton(4)(**chunk, scale=0.2, causal=True), full[:, :, first:last])


def test_wide_latents_are_refused(device):
    with pytest.raises(ValueError, match="query_latent: the triton backend takes a last dimension up to 512, got 513"):
        triton()(**latent_inputs(1, 1, 1, 2, 513, device=device), scale=0.2)


def test_it_is_a_torch_op(device):
    t = latent_inputs(1, 2, 3, 9, 16, device=device)
    p, r = pack_latents(t["latent"]), pack_latents(t["rope"])
    packed = [(x.codes, x.scales, x.bits, x.group_size, x.code) for x in (p, r)]
    arguments = (t["query_latent"], t["query_rope"], *packed[0], *packed[1])
    torch.library.opcheck(torch.ops.tenfold.latent_attention, (*arguments, None, True, 0.25, "triton"))
