"""The paper's measurements on maps and models made by hand."""

import math

import pytest
import torch

from tenfold.cog_attention import Cogformer
from tenfold.cog_attention.analysis import (
    attention_maps,
    collapse_prompts,
    head_operations,
    ov_direction,
    path_mass,
    representation_gap,
    weight_statistics,
)
from tenfold.cog_attention.reproduction.subtraction import Subtractor, subtraction_error


def tiny(attention="cog", **sizes):
    torch.manual_seed(0)
    module = Cogformer(vocab_size=50, layers=3, dim=16, heads=2, ffn=24, max_length=32, attention=attention, **sizes)
    module.configure_model()
    return module.lm.eval()


@pytest.fixture
def hand_made():
    """One layer, one head: rows (1), (.5, −.5), (−.2, .3, .5)."""
    w = torch.zeros(1, 1, 3, 3)
    w[0, 0, 0, 0] = 1.0
    w[0, 0, 1, :2] = torch.tensor([0.5, -0.5])
    w[0, 0, 2] = torch.tensor([-0.2, 0.3, 0.5])
    return [w]


def test_weight_statistics(hand_made):
    statistics = weight_statistics(hand_made)
    assert statistics.negative.item() == pytest.approx((0.5 + 0.2) / 2)
    assert statistics.row_sum.item() == pytest.approx((0.0 + 0.6) / 2)
    assert statistics.sink.item() == pytest.approx((0.5 + 0.2) / 2)


def test_head_operations(hand_made):
    """Of six pairs: 1, .5 and .5 reach the uniform share from above, −.5 from below; −.2 and .3 do not."""
    operations = head_operations(hand_made)
    assert operations.copy.item() == pytest.approx(3 / 6)
    assert operations.delete.item() == pytest.approx(1 / 6)
    assert operations.retain.item() == pytest.approx(2 / 6)
    assert operations.balance.item() == pytest.approx(1 / 3)


def test_path_mass(hand_made):
    step = (hand_made[0][0, 0] + torch.eye(3)) / 2
    last = (step @ step)[-1].abs()
    assert path_mass(hand_made * 2, early=1) == pytest.approx((last.sum().item(), last[0].item()))


def test_softmax_keeps_all_path_mass_and_cog_loses_some():
    tokens = torch.randint(0, 50, (2, 20))
    assert path_mass(attention_maps(tiny("softmax"), tokens))[0] == pytest.approx(1, abs=1e-5)
    assert path_mass(attention_maps(tiny(softmax_layers=()), tokens))[0] < 0.9


@pytest.mark.parametrize("attention", ["cog", "softmax"])
def test_maps_leave_the_model_as_it_was(attention):
    model, tokens = tiny(attention), torch.randint(0, 50, (1, 10))
    before = model(tokens).logits
    maps = attention_maps(model, tokens)
    assert [w.shape for w in maps] == [(1, 2, 10, 10)] * 3
    assert bool((maps[1] < 0).any()) == (attention == "cog")
    assert torch.equal(model(tokens).logits, before)


def test_collapse_prompts_are_the_papers():
    first, second = collapse_prompts("find_a_zero", 3, [7, 8], zero=0, one=1)
    assert (first.tolist(), second.tolist()) == ([7, 8, 0, 1, 1, 1], [7, 8, 1, 1, 1, 1])
    first, second = collapse_prompts("count_ones", 3, [7], zero=0, one=1)
    assert (first.tolist(), second.tolist()) == ([7, 1, 1, 1, 1], [7, 1, 1, 1])
    with pytest.raises(ValueError, match="probe: unknown 'count'"):
        collapse_prompts("count", 3, [7], zero=0, one=1)


def test_representation_gap_is_the_mean_of_the_chunks_largest():
    model = tiny()
    first, second = torch.tensor([1, 2, 3]), torch.tensor([4, 2, 3])
    with torch.no_grad():
        h = [model.model(x[None]).last_hidden_state[0, -1].tolist() for x in (first, second)]
    difference = [abs(a - b) for a, b in zip(*h, strict=True)]
    expected = (max(difference[:8]) + max(difference[8:])) / 2
    assert representation_gap(model, first, second, chunk=8) == pytest.approx(expected)
    assert representation_gap(model, first, first, chunk=8) == 0


def test_ov_direction_of_heads_that_copy_and_that_erase():
    """Head 0 writes the token's own unembedding, head 1 its negative: cosines +1 and −1."""
    model = tiny(tie_embeddings=True)
    attention = model.model.layers[0].self_attn
    embed = model.get_input_embeddings().weight
    with torch.no_grad():
        embed[:, 8:] = 0
        embed -= embed.mean(0)
        model.model.layers[0].input_layernorm.weight.fill_(1)
        attention.v_proj.weight.copy_(torch.eye(16))
        attention.v_proj.weight[8:] = torch.eye(16)[:8]
        attention.o_proj.weight.zero_()
        attention.o_proj.weight[:8, :8] = torch.eye(8)
        attention.o_proj.weight[:8, 8:] = -torch.eye(8)
    direction = ov_direction(model, torch.randint(0, 50, (2, 12)))
    torch.testing.assert_close(direction[0], torch.tensor([1.0, -1.0]), rtol=0, atol=1e-4)
    assert direction.shape == (3, 2)


def test_subtraction_floor_of_a_softmax_head():
    """One softmax head ends at ½, its floor by convexity; one Cog head answers."""
    assert subtraction_error(attention="softmax", heads=1, seed=0, steps=150) > 0.47
    assert subtraction_error(attention="cog", heads=1, seed=0, steps=150) < 0.05


def test_subtractor_by_hand():
    model = Subtractor(dim=8, heads=1, attention="cog")
    with torch.no_grad():
        model.query.copy_(torch.eye(8)[:1, None] * math.sqrt(8))
        model.key.zero_()
        model.key[0, 0, 0], model.key[0, 1, 0] = 10.0, -10.0
        model.output.copy_(2 * torch.eye(8)[None])
    vectors = torch.randn(1, 3, 8)
    answer = model(vectors, torch.eye(3)[None])
    torch.testing.assert_close(answer[0], vectors[0, 0] - vectors[0, 1], rtol=0, atol=1e-3)
