"""`QuantRecipe`: which operands of a linear layer's three matrix products are quantized, and how."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tenfold.core.errors import unknown
from tenfold.kernels import FloatFormat, fake_quantize

Operand = Literal["P1", "P2", "P3", "P4", "P5", "P6"]
Scale = Literal["tensor", "channel", "block"]
Rounding = Literal["even", "away", "stochastic"]
TARGETS: tuple[Operand, ...] = ("P2", "P4", "P6")  # those of the paper's law

# The axis that each operand is summed over, as it lies in memory: tokens × features, or out × in features.
_CONTRACTED: dict[str, int] = {"P1": 1, "P2": 1, "P3": 1, "P4": 0, "P5": 0, "P6": 0}


@dataclass(frozen=True, init=False)
class QuantRecipe:
    """How linear layers are trained (Eq. 8 of arXiv 2501.02423).

        forward   Y  = P1 · P2ᵀ     P1 = X, the input             P2 = W, the weight
        backward  dX = P3 · P4      P3 = dY, the output's gradient  P4 = W
                  dW = P5ᵀ · P6     P5 = dY                       P6 = X

    The paper's law is for P2, P4 and P6, which lose little. Quantizing P1, P3 or P5 costs more, P5 the most. Weights
    are kept, and updated, as they are; only what enters a product is quantized, and gradients pass straight through.

    Args:
        format: of every target, a `tenfold.kernels.FloatFormat` or its name ("e4m3"); or a mapping from operands to
            formats, `{"P2": "e2m1", "P4": "e4m3"}`, which then says the targets too.
        targets: the operands that are quantized; empty for none.
        scale: one exact scale per "tensor", per "channel" (a whole slice along the block axis: of weights an output
            channel, of inputs a token), or per "block"; None for no scale, where large values saturate.
        block_size: consecutive elements that share a scale; must divide a layer's features. Of tokens, the last block
            may be smaller.
        block_axis: blocks and channels run along the axis that the product sums over ("contraction"), so that every
            product has scales it can take out of the sum; or always along a tensor's last one ("last"), input
            or output features.
        rounding: ties to "even", or "away" from zero as in the paper's simulator; "stochastic".

    Raises:
        ValueError, TypeError: an unknown operand, scale, axis or rounding, a format that cannot exist, or a block size
            below 1.

    Example:
        >>> QuantRecipe("e2m1", block_size=32)
        QuantRecipe(P2=e2m1, P4=e2m1, P6=e2m1, scale=block, block_size=32, rounding=even)
    """

    formats: tuple[tuple[Operand, str], ...]
    scale: Scale | None
    block_size: int
    block_axis: Literal["contraction", "last"]
    rounding: Rounding

    def __init__(
        self,
        format: FloatFormat | str | Mapping[Operand, FloatFormat | str] = "e4m3",
        *,
        targets: tuple[Operand, ...] | None = None,
        scale: Scale | None = "block",
        block_size: int = 128,
        block_axis: Literal["contraction", "last"] = "contraction",
        rounding: Rounding = "even",
    ) -> None:
        if isinstance(format, Mapping):
            if targets is not None:
                raise ValueError("targets: a mapping of formats has the targets already; give one of the two")
            formats = dict(format)
        else:
            chosen = TARGETS if targets is None else targets
            if isinstance(chosen, str):
                raise TypeError(f"targets: expected several operands such as ('P2', 'P4'), got {chosen!r}")
            formats = dict.fromkeys(chosen, format)
        for operand in formats:
            _check("targets", operand, get_args(Operand))
        if scale is not None:
            _check("scale", scale, get_args(Scale))
        _check("block_axis", block_axis, ("contraction", "last"))
        _check("rounding", rounding, get_args(Rounding))
        if not isinstance(block_size, int) or block_size < 1:
            raise ValueError(f"block_size: must be a whole number of at least 1, got {block_size!r}")
        named = tuple((operand, str(FloatFormat.parse(formats[operand]))) for operand in sorted(formats))
        for field, value in (
            ("formats", named),
            ("scale", scale),
            ("block_size", block_size),
            ("block_axis", block_axis),
            ("rounding", rounding),
        ):
            object.__setattr__(self, field, value)

    @property
    def targets(self) -> tuple[Operand, ...]:
        """The operands that are quantized."""
        return tuple(operand for operand, _ in self.formats)

    def quantize(self, operand: Operand, tensor: Tensor) -> Tensor:
        """`tensor`, `(tokens, features)` or `(out, in)`, as `operand` enters its product."""
        for name, format in self.formats:
            if name == operand:
                return self._fake(tensor, format, self.axis(operand))
        return tensor

    def axis(self, operand: Operand) -> int:
        """Along which `operand`'s blocks lie: 0 or 1."""
        return _CONTRACTED[operand] if self.block_axis == "contraction" else 1

    def check_layer(self, name: str, in_features: int, out_features: int) -> None:
        """Refuse features that blocks do not divide.

        Raises:
            ValueError: naming the layer.
        """
        if self.scale != "block":
            return
        for operand in self.targets:
            axis = self.axis(operand)
            weight = operand in ("P2", "P4")
            if axis == 0 and not weight:
                continue  # tokens: as many as there are
            features = out_features if (axis == 0 if weight else operand in ("P3", "P5")) else in_features
            if features % self.block_size:
                raise ValueError(f"block_size: {self.block_size} does not divide the {features} features of {name}")

    def _fake(self, tensor: Tensor, format: str, axis: int) -> Tensor:
        if self.scale != "block":
            scale = "axis" if self.scale == "channel" else self.scale
            return fake_quantize(tensor, format, scale=scale, axis=axis, rounding=self.rounding)
        size = tensor.shape[axis]
        # Zeros change no block's largest magnitude: the last block of tokens is as if it were smaller.
        missing = -size % self.block_size
        if missing:
            tensor = torch.nn.functional.pad(tensor, (0, missing) if axis else (0, 0, 0, missing))
        quantized = fake_quantize(
            tensor, format, scale="block", block_size=self.block_size, axis=axis, rounding=self.rounding
        )
        return quantized.narrow(axis, 0, size) if missing else quantized

    def __repr__(self) -> str:
        return f"QuantRecipe({self.describe()})"

    def describe(self) -> str:
        """`P2=e4m3, P4=e4m3, P6=e4m3, scale=block, block_size=128, rounding=even`."""
        parts = [f"{operand}={format}" for operand, format in self.formats]
        parts += [f"scale={self.scale}"]
        parts += [f"block_size={self.block_size}"] if self.scale == "block" else []
        parts += [f"block_axis={self.block_axis}"] if self.block_axis != "contraction" else []
        return ", ".join([*parts, f"rounding={self.rounding}"]) if self.formats else "nothing quantized"


def _check(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: {unknown('value', str(value), accepted)}")
