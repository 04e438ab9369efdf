"""What is cached of one vector, and in how many bits: the one place that training, cache and budget all ask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.kernels import PackedLatents, fake_pack_latents, pack_latents, unpack_latents
from tenfold.kernels.latent.packing import Code

Stored = Tensor | PackedLatents
BITS = (4, 8, 16)
SCALE_BYTES = 2  # float16


@dataclass(frozen=True)
class Format:
    """How a layer keeps `heads` vectors of `width` numbers per token.

    Args:
        heads: vectors per token; a latent or a shared rotary key is one.
        width: numbers of a vector.
        bits: 4 or 8 (`tenfold.kernels.pack_latents`); 16: as they come, in the model's dtype.
        group_size: numbers that share a scale; None is one scale per vector.
        normalize: the ε of an RMSNorm without weight that is applied to what was rounded, rather than before it;
            None: no norm here. It costs nothing to store: the scales take it up.
        code: of 4 or 8 bits: `symmetric` or `asymmetric` integers, or `float`: E2M1 and E4M3.
        scales: whether float16 scales are stored; if not, the vectors come divided by steps.
    """

    heads: int
    width: int
    bits: int = 16
    group_size: int | None = 128
    normalize: float | None = None
    code: Code = "symmetric"
    scales: bool = True

    def pack(self, x: Tensor) -> Stored:
        """What the cache keeps of `x`, `(…, width)`."""
        if self.bits == 16:
            return x if self.normalize is None else x * _inverse_rms(x, self.normalize)
        packed = pack_latents(x, **self._options)
        if self.normalize is None:
            return packed
        scales = packed.scales * _inverse_rms(unpack_latents(packed), self.normalize)  # and of offsets
        return packed._replace(scales=scales.to(packed.scales.dtype))

    def round(self, x: Tensor) -> Tensor:
        """The values that a reader of `pack(x)` sees, in x's dtype, with the straight-through gradient."""
        if self.bits == 16:
            return self.pack(x)
        y = fake_pack_latents(x, **self._options)
        if self.normalize is None:
            return y
        y = y * _inverse_rms(y, self.normalize)
        return y - y.detach() + unpack_latents(self.pack(x.detach()), dtype=x.dtype)  # the first two are 0

    def bytes(self, element_size: int = 2) -> int:
        """Per token, scales included; `element_size` is that of the model's dtype, for 16 bits."""
        if self.bits == 16:
            return self.heads * self.width * element_size
        scales = -(-self.width // self.group) * (2 if self.code == "asymmetric" else 1) if self.scales else 0
        return self.heads * (-(-self.width * self.bits // 8) + scales * SCALE_BYTES)

    def stored(self, tensors: tuple[Tensor, ...]) -> Stored:
        """What `pack` made, from its `tensors` as `parts` gives them, or from views or copies of them."""
        if self.bits == 16:
            return tensors[0]
        codes, scales = tensors if self.scales else (*tensors, None)
        return PackedLatents(codes, scales, self.width, self.bits, self.group, self.code)

    @property
    def names(self) -> tuple[str, ...]:
        """Of `parts`: they tell the code and the numbers that share a scale, which codes and scales do not."""
        if self.bits == 16:
            return ("numbers",)
        codes, scales = f"{self.code}_{self.bits}", f"scales_{min(self.group, self.width)}"
        return (codes, scales) if self.scales else (codes,)

    @property
    def group(self) -> int:
        """Numbers that share a scale, as `pack_latents` takes them."""
        return self.group_size or self.width + self.width % 2

    @property
    def _options(self) -> dict[str, object]:
        scale_dtype = torch.float16 if self.scales else None
        return {"bits": self.bits, "group_size": self.group, "code": self.code, "scale_dtype": scale_dtype}


def parts(x: Stored) -> tuple[Tensor, ...]:
    """The tensors of what was stored."""
    return x.tensors if isinstance(x, PackedLatents) else (x,)


def dense(x: Stored, dtype: torch.dtype) -> Tensor:
    """What was stored, unpacked."""
    return unpack_latents(x, dtype=dtype) if isinstance(x, PackedLatents) else x.to(dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps).to(x.dtype)
