"""The cache object: codes and scales in step through every change, and bytes as the formulas say."""

from copy import deepcopy

import pytest
import torch
from transformers.cache_utils import DummyLayer

from tenfold.clla import CLLACache, CLLAConfig, CLLAForCausalLM, bytes_per_token, rung
from tenfold.clla.cache import PAGE, CLLALayer, Stream
from tenfold.clla.formats import Format, dense, parts
from tenfold.clla.ladder import RUNGS
from tenfold.kernels import pack_latents
from tenfold.kernels.testing import peak_memory

FORMATS = [
    Format(1, 24, 4, 8),
    Format(2, 7, 4, None),
    Format(1, 10, 8, 128),
    Format(3, 6),
    Format(1, 12, 4, 8, 1e-6),
    Format(1, 24, 4, 8, code="asymmetric"),
    Format(1, 12, 8, None, 1e-6, code="asymmetric"),
    Format(2, 7, 4, 4, code="float"),
    Format(1, 10, 8, 8, code="float"),
    Format(1, 24, 4, scales=False),
    Format(1, 9, 8, code="float", scales=False),
]
each_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def vectors(format, time, batch=3, seed=0):
    shape = (batch, format.heads, time, format.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@each_format
def test_chunks_store_what_one_append_stores(format):
    x = vectors(format, 200)
    whole, chunked = Stream(format), Stream(format)
    whole.append(x)
    for chunk in x.split([1, 63, 2, 100, 34], dim=2):
        chunked.append(chunk)
    for a, b in zip(parts(whole.read()), parts(chunked.read()), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(dense(chunked.read(), torch.float32), format.round(x), rtol=0, atol=0)


def test_the_codes_are_those_of_the_op():
    x = vectors(FORMATS[0], 5)
    stream = Stream(FORMATS[0])
    stream.append(x[:, :, :3])
    for ours, theirs in zip(stream.append(x[:, :, 3:])[:2], pack_latents(x, group_size=8)[:2], strict=True):
        assert torch.equal(ours, theirs)


@each_format
def test_every_change_is_made_to_codes_and_scales_alike(format):
    x, more = vectors(format, 70), vectors(format, 9, seed=1)
    rows = torch.tensor([2, 0, 2, 1])

    layer = CLLALayer((format, format))
    layer.update(x, x.flip(0))
    layer.crop(-20)
    layer.reorder_cache(rows)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3, 5]))
    expected = x[:, :, :50][rows].repeat_interleave(2, 0)[[0, 3, 5]], x.flip(0)[:, :, :50][rows][[0, 1, 2]]
    first, second = layer.update(more, more)
    for stored, before in ((first, expected[0]), (second, expected[1])):
        torch.testing.assert_close(
            dense(stored, torch.float32), format.round(torch.cat([before, more], 2)), rtol=0, atol=0
        )
    layer.batch_select_indices(torch.tensor([True, False, True]))
    assert layer.streams[0].buffers[0].shape[0] == 2
    layer.offload()
    layer.prefetch()
    assert layer.get_seq_length() == 59 == layer.get_mask_sizes(1)[0] - 1
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(more[:1], more[:1])  # another batch size, after a reset
    assert layer.get_seq_length() == 9


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLA", "CLLA"])
def test_cropped_and_appended_again(build, name, tokens):
    model = build(name)
    cache, other = CLLACache(model.config), CLLACache(model.config)
    model(tokens, past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 8
    again = model(tokens[:, 8:], past_key_values=cache).logits
    model(tokens[:, :8], past_key_values=other)
    assert torch.equal(again, model(tokens[:, 8:], past_key_values=other).logits)
    for (name, ours), (_, theirs) in zip(cache.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GQA", {}),
        ("MLA", {}),
        ("CLLA", {}),
        ("CLLA", {"cache_code": "asymmetric"}),
        ("CLLA", {"cache_code": "float", "rope_bits": 8}),
        ("CLLA", {"cache_scales": "channel"}),
    ],
)
def test_saved_and_loaded_in_the_middle(build, name, changes, tokens, tmp_path):
    model = build(name, **changes)
    cache = CLLACache(model.config)
    model(tokens[:, :8], past_key_values=cache)
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    loaded = CLLACache(model.config)
    loaded.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
    expected = model(tokens[:, 8:], past_key_values=deepcopy(cache)).logits
    assert torch.equal(model(tokens[:, 8:], past_key_values=loaded).logits, expected)
    with pytest.raises(ValueError, match="state: saved from a cache of another config, or not whole"):
        CLLACache(build(name, cache_bits=8).config).load_state_dict(cache.state_dict())
    if changes.get("cache_code") != "asymmetric":  # codes of another kind, though as large
        other = {"cache_code": "symmetric" if changes.get("cache_code") == "float" else "float"}
        with pytest.raises(ValueError, match="state: saved from a cache of another config"):
            CLLACache(build(name, **changes | other).config).load_state_dict(cache.state_dict())
    state = cache.state_dict()
    state.popitem()
    with pytest.raises(ValueError, match=r"state: .* not whole"):
        loaded.load_state_dict(state)
    assert loaded.get_seq_length() == 13


@torch.no_grad()
@pytest.mark.parametrize("share_factor", [1, 2, 3, 7])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", RUNGS)
def test_storage_is_what_the_formulas_say(sizes, name, bits, share_factor):
    """Check 1 of the method: 4·n·d_h·L, 2·(d_c + d_r)·⌈L/s⌉ and so on, against the storage of a filled cache."""
    sizes |= {"group_size": 16, "share_factor": share_factor}
    config = rung(CLLAConfig(**sizes), name, cache_bits=bits, kv_heads=2)
    model = CLLAForCausalLM(config).to(torch.bfloat16)
    cache = CLLACache(config, max_length=40)
    model(torch.ones(3, 40, dtype=torch.long), past_key_values=cache)
    runs = -(-5 // share_factor) if name in ("CLA", "CLLA") else 5
    kv_heads = {"MHA": 4, "GQA": 2, "MQA": 1, "CLA": 2}.get(name)
    if kv_heads:  # of 8 numbers each, one scale
        formula = runs * 2 * kv_heads * (8 * bits // 8 + (2 if bits < 16 else 0))
    else:  # 24 numbers, two scales, and 6, one scale
        formula = runs * ((24 + 6) * bits // 8 + (3 * 2 if bits < 16 else 0))
    assert bytes_per_token(config) == formula
    assert cache.nbytes() == 3 * 40 * formula
    assert sum(isinstance(layer, DummyLayer) for layer in cache.layers) == 5 - runs


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "formula"),
    [
        ({"cache_code": "float"}, 12 + 2 * 2 + 3 + 2),  # FP4 takes what int4 takes
        ({"cache_code": "float", "rope_bits": 8}, 12 + 2 * 2 + 6 + 2),
        ({"cache_code": "asymmetric"}, 12 + 2 * 4 + 3 + 4),
        ({"cache_scales": "channel"}, 12 + 3 + 2),
        ({"cache_scales": "channel", "rope_key": "none"}, 12),
        ({"cache_scales": "channel", "cache_bits": 8, "cache_code": "float"}, 24 + 6 + 2),
    ],
    ids=str,
)
def test_storage_of_the_other_codes(sizes, changes, formula):
    config = CLLAConfig(**sizes | {"group_size": 16} | changes)
    cache = CLLACache(config, max_length=40)
    CLLAForCausalLM(config).to(torch.bfloat16)(torch.ones(3, 40, dtype=torch.long), past_key_values=cache)
    assert bytes_per_token(config) == 3 * formula
    assert cache.nbytes() == 3 * 40 * 3 * formula


def test_growing_wastes_a_sixteenth_and_copies_little():
    format = Format(1, 64, 4)
    stream, copied = Stream(format), 0
    for _ in range(2000):
        before = stream.buffers
        stream.append(torch.randn(1, 1, 1, 64))
        if stream.buffers is not before:
            copied += stream.length
        assert stream.buffers[0].shape[2] <= stream.length + stream.length // 16 + PAGE
    assert copied < 17 * 2000  # token by token with torch.cat it would be 2,000,000


@torch.no_grad()
def test_the_papers_cache_stays_under_two_percent():
    """Width 2048, latent 512, rotary key 64, pairs, 4 bits: 1.82 % with scales, and with the slack of growing."""
    base = CLLAConfig(hidden_size=2048, num_hidden_layers=2, num_attention_heads=16, vocab_size=8)
    mha = bytes_per_token(rung(base, "MHA", cache_bits=16))
    assert mha == 4 * 2048 * 2
    cache = CLLACache(base)
    for time in (3000, *[1] * 50):
        cache.update(torch.randn(1, 1, time, 512), torch.randn(1, 1, time, 64), 0)
    assert cache.nbytes() <= 0.02 * mha * 3050
    exact = CLLACache(base, max_length=1000)
    exact.update(torch.randn(1, 1, 1000, 512), torch.randn(1, 1, 1000, 64), 0)
    assert exact.nbytes() / (1000 * mha) == pytest.approx(0.0182, abs=5e-5)


@torch.no_grad()
def test_decoding_makes_no_unpacked_copy_of_the_cache(sizes):
    """Check 9 of the method: a decoding step needs the same memory after 8,000 tokens as after 16,000."""
    sizes |= {"max_position_embeddings": 20_000, "num_hidden_layers": 2, "latent_dim": 512, "group_size": 128}
    model = CLLAForCausalLM(CLLAConfig(**sizes)).eval()
    peaks = []
    for time in (8000, 16_000):
        cache = CLLACache(model.config, max_length=time + 1)
        cache.update(torch.randn(1, 1, time, 512), torch.randn(1, 1, time, 6), 0)

        def step(cache=cache):
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
            cache.crop(-1)

        peaks.append(peak_memory(step))
    assert peaks[1] < 1.05 * peaks[0]
    assert peaks[1] < 16_000 * 512 * 2 / 3  # of the latents in 16 bits


def test_what_a_cache_refuses(build):
    config = build().config
    latent, rope = torch.randn(2, 1, 4, 24), torch.randn(2, 1, 4, 6)
    cache = CLLACache(config, max_length=6)
    cache.update(latent, rope, 0)
    with pytest.raises(ValueError, match="past_key_values: made for 6 tokens, got 8"):
        cache.update(latent, rope, 0)
    with pytest.raises(ValueError, match=r"past_key_values: made for 1 vectors of 24 per token, got 1 of 6"):
        cache.update(rope, rope, 2)
    with pytest.raises(ValueError, match="past_key_values: a layer stores 2 kinds of vectors, got 1"):
        cache.update(latent, None, 2)
    with pytest.raises(ValueError, match="past_key_values: holds 2 sequences, got 1"):
        cache.update(latent[:1, :, :1], rope[:1, :, :1], 0)
    with pytest.raises(ValueError, match="tokens_to_remove: must not be positive, got 3"):
        cache.crop(3)
    with pytest.raises(ValueError, match="max_length: must be at least 1, got 0"):
        CLLACache(config, max_length=0)
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="offloading: there is no accelerator"):
            CLLACache(config, offloading=True)
    assert cache.get_seq_length() == 4
    assert cache.get_max_length() == 6
    assert CLLACache(config).get_max_length() == -1


def test_a_refused_update_leaves_every_stream_as_it_was(build, tokens):
    """Both streams or neither: one ahead of the other would pair each latent with another token's rotary key."""
    model = build(rope_bits=16).float()
    cache = CLLACache(model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with pytest.raises(ValueError, match=r"past_key_values: holds torch\.float32, got torch\.bfloat16"):
            model.bfloat16()(tokens[:, :1], past_key_values=cache)
    latent, rope = torch.randn(2, 1, 3, 24), torch.randn(2, 1, 3, 6)
    for wrong in ((latent, rope[:, :, :2]), (latent, latent), (latent[:1], rope)):
        with pytest.raises(ValueError, match="past_key_values: "):
            cache.update(*wrong, 0)
    assert {stream.length for _, stream in cache._streams()} == {13}


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 4])
def test_a_refused_state_changes_nothing(build, tokens, bits):
    model = build(cache_bits=bits)
    long, short = CLLACache(model.config), CLLACache(model.config, max_length=4)
    model(tokens, past_key_values=long)
    model(tokens[:, :3], past_key_values=short)
    before = short.state_dict()
    with pytest.raises(ValueError, match="state: has 13 tokens, but this cache was made for 4"):
        short.load_state_dict(long.state_dict())
    name = next(iter(before))
    wrong_groups = CLLACache(build(cache_bits=bits, group_size=10).config)  # as many scales, of other numbers
    for wrong in (
        before | {name: before[name].int()},
        before | {name: 3},
        before | {name: before[name].flatten()},
        before | {name: before[name][:, :, :2]},
        {k: v.int() for k, v in before.items()},
    ):
        with pytest.raises(ValueError, match="state: saved from a cache of another config, or not whole"):
            short.load_state_dict(wrong)
    if bits == 4:
        with pytest.raises(ValueError, match="state: saved from a cache of another config"):
            wrong_groups.load_state_dict(before)
    for (name, ours), (_, theirs) in zip(short.state_dict().items(), before.items(), strict=True):
        assert torch.equal(ours, theirs), name
    half = {k: v.half() if v.is_floating_point() else v for k, v in before.items()}
    short.load_state_dict(half)  # numbers in 16 bits may be of any dtype, and scales are float16 as they are
