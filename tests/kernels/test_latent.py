"""`latent_attention` on the CPU against its float64 definition, expanded attention, and toys by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tenfold.kernels import PackedLatents, latent_attention, pack_latents, unpack_latents, use_backend
from tenfold.kernels.latent import cpu
from tenfold.kernels.testing import check_op, latent_inputs, lay_out, poisoned_scratch, with_margin

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
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
PACKED = INTEGERS | OTHERS
each_format = pytest.mark.parametrize("format", [*PACKED.values(), None], ids=[*PACKED, "plain"])
each_packed = pytest.mark.parametrize("format", PACKED.values(), ids=PACKED)


def reference(query_latent, latent, query_rope=None, rope=None, **options):
    with use_backend("reference"):
        return latent_attention(query_latent, query_rope, latent, rope, **options)


def attending(format=None, group_size=16):
    """The op over plain latents, or over what packing makes of them."""

    def attend(query_latent, latent, query_rope=None, rope=None, **options):
        if format is not None:
            latent, rope = (
                None if x is None else pack_latents(x, group_size=group_size, **format) for x in (latent, rope)
            )
        return latent_attention(query_latent, query_rope, latent, rope, **options)

    return attend


def check(tensors, format=None, group_size=16, **options):
    """The error budget, over plain latents or packed ones; those are the same for the op and its definition."""
    options = {"scale": 0.3} | options
    if format is None:
        check_op(attending(), reference, tensors, **options)
        return
    cache = [
        pack_latents(tensors[name], group_size=group_size, **format) if name in tensors else None for name in SEQUENCES
    ]

    def attend(query_latent, query_rope=None, **options):
        return latent_attention(query_latent, query_rope, *cache, **options)

    def definition(**arguments):
        with use_backend("reference"):
            return attend(**arguments)

    check_op(attend, definition, {name: x for name, x in tensors.items() if name not in SEQUENCES}, **options)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks each way at the sizes of a test."""
    monkeypatch.setattr(cpu, "KEYS", 8)
    monkeypatch.setattr(cpu, "ROWS", 6)


@pytest.mark.parametrize("format", [*INTEGERS.values(), None], ids=[*INTEGERS, "plain"])
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "dim", "rope", "causal"),
    [
        (16, 1, 2048, 64, 16, False),  # decoding over whole blocks: oneDNN's product
        (16, 1, 5000, 32, 8, True),
        (3, 40, 2100, 24, 0, True),  # chunked prefill without a rotary part
        (4, 300, 300, 24, 8, True),  # more rows than a product takes
        (3, 50, 20, 24, 8, True),  # more queries than keys: the first attend nothing
        (1, 1, 1, 1, 1, True),
        (2, 3, 0, 4, 2, True),
        (2, 0, 3, 4, 2, False),
        (0, 2, 3, 4, 2, False),
    ],
)
def test_output_is_within_the_budget(format, dtype, heads, queries, keys, dim, rope, causal):
    check(latent_inputs(2, heads, queries, keys, dim, rope=rope, dtype=dtype), format, causal=causal)


@pytest.mark.parametrize("format", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "dim", "rope", "group"),
    [(16, 1, 2048, 64, 16, 16), (3, 40, 1100, 35, 0, 16), (2, 3, 70, 33, 5, 128), (1, 1, 1, 1, 1, 1)],
)
def test_other_codes_are_within_the_budget(format, dtype, heads, queries, keys, dim, rope, group):
    check(latent_inputs(2, heads, queries, keys, dim, rope=rope, dtype=dtype), format, group, causal=True)


@pytest.mark.parametrize("first", PACKED.values(), ids=PACKED)
def test_latents_and_rotary_keys_may_be_packed_differently(backend, first):
    tensors = latent_inputs(2, 3, 4, 20, 24)
    queries, whole = (tensors["query_latent"], tensors["query_rope"]), [tensors[name] for name in SEQUENCES]
    for second in ({"bits": 8, "code": "float"}, None):
        cache = [x if f is None else pack_latents(x, **f) for x, f in zip(whole, (first, second), strict=True)]
        values = [unpack_latents(x) if isinstance(x, PackedLatents) else x for x in cache]
        found = latent_attention(*queries, *cache, scale=0.1, causal=True)
        torch.testing.assert_close(found, latent_attention(*queries, *values, scale=0.1, causal=True))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes_in_any_blocks(data):
    batch, heads = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5))
    queries, keys = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 60))
    shape = tuple(data.draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys))
    tensors = latent_inputs(
        *(batch, heads, queries, keys, data.draw(st.integers(1, 70))),
        rope=data.draw(st.integers(0, 20)),
        mask=data.draw(st.sampled_from([None, shape[data.draw(st.integers(0, 3)) :]])),
        dtype=data.draw(st.sampled_from(HALF_AND_FULL)),
        latent_dtype=data.draw(st.sampled_from([None, *HALF_AND_FULL])),
        layout=data.draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])),
        seed=data.draw(st.integers(0, 99)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "KEYS", data.draw(st.integers(1, 70)))
        patch.setattr(cpu, "ROWS", data.draw(st.integers(1, 70)))
        check(
            *(tensors, data.draw(st.sampled_from([*PACKED.values(), None])), data.draw(st.integers(1, 70))),
            causal=data.draw(st.booleans()),
            scale=data.draw(st.sampled_from([0.3, -0.1, 0.0, 2.0])),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_format
def test_absorbed_is_expanded_attention(backend, dtype, format):
    # Latents narrower and wider than a head with its rotary part: the scale must not depend on their width.
    heads, width, rotary, queries, keys = 4, 16, 8, 5, 40
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    for dim in (12, 24, 100):
        latent, rope = draw(2, keys, dim), draw(2, keys, rotary)
        up_key, up_value = draw(heads, width, dim) / dim**0.5, draw(heads, width, dim) / dim**0.5
        query, query_rope = draw(2, heads, queries, width), draw(2, heads, queries, rotary)
        cache = [latent, rope]
        if format is not None:
            cache = [pack_latents(x, **format) for x in cache]
            latent, rope = (unpack_latents(x, dtype=dtype) for x in cache)
        absorbed = torch.einsum("hdc,bhqd->bhqc", up_key, query)
        scale = 1 / math.sqrt(width + rotary)
        z = latent_attention(absorbed, query_rope, *cache, scale=scale, causal=True)
        ours = torch.einsum("hdc,bhqc->bhqd", up_value, z)

        key = torch.einsum("hdc,bkc->bhkd", up_key, latent)
        key = torch.cat([key, rope.unsqueeze(1).expand(-1, heads, -1, -1)], -1)
        value = torch.einsum("hdc,bkc->bhkd", up_value, latent)
        attended = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        expanded = F.scaled_dot_product_attention(torch.cat([query, query_rope], -1), key, value, attended)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(ours, expanded, rtol=tolerance, atol=tolerance)


def test_worked_by_hand(backend):
    # Latents (7, 0), (0, 7) and (7, 7), which 4 bits hold exactly; rotary keys -7, 0 and 0.
    latent, rope = torch.tensor([[[7.0, 0.0], [0.0, 7.0], [7.0, 7.0]]]), torch.tensor([[[-7.0], [0.0], [0.0]]])
    query, query_rope = torch.tensor([math.log(2.5), math.log(2)]).view(1, 1, 1, 2), torch.ones(1, 1, 1, 1)
    # Scores log 2.5, log 2 and log 5; the rotary part takes log 2.5 from the first.
    for rotary, weights in ((None, [2.5, 2.0, 5.0]), (query_rope * math.log(2.5), [1.0, 2.0, 5.0])):
        share = torch.tensor(weights) / sum(weights)
        keys = None if rotary is None else rope
        for cache in ((latent, keys), (pack_latents(latent), None if keys is None else pack_latents(keys))):
            z = latent_attention(query, rotary, *cache, scale=1 / 7)
            torch.testing.assert_close(z.flatten(), share @ latent[0])


@each_format
@pytest.mark.usefixtures("small_blocks")
def test_decoding_and_chunks_continue_the_full_causal_pass(backend, format):
    tensors, attend = latent_inputs(2, 3, 30, 30, 24), attending(format)
    full = attend(**tensors, scale=0.3, causal=True)
    for first, last in ((29, 30), (12, 25), (0, 7)):
        chunk = {name: x[:, :, first:last] for name, x in tensors.items() if name.startswith("query")}
        chunk |= {name: tensors[name][:, :last] for name in SEQUENCES}
        torch.testing.assert_close(attend(**chunk, scale=0.3, causal=True), full[:, :, first:last])


@each_packed
@pytest.mark.usefixtures("small_blocks")
def test_packed_latents_may_lie_in_a_larger_buffer(backend, format):
    tensors = latent_inputs(2, 3, 4, 20, 35, rope=5)
    queries = tensors["query_latent"], tensors["query_rope"]
    cache = [pack_latents(tensors[name], group_size=16, **format) for name in SEQUENCES]
    expected = latent_attention(*queries, *cache, scale=0.3, causal=True)

    def inside(x):
        room = torch.full((x.shape[0] + 1, 50, x.shape[2]), 255 if x.dtype == torch.uint8 else torch.nan).to(x.dtype)
        room[1:, 7:27] = x
        return room[1:, 7:27]

    views = [p.map(inside) for p in cache]
    assert latent_attention(*queries, *views, scale=0.3, causal=True).equal(expected)
    for layout in ("transposed", "sliced"):
        strided = [p.map(lambda x, layout=layout: lay_out(x, layout)) for p in cache]
        assert latent_attention(*queries, *strided, scale=0.3, causal=True).equal(expected)


@each_format
@pytest.mark.usefixtures("small_blocks")
def test_left_padding_is_as_if_it_were_not_there(backend, format):
    tensors, attend = latent_inputs(1, 3, 4, 20, 24), attending(format)
    alone = attend(**tensors, scale=0.3, causal=True)
    padded = {name: F.pad(tensors[name], (0, 0, 11, 0), value=math.nan) for name in SEQUENCES}
    mask = torch.arange(31).view(1, 1, 1, 31) >= 11
    found = attend(**tensors | padded, scale=0.3, causal=True, mask=mask)
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("format", [*list(PACKED.values())[:6], None], ids=[*list(PACKED)[:6], "plain"])  # with scales
@pytest.mark.usefixtures("small_blocks")
def test_only_rows_that_attend_a_nan_see_it(backend, bad, name, format):
    tensors = latent_inputs(1, 2, 30, 30, 24)
    mask = torch.rand(30, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[3] = False
    attend = attending(format)
    for options, sees in (({"mask": mask}, mask[:, 17]), ({"causal": True}, torch.arange(30) >= 17)):
        clean = attend(**tensors, scale=0.3, **options)
        poisoned = tensors | {name: tensors[name].clone()}
        poisoned[name][:, 17, 3] = bad
        dirty = attend(**poisoned, scale=0.3, **options)
        if bad != bad:  # an infinite score may also be a weight of 0
            assert dirty[0, 0].isnan().all(-1).equal(sees)
        torch.testing.assert_close(dirty[:, :, ~sees], clean[:, :, ~sees])


@pytest.mark.usefixtures("small_blocks")
def test_rows_that_attend_nothing_are_zero_whatever_they_hold(backend):
    tensors = latent_inputs(2, 3, 30, 20, 24)
    tensors["query_latent"][:, :, :10] = torch.nan
    out = attending()(**tensors, scale=0.3, causal=True)
    assert out[:, :, :10].eq(0).all()
    assert out[:, :, 10:].isfinite().all()
    mask = torch.ones(2, 1, 30, 1, dtype=torch.bool)
    mask[1, :, [3, 29]] = False
    out = attending()(**latent_inputs(2, 3, 30, 20, 24), mask=mask, scale=0.3)
    assert out[1, :, [3, 29]].eq(0).all()
    assert out.ne(0).any(-1).sum() == 2 * 3 * 30 - 6


@each_format
@pytest.mark.usefixtures("small_blocks")
def test_huge_scores(format):
    check(latent_inputs(1, 3, 7, 30, 24), format, scale=1e4)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
@each_format
@pytest.mark.usefixtures("small_blocks")
def test_scratch_and_margins_are_never_read(layout, format):
    tensors = latent_inputs(2, 3, 5, 30, 35, rope=5, mask=(2, 1, 1, 30), layout=layout)
    queries = [tensors["query_latent"], tensors["query_rope"]]
    cache = [tensors[name] if format is None else pack_latents(tensors[name], **format) for name in SEQUENCES]
    expected = latent_attention(*queries, *cache, scale=0.3, causal=True, mask=tensors["mask"])
    cache = [with_margin(x) if format is None else x.map(with_margin) for x in cache]
    with poisoned_scratch():
        guarded = latent_attention(
            *map(with_margin, queries), *cache, scale=0.3, causal=True, mask=with_margin(tensors["mask"])
        )
    assert guarded.equal(expected)


def test_whole_blocks_and_the_last_agree(monkeypatch):
    # One product by oneDNN, the other by MKL.
    tensors = latent_inputs(1, 4, 1, 64, 32)
    results = []
    for size in (64, 65):
        monkeypatch.setattr(cpu, "KEYS", size)
        results.append(attending(INTEGERS["4"])(**tensors, scale=0.3))
    torch.testing.assert_close(*results)


def test_a_permutation_of_the_keys_changes_nothing(backend):
    tensors = latent_inputs(2, 3, 5, 30, 24)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    moved = tensors | {name: tensors[name][:, order] for name in SEQUENCES}
    torch.testing.assert_close(
        attending(INTEGERS["4"])(**tensors, scale=0.3), attending(INTEGERS["4"])(**moved, scale=0.3)
    )
