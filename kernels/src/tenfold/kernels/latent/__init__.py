"""Attention straight over a cache of latents, as they are or packed in 8 or 4 bits (arXiv 2410.15252)."""

import math

import torch
from torch import Tensor

from ..backend import autocast, choose_backend, require_tensors
from . import cpu, reference
from .packing import PackedLatents, check_packed, fake_pack_latents, pack_latents, shape_of, unpack_latents

__all__ = ["PackedLatents", "fake_pack_latents", "latent_attention", "pack_latents", "unpack_latents"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Latents = Tensor | PackedLatents


def latent_attention(
    query_latent: Tensor,
    query_rope: Tensor | None,
    latent: Latents,
    rope: Latents | None,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of every head over one shared sequence of latents, with the up-projections absorbed.

    In multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), head h has keys `[W_UK,h c_j; k_j]` and
    values `W_UV,h c_j`, where the latent c_j and the rotary key k_j are all that is cached. With the first
    up-projection moved to the query, q̃ = W_UK,hᵀ q, neither is ever expanded. For query row i of any head:

        s_ij = scale · (q̃_i · c_j + q_i · k_j)
        z_i  = Σ_j softmax_j(s_ij) c_j

    and the caller applies W_UV,h to z. Packed latents are read as they lie, codes and scales, whatever the codes
    stand for; what is unpacked at a time is a block, whatever Tk is. Steps of channels, by which latents that have
    no scales were divided, are for the caller to multiply into q̃ and z. Products, softmax and sums are float32 also
    for half-precision inputs.

    An inference op: no gradient passes through it. Training attends to expanded keys and values, or takes
    `use_backend("reference")`, which is differentiable where the latents are plain tensors.

    Args:
        query_latent: q̃, `(B, H, Tq, Dc)`, float32, bfloat16, float16, or float64 (not on the triton backend).
        query_rope: `(B, H, Tq, Dr)`, rotated already, in query_latent's dtype; None without a rotary part.
        latent: `(B, Tk, Dc)`, a tensor of any of the dtypes above, or what `pack_latents` made of one, in any code.
        rope: `(B, Tk, Dr)`, likewise; rotated before it was packed. None where query_rope is.
        scale: of the scores. It has no default because what attention usually takes, 1/√(Dc + Dr), is wrong
            here: the products are those of the expanded keys, so it is 1/√(d_h + Dr), d_h the width of a head.
        causal: row i attends keys `j ≤ i + Tk - Tq`: the last query is aligned with the last key, so that
            decoding and chunked prefill against a cache need no mask.
        mask: bool, broadcastable to `(B, H, Tq, Tk)`, True = attend; both it and `causal` must allow a key.
            Whatever an unattended latent or rotary key holds, NaN included, changes nothing.

    Returns:
        z, `(B, H, Tq, Dc)` in query_latent's dtype. A row that attends no key is zero.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or scale, before anything is computed.

    Example:
        >>> query, rotary = torch.randn(1, 16, 1, 512), torch.randn(1, 16, 1, 64)
        >>> latents, keys = pack_latents(torch.randn(1, 100, 512)), pack_latents(torch.randn(1, 100, 64))
        >>> latent_attention(query, rotary, latents, keys, scale=1 / math.sqrt(128 + 64)).shape
        torch.Size([1, 16, 1, 512])

    """
    require_tensors(query_latent=query_latent)
    if mask is not None:
        require_tensors(mask=mask)
    if query_rope is None:
        (query_latent,) = autocast(query_latent)
    else:
        require_tensors(query_rope=query_rope)
        query_latent, query_rope = autocast(query_latent, query_rope)
    _check(query_latent, query_rope, latent, rope, mask)
    scale = float(scale)
    if not -math.inf < scale < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"scale: must be finite, got {scale}")
    if mask is not None:
        mask = mask.expand(*query_latent.shape[:3], shape_of(latent)[1])

    backend = choose_backend(query_latent)
    if backend == "reference":  # plain torch, with torch's own autograd
        return reference.latent_attention(query_latent, query_rope, latent, rope, scale=scale, causal=causal, mask=mask)
    if backend == "triton" and query_latent.dtype == torch.float64:
        raise TypeError(
            "query_latent: float64 is not supported by the triton backend; use_backend('reference') takes it"
        )
    return _attend(query_latent, query_rope, *_flat(latent), *_flat(rope), mask, causal, scale, backend)


@torch.library.custom_op("tenfold::latent_attention", mutates_args=())
def _attend(
    query_latent: Tensor,
    query_rope: Tensor | None,
    latent: Tensor,
    latent_scales: Tensor | None,
    latent_bits: int,
    latent_group: int,
    latent_code: str,
    rope: Tensor | None,
    rope_scales: Tensor | None,
    rope_bits: int,
    rope_group: int,
    rope_code: str,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    """Codes and scales side by side, for an op's arguments are tensors and numbers; 0 bits: a plain tensor."""
    latents = _packed(latent, latent_scales, query_latent.shape[-1], latent_bits, latent_group, latent_code)
    keys = None
    if query_rope is not None:
        keys = _packed(rope, rope_scales, query_rope.shape[-1], rope_bits, rope_group, rope_code)
    if backend == "cpu":
        return cpu.forward(query_latent, query_rope, latents, keys, mask, causal, scale)
    from . import triton

    return triton.forward(query_latent, query_rope, latents, keys, mask, causal, scale)


@_attend.register_fake
def _(query_latent, *others):
    return torch.empty(query_latent.shape, dtype=query_latent.dtype, device=query_latent.device)


def _refuse(ctx, grad):
    raise RuntimeError(
        "latent_attention has no gradient; train with expanded keys and values, or with plain latents inside "
        "use_backend('reference')"
    )


_attend.register_autograd(_refuse)


def _flat(x: Latents | None) -> tuple[Tensor | None, Tensor | None, int, int, str]:
    if isinstance(x, PackedLatents):
        return x.codes, x.scales, x.bits, x.group_size, x.code
    return x, None, 0, 0, ""


def _packed(x: Tensor, scales: Tensor | None, width: int, bits: int, group_size: int, code: str) -> Latents:
    return x if bits == 0 else PackedLatents(x, scales, width, bits, group_size, code)


def _check(
    query_latent: Tensor, query_rope: Tensor | None, latent: Latents, rope: Latents | None, mask: Tensor | None
) -> None:
    if (query_rope is None) != (rope is None):
        given, missing = ("rope", "query_rope") if query_rope is None else ("query_rope", "rope")
        raise ValueError(f"{missing}: is None, but {given} is not")
    queries = [("query_latent", query_latent)] + ([] if query_rope is None else [("query_rope", query_rope)])
    for name, x in queries:
        if x.dim() != 4:
            raise ValueError(f"{name}: expected (batch, heads, time, dim), got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: dtype {x.dtype} is not supported; accepted: {', '.join(map(str, _DTYPES))}")
        if x.dtype != query_latent.dtype:
            raise TypeError(f"{name}: dtype {x.dtype} differs from query_latent's {query_latent.dtype}")
        if x.device != query_latent.device:
            raise ValueError(f"{name}: is on {x.device}, query_latent on {query_latent.device}")
        if x.shape[:3] != query_latent.shape[:3]:
            expected = ", ".join(map(str, query_latent.shape[:3]))
            raise ValueError(f"{name}: expected ({expected}, dim) as query_latent, got shape {tuple(x.shape)}")
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: the last dimension is 0")
    B, H, Tq, _ = query_latent.shape
    Tk = shape_of(latent)[1] if len(shape_of(latent)) == 3 else -1
    for name, x, query in (("latent", latent, query_latent), ("rope", rope, query_rope)):
        if x is None:
            continue
        if isinstance(x, PackedLatents):
            check_packed(name, x)
        elif x.dtype not in _DTYPES:
            raise TypeError(f"{name}: dtype {x.dtype} is not supported; accepted: {', '.join(map(str, _DTYPES))}")
        D, time = query.shape[-1], "time" if name == "latent" else Tk
        shape = shape_of(x)
        if len(shape) != 3 or shape[0] != B or shape[2] != D or (name == "rope" and shape[1] != Tk):
            raise ValueError(f"{name}: expected ({B}, {time}, {D}) to go with its query, got shape {shape}")
        device = (x.codes if isinstance(x, PackedLatents) else x).device
        if device != query_latent.device:
            raise ValueError(f"{name}: is on {device}, query_latent on {query_latent.device}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, True = attend, got {mask.dtype}")
    if mask.device != query_latent.device:
        raise ValueError(f"mask: is on {mask.device}, query_latent on {query_latent.device}")
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], (Tk, Tq, H, B), strict=False)):
        raise ValueError(f"mask: shape {tuple(mask.shape)} does not broadcast to {(B, H, Tq, Tk)}")
