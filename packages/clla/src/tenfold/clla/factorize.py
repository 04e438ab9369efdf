"""Keys and values of a run of ordinary attention layers as one latent and one rotary key: the linear algebra.

Everything is a linear map of the producer's normed hidden state x, with a 1 appended where there are biases. Key rows
2i-th and (2i + d_h)-th of a head are a complex number that rotary embedding multiplies by e^{iθt}, and so:

1. Readers' maps are brought to the producer's x: x_l ≈ M_l x_g, by least squares on calibration text, or without one by
   taking the residual stream to be the same in both layers, so that only the norms' weights differ.
2. Rotary key. At a frequency θ, the complex keys of all heads and layers of the run are U·p(x) with U unitary
   columns: a complex factor passes through the rotation, so the shared p(x) is rotated in their place, and the factor
   goes into each head's query. This is exact for what p keeps: as many components as `rope_dim` has room for.
3. What is left over of the keys is not rotated any more. A rotation over distances 0…W is replaced by its mean, the
   constant a = (e^{iθW} − 1)/(iθW), the best one in the least-squares sense: about 1 for slow frequencies, 0 for fast.
4. Latent. Those remainders and the values, of all layers of the run together, are reduced to `latent_dim` by a singular
   value decomposition that minimizes the error for x as it is distributed, Σ = E[xxᵀ].
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """The layers that will share a cache, in float64."""

    query: list[Tensor]  # per layer (heads, d_h, d+1 or d)
    key: list[Tensor]  # per layer (kv_heads, d_h, ·), as maps of the producer's input
    value: list[Tensor]
    root: Tensor  # Σ^½, (·, ·)


class Factors(NamedTuple):
    """The weights that take their place."""

    down: Tensor  # (latent_dim, ·)
    rope: Tensor  # (rope_dim, ·)
    query: list[Tensor]  # per layer (heads, d_h + rope_dim, ·)
    key_up: list[Tensor]  # per layer (heads, d_h, latent_dim)
    value_up: list[Tensor]
    errors: list[dict[str, float]]  # per layer


def rotary_components(runs: list[Run], frequencies: Tensor, *, rope_dim: int, window: int) -> list[int]:
    """How many components of each frequency the rotary key gets, the same in every run: the largest gains first.

    The gain of a component is the energy that would be wrong by not rotating it: σ²·(1 − |a|²).
    """
    left = 1 - _mean_rotation(frequencies, window).abs().square()
    gains = []
    for run in runs:
        keys = _complex(torch.cat(run.key)) @ run.root.to(torch.complex128)
        sigma = torch.linalg.svdvals(keys.transpose(0, 1))  # (d_h / 2, components)
        gains.append(sigma.square() * left[:, None] / sigma.square().sum())
    gain = torch.stack([g[:, : min(x.shape[1] for x in gains)] for g in gains]).mean(0)
    room = gain.numel()
    if rope_dim // 2 > room:
        raise ValueError(f"rope_dim: at most {2 * room}, all that the keys of a run have, got {rope_dim}")
    # Components of one frequency come by size; a last one to break ties keeps their order.
    order = (gain - 1e-12 * torch.arange(gain.shape[1])).flatten().argsort(descending=True)[: rope_dim // 2]
    return torch.bincount(order // gain.shape[1], minlength=len(frequencies)).tolist()


def factorize(run: Run, frequencies: Tensor, components: list[int], *, latent_dim: int, window: int) -> Factors:
    """One run's weights; see the head of this file.

    Args:
        run: the layers.
        frequencies: θ, radians per token, `(d_h / 2,)`.
        components: of each frequency in the rotary key, as `rotary_components` chose them.
        latent_dim: numbers of the latent.
        window: W, tokens.
    """
    kv_heads, group = run.key[0].shape[0], run.query[0].shape[0] // run.key[0].shape[0]
    keys = _complex(torch.cat(run.key))  # (layers·kv_heads, d_h / 2, ·)
    root = run.root.to(torch.complex128)

    shared, factor, rest = [], [], keys.clone()
    for i, kept in enumerate(components):
        if kept:
            left, _, _ = torch.linalg.svd(keys[:, i] @ root, full_matrices=False)
            left = left[:, :kept]
            shared.append(left.mH @ keys[:, i])
            rest[:, i] -= left @ shared[-1]
            factor += [(i, column) for column in left.T]
    rope = torch.cat(shared) if shared else keys.new_zeros(0, keys.shape[-1])
    rest = _real(rest * _mean_rotation(frequencies, window).conj()[:, None])

    contents, values = rest.split(kv_heads), run.value
    norms = [[torch.linalg.norm(x @ run.root) for x in xs] for xs in (run.key, values)]
    blocks = [*contents, *values]
    weights = [max(norm.item(), 1e-30) for norm in (*norms[0], *norms[1])]
    stacked = torch.cat([block.flatten(0, 1) / weight for block, weight in zip(blocks, weights, strict=True)])
    left, sigma, right = torch.linalg.svd(stacked @ run.root, full_matrices=False)
    if latent_dim > len(sigma):
        raise ValueError(
            f"latent_dim: at most {len(sigma)}, the rank of the keys and values of a run, got {latent_dim}"
        )
    # The latent is white: rounding to few bits then costs each direction in proportion to what it carries.
    down = torch.linalg.lstsq(run.root.T, right[:latent_dim].T).solution.T
    ups = [
        weight * up.unflatten(0, (kv_heads, -1))
        for up, weight in zip((left * sigma)[:, :latent_dim].chunk(len(blocks)), weights, strict=True)
    ]
    key_ups, value_ups = ups[: len(contents)], ups[len(contents) :]

    queries, errors = [], []
    for layer, query in enumerate(run.query):
        of_head = layer * kv_heads + torch.arange(len(query)) // group
        turned = [_complex(query)[:, i] * column[of_head].conj()[:, None] for i, column in factor]
        rotary = torch.stack(turned, 1) if turned else _complex(query)[:, :0]
        queries.append(torch.cat([query, _real(rotary)], dim=1))
        errors.append(
            {
                "keys": _relative((contents[layer] - key_ups[layer] @ down) @ run.root, norms[0][layer]),
                "values": _relative((values[layer] - value_ups[layer] @ down) @ run.root, norms[1][layer]),
                "rotation": _lost_rotation(keys, rest, run, layer, kv_heads, frequencies, window, norms[0][layer]),
            }
        )
    return Factors(
        down,
        _real(rope[None])[0],
        queries,
        [up.repeat_interleave(group, dim=0) for up in key_ups],
        [up.repeat_interleave(group, dim=0) for up in value_ups],
        errors,
    )


def square_root(covariance: Tensor, *, ridge: float = 1e-6) -> Tensor:
    """Σ^½, symmetric, with a share of the mean eigenvalue added so that it has an inverse."""
    n = len(covariance)
    eigenvalues, vectors = torch.linalg.eigh(covariance + ridge * covariance.trace() / n * torch.eye(n).to(covariance))
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


def _mean_rotation(frequencies: Tensor, window: int) -> Tensor:
    """Of e^{iθΔ} over distances Δ from 0 to W."""
    angle = frequencies.to(torch.float64) * window
    return (torch.polar(torch.ones_like(angle), angle) - 1) / (1j * angle)


def _lost_rotation(keys, rest, run, layer, kv_heads, frequencies, window, norm) -> float:
    """The part of a layer's keys that would have been rotated and is held at its mean instead, relative to all."""
    mean = _mean_rotation(frequencies, window).abs()
    share = ((1 - mean.square()).clamp(min=0).sqrt() / mean.clamp(min=1e-9))[:, None]
    unrotated = _complex(rest.split(kv_heads)[layer]) * share
    return _relative(unrotated @ run.root.to(torch.complex128), norm)


def _relative(x: Tensor, norm: Tensor) -> float:
    return (torch.linalg.norm(x) / norm.clamp(min=1e-30)).item()


def _complex(x: Tensor) -> Tensor:
    """Rows `(…, d, ·)` in Llama's rotary layout, halves side by side, as `(…, d / 2, ·)` complex ones."""
    real, imaginary = x.chunk(2, dim=-2)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def _real(x: Tensor) -> Tensor:
    return torch.cat([x.real, x.imag], dim=-2)
