"""Static scales of a latent: one step per channel, learned in training or calibrated afterwards, never cached.

With a step σ for each of the latent's channels, the cache holds codes alone, z = round(c / σ), clipped to the largest
code Q. What they stand for, ĉ = σ·z, is never formed: W ĉ = (W σ) z, so that the up-projections take the steps up, on
the side of the query (W_UK) and of the output (W_UV).

Learned step size quantization (LSQ, Esser et al. 2020, arXiv 1902.08153, eq. 3): rounding passes the gradient straight
through, clipping stops it, and so with v = c / σ

    ∂ĉ/∂c = 1 if |v| ≤ Q, else 0        ∂ĉ/∂σ = round(v) - v if |v| ≤ Q, else ±Q

the latter times 1/√(N·Q), for it to weigh as much as those of the weights, where N numbers share a step: here N = 1, a
channel's, as LSQ counts features and not the batch. The step begins at 2·E|c|/√Q. Behind an RMSNorm that is known:
c has unit variance, E|c| = √(2/π) if it is normal.
"""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from tenfold.kernels import fake_pack_latents
from tenfold.kernels.latent.packing import largest

from .formats import Format

SMALLEST = 1e-6


def initial_step(format: Format) -> float:
    """2·E|c|/√Q for c of unit variance; for a latent that is not rounded (yet), as in 4 bits."""
    return 2 * math.sqrt(2 / math.pi) / math.sqrt(_largest(format))


def normal_step(format: Format) -> float:
    """The step of least squared error for standard normal numbers; for latents that are not rounded, as in 4 bits."""
    format = replace(format, bits=4) if format.bits == 16 else format
    quantiles = torch.special.ndtri((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
    return least_squares_steps(quantiles[:, None], format, quantiles.new_ones(1)).item()


def learned_step(parameter: Tensor, format: Format) -> Tensor:
    """σ, which is positive, with LSQ's gradient: 1/√Q of the one that comes in."""
    step = parameter.abs().clamp(min=SMALLEST)
    scaled = step / math.sqrt(_largest(format))
    return step.detach() + (scaled - scaled.detach())  # the last two are 0


@torch.no_grad()
def calibrate_steps(model: nn.Module, tokens: Tensor) -> None:
    """Set the steps of a model that was trained without them: per channel the one of least squared error on `tokens`.

    One forward pass: each layer's steps are set before the layers after it see their latents, rounded.

    Args:
        model: a `CLLAForCausalLM` or `CLLAModel` whose config has `cache_scales="channel"` and 4 or 8 `cache_bits`.
        tokens: of ordinary text, `(rows, time)`; a few thousand.

    Raises:
        ValueError: the model has no steps, or does not round; or there are no tokens.

    Example:
        >>> model = CLLAForCausalLM.from_pretrained("runs/my-clla", cache_scales="channel")
        >>> calibrate_steps(model, tokens)
    """
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"tokens: expected (rows, time), not empty, got {tuple(tokens.shape)}")
    config = model.config
    if config.attention != "latent" or config.cache_scales != "channel" or config.cache_bits == 16:
        raise ValueError(
            "model: has no steps to calibrate; they need attention 'latent', cache_scales 'channel' and cache_bits 4 "
            f"or 8, got {config.attention!r}, {config.cache_scales!r} and {config.cache_bits}"
        )
    producers = [layer.self_attn for layer in model.base_model.layers if layer.self_attn.produces]
    hooks = [module.kv_norm.register_forward_hook(partial(_calibrate, module)) for module in producers]
    training = model.training
    try:
        model.eval().base_model(tokens, use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def least_squares_steps(c: Tensor, format: Format, otherwise: Tensor) -> Tensor:
    """For each column of `c`, `(N, width)`, the step of least squared error; `otherwise` for columns of zeros.

    The best of those that put the largest code at 1 %, 2 %, …, 100 % of the column's largest number.
    """
    best, least = otherwise, c.new_full((c.shape[1],), torch.inf)
    for percent in range(1, 101):
        step = c.abs().amax(0) * (percent / 100 / largest(format.bits, format.code))
        rounded = step * fake_pack_latents(c / step, bits=format.bits, code=format.code, scale_dtype=None)
        error = (rounded - c).square().sum(0)
        better = (error < least) & (step > 0)
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


def _calibrate(module: nn.Module, norm: nn.Module, args: tuple, latent: Tensor) -> None:
    c = latent.flatten(0, -2).to(torch.promote_types(latent.dtype, torch.float32))
    format = module.config.cache_formats(module.layer_idx)[0]
    steps = module.latent_steps
    steps.copy_(least_squares_steps(c, format, steps.to(c.dtype)))


def _largest(format: Format) -> float:
    return largest(4 if format.bits == 16 else format.bits, format.code)
