"""The noise batch of models whose gradient and its covariance are known."""

import math

import pytest
import torch
from torch import nn

from tenfold.hunyuan_moe import MoELayer, noise_batch

SIGMA, DIM = 0.5, 50


def quadratic(n, items, *, distance=1.0, seed=0):
    """Losses ½|w - x|², x normal around a point at `distance` of w = 0: |G|² = distance², tr Σ = DIM · SIGMA²."""
    generator = torch.Generator().manual_seed(seed)
    batches = SIGMA * torch.randn(n, items, DIM, generator=generator)
    batches[..., 0] += distance
    return (lambda x: (w - x).square().sum(1).mean() / 2), [w := torch.zeros(DIM, requires_grad=True)], batches


def test_a_known_noise_batch():
    found = [noise_batch(*quadratic(32, 4, seed=seed), batch_size=4) for seed in range(100)]
    truth = DIM * SIGMA**2  # over |G|² = 1
    for values, true in (([f.noise for f in found], truth), ([f.gradient for f in found], 1.0)):
        values = torch.tensor(values)
        assert abs(values.mean() - true) < 4 * values.std() / 10  # without bias, whatever the number of batches
    assert sum(f.low <= truth <= f.high for f in found) >= 88  # of 95 expected
    assert sorted(f.value for f in found)[50] == pytest.approx(truth, rel=0.1)


def test_neither_the_batches_nor_the_unit_matter():
    """The same items in other batches; sequences of 128 tokens."""
    loss, weights, batches = quadratic(4096, 1)
    single = noise_batch(loss, weights, batches, batch_size=1)
    by_eights = noise_batch(loss, weights, batches.view(512, 8, DIM), batch_size=8)
    tokens = noise_batch(loss, weights, batches, batch_size=128, groups=32)
    assert by_eights.value == pytest.approx(single.value, rel=0.05)
    assert tokens.value == pytest.approx(128 * single.value, rel=0.01)
    assert single.low < DIM * SIGMA**2 < single.high


def test_definition_in_float64():
    """One group per batch, uneven numbers: against the two sums written out."""
    loss, weights, batches = quadratic(7, 3)
    g = -batches.double().mean(1)
    mean_square, square_mean = g.square().sum(1).mean(), g.mean(0).square().sum()
    noise = noise_batch(loss, weights, batches, batch_size=3, groups=4)
    assert noise.gradient == pytest.approx(float((7 * square_mean - mean_square) / 6), rel=1e-5)
    assert noise.noise == pytest.approx(float(3 * 7 / 6 * (mean_square - square_mean)), rel=1e-5)


def test_no_gradient_is_an_infinite_batch():
    noise = noise_batch(*quadratic(64, 4, distance=0.0), batch_size=4)
    assert noise.high == math.inf
    assert noise.low > DIM * SIGMA**2


def test_the_training_is_left_as_it_was():
    layer = MoELayer(8, 6, 4)  # recycles by random numbers, and may leave an expert without tokens
    batches = torch.randn(8, 3, 8)
    state = torch.get_rng_state()
    noise = noise_batch(lambda x: layer(x)[0].square().mean(), layer.parameters(), batches, batch_size=3, groups=4)
    assert noise.noise > 0
    assert all(p.grad is None for p in layer.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: must be positive, got 0"),
        ({"groups": 2}, "groups: an interval needs at least 3, got 2"),
        ({"batches": torch.ones(7, 1)}, "batches: 8 groups need at least as many, got 7"),
        ({"batches": torch.ones(16, 1)}, "batches: their gradients are all the same"),
        ({"batches": torch.full((16, 1), torch.nan)}, "loss: a gradient is not finite"),
        ({"parameters": []}, "parameters: none of them requires a gradient"),
    ],
)
def test_mistakes(options, message):
    model = nn.Linear(1, 1)
    arguments = {"parameters": model.parameters(), "batches": torch.randn(16, 1), "batch_size": 1} | options
    with pytest.raises(ValueError, match=message):
        noise_batch(lambda x: model(x).square().mean(), **arguments)
