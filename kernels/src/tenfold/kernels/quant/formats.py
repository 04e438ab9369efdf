"""Small floating-point formats: any split into exponent and mantissa bits, with or without codes for inf and NaN."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Specials = Literal["none", "nan", "ieee"]

MAX_EXPONENT_BITS, MAX_MANTISSA_BITS, MAX_BITS = 8, 10, 16
FLOAT32_TOP = 127  # exponent of float32's largest binade

# The names of other projects: OCP's 8-bit formats, ml_dtypes and torch, IEEE 754.
_ALIASES = {
    "e4m3ocp": "e4m3fn",
    "e5m2ocp": "e5m2ieee",
    "e3m2fn": "e3m2",  # OCP's formats of 4 and 6 bits have no NaN to begin with
    "e2m3fn": "e2m3",
    "e2m1fn": "e2m1",
    "float8_e4m3fn": "e4m3fn",
    "float8_e5m2": "e5m2ieee",
    "float6_e3m2fn": "e3m2",
    "float6_e2m3fn": "e2m3",
    "float4_e2m1fn": "e2m1",
    "float16": "e5m10ieee",
    "bfloat16": "e8m7ieee",
}
_SUFFIXES: dict[str, Specials] = {"": "none", "nan": "nan", "ieee": "ieee"}


@dataclass(frozen=True)
class FloatFormat:
    """A sign, E exponent bits and M mantissa bits, with subnormals: `sign · 2^(e - bias) · (1 + m / 2^M)`.

    `specials` says which codes are not numbers:

    * `"none"`: every code is a number, as in arXiv 2501.02423 and OCP's formats of 4 and 6 bits. E4M3 tops out at
      480, E5M2 at 114688.
    * `"nan"`: the largest magnitude is NaN, as in OCP's E4M3 (`e4m3fn`), which tops out at 448.
    * `"ieee"`: the largest exponent holds infinity and NaN, as in IEEE 754 and OCP's E5M2 (57344).

    E = 0 is the uniform grid 0, 1, …, 2^M - 1 times `2^(1 - bias - M)`: sign-magnitude integers. Up to scale it is
    the grid of 1 exponent bit and M - 1 mantissa bits.

    Args:
        exponent_bits: 0 to 8.
        mantissa_bits: 0 to 10; with the exponent bits 1 to 15.
        specials: see above.
        bias: of the exponent; `2^(E-1) - 1` by default, and 0 for E = 0. With 8 exponent bits only 127. Another must
            keep every number, and a margin that rounding needs, inside float32's range.

    Raises:
        ValueError: there is no such format.
    """

    exponent_bits: int
    mantissa_bits: int
    specials: Specials = "none"
    bias: int | None = None

    def __post_init__(self) -> None:
        E, M = self.exponent_bits, self.mantissa_bits
        for name, bits, most in (("exponent_bits", E, MAX_EXPONENT_BITS), ("mantissa_bits", M, MAX_MANTISSA_BITS)):
            if not isinstance(bits, int) or isinstance(bits, bool) or not 0 <= bits <= most:
                raise ValueError(f"{name}: expected an integer from 0 to {most}, got {bits!r}")
        if not 1 <= E + M < MAX_BITS:
            raise ValueError(f"exponent_bits + mantissa_bits: expected 1 to {MAX_BITS - 1}, got {E} + {M}")
        if self.specials not in get_args(Specials):
            raise ValueError(f"specials: expected {', '.join(get_args(Specials))}, got {self.specials!r}")
        if self.specials == "ieee" and (E < 2 or M == 0):
            raise ValueError(f"specials: 'ieee' needs 2 exponent bits and 1 mantissa bit, got e{E}m{M}")
        if self.specials == "nan" and (E == 0 or E + M < 2):
            raise ValueError(f"specials: 'nan' needs 1 exponent bit and 2 bits in all, got e{E}m{M}")
        standard = 2 ** (E - 1) - 1 if E else 0
        if self.bias is None:
            object.__setattr__(self, "bias", standard)
        if not isinstance(self.bias, int) or isinstance(self.bias, bool):
            raise ValueError(f"bias: expected an integer, got {self.bias!r}")
        # Rounding adds 1.5 · 2^23 steps to a number, and steps must not be subnormal.
        low, high = (standard, standard) if E == 8 else (2**E - 1 - 104 - M, FLOAT32_TOP - M)
        if not low <= self.bias <= high:
            raise ValueError(f"bias: with e{E}m{M} expected {low} to {high}, got {self.bias}")

    @classmethod
    def parse(cls, format: "FloatFormat | str") -> "FloatFormat":
        """The format of a name; a format is returned as it is.

        `e<E>m<M>` has no special values; `e<E>m<M>nan` and `e<E>m<M>ieee` have; `b<bias>` at the end changes the
        bias (`e4m3nanb11`). OCP's own names are `e4m3fn`, `e5m2ocp`, `e3m2fn`, `e2m3fn`, `e2m1fn`; also known are
        `bfloat16`, `float16` and the names of ml_dtypes, such as `float8_e5m2`.

        Raises:
            ValueError: no such name or format.
            TypeError: neither a format nor a string.
        """
        if isinstance(format, FloatFormat):
            return format
        if not isinstance(format, str):
            raise TypeError(f"format: expected a FloatFormat or a name such as 'e4m3', got {type(format).__name__}")
        name = _ALIASES.get(format, format)
        if name == "e4m3fn":
            return cls(4, 3, "nan")
        match = re.fullmatch(r"e(\d{1,3})m(\d{1,3})(nan|ieee|)(?:b(-?\d{1,4}))?", name)
        if match is None:
            raise ValueError(
                f"format: cannot read {format!r}; accepted: e<E>m<M>, e<E>m<M>nan, e<E>m<M>ieee, {', '.join(_ALIASES)}"
            )
        exponent, mantissa, suffix, bias = match.groups()
        try:
            return cls(int(exponent), int(mantissa), _SUFFIXES[suffix], None if bias is None else int(bias))
        except ValueError as error:
            raise ValueError(f"format: there is no {format!r}: {error}") from None

    @property
    def name(self) -> str:
        """The name that `parse` reads back."""
        E, M = self.exponent_bits, self.mantissa_bits
        suffix = "" if self.specials == "none" else "fn" if self == FloatFormat(4, 3, "nan") else self.specials
        standard = FloatFormat(E, M, self.specials).bias
        return f"e{E}m{M}{suffix}" + ("" if self.bias == standard else f"b{self.bias}")

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Of a code, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """The power of two of the smallest normal numbers, which the subnormal ones share."""
        return 1 - self.bias

    @property
    def max_code(self) -> int:
        """The code of the largest number; numbers and their codes are in the same order."""
        reserved = {"none": 0, "nan": 1, "ieee": 2**self.mantissa_bits}[self.specials]
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1 - reserved

    @property
    def max(self) -> float:
        """The largest number."""
        return self._number(self.max_code)

    @property
    def smallest_normal(self) -> float | None:
        """The smallest number of full precision; None for E = 0, where there is none."""
        return self._number(2**self.mantissa_bits) if self.exponent_bits else None

    @property
    def smallest_subnormal(self) -> float | None:
        """The smallest number above 0, if it is subnormal; None for M = 0, where there is none."""
        return self._number(1) if self.mantissa_bits else None

    def values(self) -> Tensor:
        """The number of every code, float64, `(2^bits,)`; codes with the sign bit set are the second half."""
        magnitudes = [self._number(code) for code in range(self.max_code + 1)]
        if self.specials == "ieee":
            magnitudes.append(float("inf"))
        magnitudes += [float("nan")] * (2 ** (self.bits - 1) - len(magnitudes))
        values = torch.tensor(magnitudes, dtype=torch.float64)
        return torch.cat([values, -values])

    def _number(self, code: int) -> float:
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        if exponent == 0:
            return mantissa * 2.0 ** (self.min_exponent - self.mantissa_bits)
        return (2**self.mantissa_bits + mantissa) * 2.0 ** (exponent - self.bias - self.mantissa_bits)

    def largest_within(self, limit: float) -> float:
        """The largest number of the format that is at most `limit`."""
        if self.max <= limit:
            return self.max
        low, high = 0, self.max_code  # number(low) ≤ limit < number(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._number(middle) <= limit else (low, middle)
        return self._number(low)


Format = FloatFormat | str
