"""`CogAttention`: multi-head attention with negative weights as an `nn.Module` that needs torch alone."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tenfold.kernels import cog_attention


@dataclass
class KVCache:
    """Keys and values of one attention layer, for decoding; `CogAttention.forward` appends to it.

    `keys` and `values` are `(batch, kv_heads, time, head_dim)`, or None while empty.
    """

    keys: Tensor | None = None
    values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions and return all of them."""
        if self.keys is not None:
            if keys.shape[0] != self.keys.shape[0]:
                raise ValueError(f"cache: holds a batch of {self.keys.shape[0]}, the input has {keys.shape[0]}")
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


class CogAttention(nn.Module):
    """Multi-head self-attention whose weights are `sign(s) · softmax(|s|)` (Eq. 3 of arXiv 2411.07176).

    A drop-in for a softmax attention layer: same parameters, same shapes. The first position attends only itself,
    with weight ±1, so unlike softmax it may output the *negative* of its value.

    Args:
        dim: width of input and output.
        heads: query heads.
        kv_heads: key and value heads, dividing `heads` (grouped-query attention); `heads` by default.
        head_dim: `dim // heads` by default.
        causal: position i attends positions ≤ i.
        rotary: base θ of the rotary position embedding (the paper's language models: 10 000), or None for none.
        bias: whether the four projections have one (the paper's: no).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        rotary: float | None = None,
        bias: bool = False,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: {kv_heads} does not divide heads, {heads}")
        if head_dim is None and dim % heads:
            raise ValueError(f"heads: {heads} does not divide dim, {dim}; give head_dim")
        self.head_dim = dim // heads if head_dim is None else head_dim
        if rotary is not None and self.head_dim % 2:
            raise ValueError(f"rotary: needs an even head_dim, got {self.head_dim}")
        self.heads, self.kv_heads, self.causal, self.rotary = heads, kv_heads, causal, rotary
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        *,
        mask: Bool[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """Attend within `x`, and to what `cache` holds of earlier positions.

        Args:
            x: the layer's input.
            mask: bool, broadcastable to `(batch, heads, time, cached + time)`, True = attend, beside `causal`.
            cache: earlier positions; `x`'s are appended to it, and its rotary positions go on from there.
        """
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotary is not None:
            first = 0 if cache is None else len(cache)
            positions = torch.arange(first, first + x.shape[1], device=x.device)
            q, k = rotate(q, positions, self.rotary), rotate(k, positions, self.rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        out = cog_attention(q, k, v, causal=self.causal, mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """Heads and switches, for `print(model)`."""
        return f"heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}, rotary={self.rotary}"


def rotate(
    x: Float[Tensor, "batch heads time dim"], positions: Tensor, base: float
) -> Float[Tensor, "batch heads time dim"]:
    """Rotary position embedding on adjacent pairs: (x_2i, x_2i+1) turned by the angle position · base^(−2i/dim)."""
    dim = x.shape[-1]
    frequencies = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angles = positions.float()[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
