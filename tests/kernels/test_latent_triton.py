"""`latent_attention` by its Triton kernels against the float64 definition: on the GPU, else interpreted."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tenfold.kernels import latent_attention, pack_latents, unpack_latents, use_backend
from tenfold.kernels.testing import check_op, latent_inputs, lay_out, poisoned_scratch, with_margin

kernels = pytest.importorskip("tenfold.kernels.latent.triton", exc_type=ImportError)

SEQUENCES = ("latent", "rope")
INTEGERS = {"4": {"bits": 4}, "8": {"bits": 8}}
OTHERS = {
    "asymmetric 4": {"bits": 4, "code": "asymmetric"},
    "asymmetric 8": {"bits": 8, "code": "asymmetric"},
    "FP4": {"bits": 4, "code": "float"},
    "FP8": {"bits": 8, "code": "float"},
    "4 without scales": {"bits": 4, "scale_dtype": None},
    "FP8 without scales": {"bits": 8, "code": "float", "scale_dtype": None},
}


def reference(query_latent, latent, query_rope=None, rope=None, **options):
    with use_backend("reference"):
        return latent_attention(query_latent, query_rope, latent, rope, **options)


def triton(format=None, group_size=16):
    """The op over plain latents, or over what packing made of them."""

    def attend(query_latent, latent, query_rope=None, rope=None, **options):
        if format is not None:
            latent, rope = (
                None if x is None else pack_latents(x, group_size=group_size, **format) for x in (latent, rope)
            )
        with use_backend("triton"):
            return latent_attention(query_latent, query_rope, latent, rope, **options)

    return attend


def check(tensors, format=None, group_size=16, **options):
    """The error budget, over plain latents or packed ones; those are the same for the op and its definition."""
    options = {"scale": 0.2} | options
    if format is None:
        check_op(triton(), reference, tensors, **options)
        return
    cache = [
        pack_latents(tensors[name], group_size=group_size, **format) if name in tensors else None for name in SEQUENCES
    ]

    def attend(backend):
        def attend(query_latent, query_rope=None, **options):
            with use_backend(backend):
                return latent_attention(query_latent, query_rope, *cache, **options)

        return attend

    queries = {name: x for name, x in tensors.items() if name not in SEQUENCES}
    check_op(attend("triton"), attend("reference"), queries, **options)


@pytest.mark.parametrize("format", [*INTEGERS.values(), None], ids=[*INTEGERS, "plain"])
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
def test_output_is_within_the_budget(device, format, dtype, heads, queries, keys, dim, rope, group):
    tensors = latent_inputs(1, heads, queries, keys, dim, rope=rope, dtype=dtype, device=device)
    check(tensors, format, group, causal=True)


@pytest.mark.parametrize("format", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "dim", "rope", "group"),
    [(16, 1, 150, 512, 64, 128), (2, 3, 70, 35, 5, 16), (1, 1, 1, 1, 1, 16)],
)
def test_other_codes_are_within_the_budget(device, format, dtype, heads, queries, keys, dim, rope, group):
    tensors = latent_inputs(1, heads, queries, keys, dim, rope=rope, dtype=dtype, device=device)
    check(tensors, format, group, causal=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_of_a_minifloat(device, bits):
    """One key a code: with a weight of 1 the result is its number, the smallest that are subnormal too."""
    codes = torch.arange(2**bits, device=device)
    if bits == 8:
        codes = codes[(codes & 127) != 127]
    packed = pack_latents(torch.zeros(1, len(codes), 16, device=device), bits=bits, code="float", scale_dtype=None)
    every = codes.to(torch.uint8)[None, :, None].expand(-1, -1, packed.codes.shape[-1])
    packed = packed._replace(codes=every | every << 4 if bits == 4 else every)
    mask = torch.eye(len(codes), dtype=torch.bool, device=device)
    query = torch.zeros(1, 1, len(codes), 16, device=device)
    with use_backend("triton"):
        found = latent_attention(query, None, packed, None, scale=1.0, mask=mask)
    assert found[0, 0].equal(unpack_latents(packed)[0])


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
        *(
            tensors,
            data.draw(st.sampled_from([*(INTEGERS | OTHERS).values(), None])),
            data.draw(st.sampled_from([4, 16, 17, 128])),
        ),
        causal=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([0.2, -0.1, 0.0])),
    )


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_any_number_of_splits(device, monkeypatch, programs):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(latent_inputs(2, 3, 5, 400, 32, device=device), INTEGERS["4"], causal=True)


@pytest.mark.parametrize("format", [*INTEGERS.values(), OTHERS["asymmetric 4"], OTHERS["FP8"], None])
def test_only_rows_that_attend_a_nan_see_it(device, format):
    tensors = latent_inputs(1, 2, 30, 130, 24, device=device)
    mask = torch.rand(30, 130, generator=torch.Generator().manual_seed(0)).lt(0.5).to(device)
    mask[3] = False
    options = {"scale": 0.2, "mask": mask, "causal": True}
    clean = triton(format)(**tensors, **options)
    assert clean[:, :, 3].eq(0).all()
    sees = mask[:, 120] & (torch.arange(30, device=device) >= 20)
    poisoned = tensors | {"latent": tensors["latent"].clone()}
    poisoned["latent"][:, 120, 3] = torch.nan
    dirty = triton(format)(**poisoned, **options)
    assert dirty[0, 0].isnan().all(-1).equal(sees)
    assert dirty[:, :, ~sees].equal(clean[:, :, ~sees])


@pytest.mark.parametrize("format", [*(INTEGERS | OTHERS).values(), None], ids=[*INTEGERS, *OTHERS, "plain"])
def test_nothing_is_read_outside_the_tensors(device, format):
    tensors = latent_inputs(2, 3, 5, 150, 35, rope=5, mask=(2, 1, 1, 150), device=device)
    queries = [tensors["query_latent"], tensors["query_rope"]]
    cache = [tensors[name] if format is None else pack_latents(tensors[name], **format) for name in SEQUENCES]
    options = {"scale": 0.2, "causal": True}
    with use_backend("triton"):
        expected = latent_attention(*queries, *cache, **options, mask=tensors["mask"])
        guarded = [with_margin(x) if format is None else x.map(with_margin) for x in cache]
        queries, mask = [with_margin(x) for x in queries], with_margin(tensors["mask"])
        with poisoned_scratch():
            found = latent_attention(*queries, *guarded, **options, mask=mask)
    assert found.equal(expected)


@pytest.mark.parametrize("format", [*INTEGERS.values(), OTHERS["asymmetric 4"], OTHERS["4 without scales"]])
def test_packed_latents_may_lie_in_a_larger_buffer(device, format):
    tensors = latent_inputs(2, 3, 4, 90, 64, rope=16, device=device)
    queries = [tensors["query_latent"], tensors["query_rope"]]
    cache = [pack_latents(tensors[name], group_size=16, **format) for name in SEQUENCES]

    def inside(x):
        room = torch.full((3, 200, x.shape[2]), 255 if x.dtype == torch.uint8 else torch.nan, device=device)
        room = room.to(x.dtype)
        room[1:, 7:97] = x
        return room[1:, 7:97]

    with use_backend("triton"):
        expected = latent_attention(*queries, *cache, scale=0.2, causal=True)
        for lay in (inside, lambda x: lay_out(x, "transposed"), lambda x: lay_out(x, "sliced")):
            views = [p.map(lay) for p in cache]
            assert latent_attention(*queries, *views, scale=0.2, causal=True).equal(expected)


def test_decoding_continues_the_full_causal_pass(device):
    tensors = latent_inputs(1, 2, 90, 90, 32, device=device)
    full = triton(INTEGERS["4"])(**tensors, scale=0.2, causal=True)
    for first, last in ((89, 90), (30, 71)):
        chunk = {name: x[:, :, first:last] for name, x in tensors.items() if name.startswith("query")}
        chunk |= {name: tensors[name][:, :last] for name in SEQUENCES}
        torch.testing.assert_close(triton(INTEGERS["4"])(**chunk, scale=0.2, causal=True), full[:, :, first:last])


def test_wide_latents_are_refused(device):
    with pytest.raises(ValueError, match="query_latent: the triton backend takes a last dimension up to 512, got 513"):
        triton()(**latent_inputs(1, 1, 1, 2, 513, device=device), scale=0.2)


def test_it_is_a_torch_op(device):
    t = latent_inputs(1, 2, 3, 9, 16, device=device)
    p, r = pack_latents(t["latent"]), pack_latents(t["rope"])
    packed = [(x.codes, x.scales, x.bits, x.group_size, x.code) for x in (p, r)]
    arguments = (t["query_latent"], t["query_rope"], *packed[0], *packed[1])
    torch.library.opcheck(torch.ops.tenfold.latent_attention, (*arguments, None, True, 0.25, "triton"))
