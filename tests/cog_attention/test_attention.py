"""`CogAttention` and its cache, against the definition and against transformers' rotary embedding."""

import pytest
import torch

from tenfold.cog_attention import CogAttention, KVCache
from tenfold.cog_attention.attention import rotate


def by_definition(layer, x, attended):
    """The layer in float64, one head at a time, without rotary embedding."""
    B, T, _ = x.shape
    q, k, v = (p(x).view(B, T, -1, layer.head_dim).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    heads = []
    for h in range(layer.heads):
        kv = h // (layer.heads // layer.kv_heads)
        s = q[:, h] @ k[:, kv].mT / layer.head_dim**0.5
        e = s.abs().exp() * attended
        heads.append((s.sign() * e / e.sum(-1, keepdim=True)) @ v[:, kv])
    return layer.o_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_is_the_definition(causal, kv_heads):
    torch.manual_seed(0)
    layer = CogAttention(24, 4, kv_heads=kv_heads, causal=causal, bias=True).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    attended = torch.ones(9, 9).tril() if causal else torch.ones(9, 9)
    torch.testing.assert_close(layer(x), by_definition(layer, x, attended))


def test_the_first_token_may_give_its_negative():
    layer = CogAttention(4, 1)
    with torch.no_grad():
        for proj in (layer.q_proj, layer.v_proj, layer.o_proj):
            proj.weight.copy_(torch.eye(4))
        layer.k_proj.weight.copy_(-torch.eye(4))
    x = torch.randn(1, 1, 4)
    torch.testing.assert_close(layer(x), -x)


@pytest.mark.parametrize("rotary", [None, 10_000.0])
def test_cache_equals_one_pass(rotary):
    torch.manual_seed(0)
    layer = CogAttention(32, 4, kv_heads=2, rotary=rotary)
    x, cache = torch.randn(2, 12, 32), KVCache()
    parts = [layer(part, cache=cache) for part in (x[:, :5], x[:, 5:9], x[:, 9:10], x[:, 10:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x))
    assert len(cache) == 12


def test_a_mask_hides_keys():
    torch.manual_seed(0)
    layer = CogAttention(16, 2, causal=False)
    x = torch.randn(2, 6, 16)
    mask = torch.tensor([True] * 4 + [False] * 2)
    torch.testing.assert_close(layer(x, mask=mask)[:, :4], layer(x[:, :4]))


def test_rotation_depends_on_the_distance_alone():
    """q_i · k_j after rotation is a function of i − j, and position 0 is left as it is."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float32).unbind()
    positions = torch.arange(40)
    rq, rk = (rotate(x.expand(1, 1, 40, 16), positions, 10_000.0)[0, 0] for x in (q, k))
    scores = rq @ rk.T
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rq[0], q[0, 0, 0])
    torch.testing.assert_close(rq.norm(dim=-1), q.norm().expand(40))


def test_rotation_against_transformers():
    """transformers' layout holds the pairs' first members, then the second ones; the scores are the same."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k = torch.randn(2, 1, 2, 10, 16, generator=torch.Generator().manual_seed(0)).unbind()
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=16)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(10)[None])
    halves = [torch.cat([x[..., 0::2], x[..., 1::2]], -1) for x in (q, k)]
    tq, tk = apply_rotary_pos_emb(*halves, cos, sin)
    ours = rotate(q, torch.arange(10), 10_000.0) @ rotate(k, torch.arange(10), 10_000.0).mT
    torch.testing.assert_close(ours, tq @ tk.mT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 30, "heads": 4}, "heads: 4 does not divide dim, 30"),
        ({"dim": 32, "heads": 4, "kv_heads": 3}, "kv_heads: 3 does not divide heads, 4"),
        ({"dim": 12, "heads": 4, "rotary": 1e4}, "rotary: needs an even head_dim, got 3"),
        ({"dim": 12, "heads": 0}, "kv_heads: 0"),
    ],
)
def test_wrong_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        CogAttention(**arguments)


def test_a_cache_of_another_batch():
    layer, cache = CogAttention(8, 2), KVCache()
    layer(torch.randn(2, 3, 8), cache=cache)
    with pytest.raises(ValueError, match="cache: holds a batch of 2, the input has 1"):
        layer(torch.randn(1, 1, 8), cache=cache)
