"""What is cached of one vector, and in how many bits: the one place that training, cache and budget all ask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.kernels import PackedLatents, fake_pack_latents, pack_latents, unpack_latents

Stored = Tensor | PackedLatents
BITS = (4, 8, 16)
SCALE_BYTES = 2  # float16


@dataclass(frozen=True)
class Format:
    """How a layer keeps `heads` vectors of `width` numbers per token.

    Args:
        heads: vectors per token; a latent or a shared rotary key is one.
        width: numbers of a vector.
        bits: 4 or 8: symmetric integers with float16 scales (`tenfold.kernels.pack_latents`); 16: as they come,
            in the model's dtype.
        group_size: numbers that share a scale; None is one scale per vector.
        normalize: the ε of an RMSNorm without weight that is applied to what was rounded, rather than before it;
            None: no norm here. It costs nothing to store: the scales take it up.
    """

    heads: int
    width: int
    bits: int = 16
    group_size: int | None = 128
    normalize: float | None = None

    def pack(self, x: Tensor) -> Stored:
        """What the cache keeps of `x`, `(…, width)`."""
        if self.bits == 16:
            return x if self.normalize is None else x * _inverse_rms(x, self.normalize)
        packed = pack_latents(x, bits=self.bits, group_size=self.group)
        if self.normalize is None:
            return packed
        scales = packed.scales * _inverse_rms(unpack_latents(packed), self.normalize)
        return packed._replace(scales=scales.to(packed.scales.dtype))

    def round(self, x: Tensor) -> Tensor:
        """The values that a reader of `pack(x)` sees, in x's dtype, with the straight-through gradient."""
        if self.bits == 16:
            return self.pack(x)
        if self.normalize is None:
            return fake_pack_latents(x, bits=self.bits, group_size=self.group)
        y = fake_pack_latents(x, bits=self.bits, group_size=self.group)
        y = y * _inverse_rms(y, self.normalize)
        return y - y.detach() + unpack_latents(self.pack(x.detach()), dtype=x.dtype)  # the first two are 0

    def bytes(self, element_size: int = 2) -> int:
        """Per token, scales included; `element_size` is that of the model's dtype, for 16 bits."""
        if self.bits == 16:
            return self.heads * self.width * element_size
        return self.heads * (-(-self.width * self.bits // 8) + -(-self.width // self.group) * SCALE_BYTES)

    @property
    def group(self) -> int:
        """Numbers that share a scale, as `pack_latents` takes them."""
        return self.group_size or self.width + self.width % 2


def dense(x: Stored, dtype: torch.dtype) -> Tensor:
    """What was stored, unpacked."""
    return unpack_latents(x, dtype=dtype) if isinstance(x, PackedLatents) else x


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps).to(x.dtype)
