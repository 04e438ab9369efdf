"""The scaling law of floating-point quantized training (arXiv 2501.02423), and what follows from it."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .fitting import Law, _needs
from .table import CHANNEL, RunTable

COST = 6 / 16  # k: operations per bit, parameter and token, so that 16 bits cost the usual 6·N·D
CHANNEL_LOG2_BLOCK = 13.1567  # the effective block of one scale per channel, fitted in the paper
BlockSize = ArrayLike | Literal["channel"]


class Split(NamedTuple):
    """How best to divide bits between exponent and mantissa, beside the one of the sign."""

    exponent_bits: int
    mantissa_bits: int
    exponent_exact: float  # Eq. 19: the optimum among real numbers
    mantissa_exact: float

    @property
    def name(self) -> str:
        """`e4m3`."""
        return f"e{self.exponent_bits}m{self.mantissa_bits}"


class Allocation(NamedTuple):
    """The best use of a budget of compute."""

    params: float
    tokens: float
    bits: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class ScalingLaw(Law):
    """The loss in nats of training with quantized linear layers, operands P2, P4 and P6 (Eq. 1, 18 and 26).

        L(N, D, E, M, B) = n/N^α + d/D^β + ε + (D^β/N^α) · log₂B / (γ (E + ½)^δ (M + ½)^ν)

    N parameters beside the embeddings, D tokens, a format of E exponent and M mantissa bits, one exact scale per B
    elements. The first three terms are Chinchilla's; the last, the penalty of quantization, grows with the data.

    The paper fitted models of 41 M to 679 M parameters, 10 to 105 B tokens and one learning rate. All beyond is
    extrapolation. It gives an E0Mm format a penalty about 20 times that of E1M(m-1), although both are the same
    uniform grid: a limit of the form at E = 0.

    Example:
        >>> law = ScalingLaw.paper()
        >>> law.best_split(8).name
        'e4m3'
        >>> f"{law.critical_tokens(params=1e9, exponent_bits=4, mantissa_bits=3, block_size=128):.3g}"
        '2.73e+13'
    """

    n: float
    alpha: float
    d: float
    beta: float
    epsilon: float
    gamma: float
    delta: float
    nu: float
    log2_channel: float = CHANNEL_LOG2_BLOCK
    grid: ClassVar = {
        "alpha": (0.1, 0.2, 0.35, 0.5, 0.8),
        "beta": (0.1, 0.2, 0.35, 0.5, 0.8),
        "delta": (1.0, 2.0, 3.5),
        "nu": (1.0, 2.0, 3.5),
    }
    terms: ClassVar = ("n", "d", "epsilon", "per_gamma")

    @classmethod
    def paper(cls) -> "ScalingLaw":
        """With the constants of the paper's table 2."""
        return cls(
            n=69.2343,
            alpha=0.2368,
            d=68973.0621,
            beta=0.5162,
            epsilon=1.9061,
            gamma=11334.5197,
            delta=3.1926,
            nu=2.9543,
        )

    def loss(
        self,
        *,
        params: ArrayLike,
        tokens: ArrayLike,
        exponent_bits: ArrayLike,
        mantissa_bits: ArrayLike,
        block_size: BlockSize = 128,
    ) -> float | np.ndarray:
        """L (Eq. 1); of arrays, an array."""
        penalty = self.penalty(
            params=params,
            tokens=tokens,
            exponent_bits=exponent_bits,
            mantissa_bits=mantissa_bits,
            block_size=block_size,
        )
        return self.base_loss(params=params, tokens=tokens) + penalty

    def base_loss(self, *, params: ArrayLike, tokens: ArrayLike) -> float | np.ndarray:
        """The loss without quantization: n/N^α + d/D^β + ε."""
        N, D = _positive(params=params), _positive(tokens=tokens)
        return _plain(self.n / N**self.alpha + self.d / D**self.beta + self.epsilon)

    def penalty(
        self,
        *,
        params: ArrayLike,
        tokens: ArrayLike,
        exponent_bits: ArrayLike,
        mantissa_bits: ArrayLike,
        block_size: BlockSize = 128,
    ) -> float | np.ndarray:
        """What quantization adds: (D^β/N^α) · log₂B / (γ (E + ½)^δ (M + ½)^ν)."""
        N, D = _positive(params=params), _positive(tokens=tokens)
        intensity = D**self.beta / N**self.alpha
        return _plain(intensity * self._log2_block(block_size) / self._capacity(exponent_bits, mantissa_bits))

    def critical_tokens(
        self,
        *,
        params: ArrayLike,
        exponent_bits: ArrayLike,
        mantissa_bits: ArrayLike,
        block_size: BlockSize = 128,
    ) -> float | np.ndarray:
        """The D beyond which more data raises the loss (Eq. 21 and 41); infinite at B = 1.

        D_crit = [d γ N^α (E + ½)^δ (M + ½)^ν / log₂B]^(1/2β)
        """
        N = _positive(params=params)
        with np.errstate(divide="ignore"):
            ratio = self.d * N**self.alpha * self._capacity(exponent_bits, mantissa_bits) / self._log2_block(block_size)
        return _plain(ratio ** (1 / (2 * self.beta)))

    def best_split(self, bits: int) -> Split:
        """The exponent and mantissa bits with the lowest loss at a width of `bits`, sign included.

        By search over all splits; the closed form E* = δP/(δ+ν) - ½, M* = νP/(δ+ν) - ½ (Eq. 19) is given beside it.
        """
        if bits != int(bits) or bits < 1:
            raise ValueError(f"bits: must be a whole number of at least 1, got {bits!r}")
        bits = int(bits)
        E = max(range(bits), key=lambda e: self._capacity(e, bits - 1 - e).item())
        share = bits / (self.delta + self.nu)
        return Split(E, bits - 1 - E, self.delta * share - 0.5, self.nu * share - 0.5)

    def best_bits(
        self,
        *,
        compute: float | None = None,
        tokens: float | None = None,
        params: float | None = None,
        block_size: float | Literal["channel"] = 128,
    ) -> float:
        """The width, sign included, with the lowest loss for its cost, C = (6/16)·bits·N·D operations.

        * `tokens`: D is fixed, and fewer bits buy a larger model (Eq. 22); the compute does not matter.
        * `params` and `compute`: N is fixed, and fewer bits buy more data (Eq. 23).
        * `compute`: N, D and bits are all free (Eq. 25); `allocate` gives all three.

        The widths are real numbers, split between exponent and mantissa at the optimum of Eq. 19.
        """
        given = {name for name, value in (("compute", compute), ("tokens", tokens), ("params", params)) if value}
        if given == {"compute"}:
            return self.allocate(compute, block_size=block_size).bits
        s, log2_block = self.delta + self.nu, float(self._log2_block(block_size))
        if log2_block == 0:
            raise ValueError("block_size: at 1 the law has no penalty, and the fewest bits are always the best")
        if "tokens" in given and "params" not in given:
            D = float(_positive(tokens=tokens))
            return (self._gamma_d() * D**self.beta * log2_block) ** (1 / s)
        if given == {"params", "compute"}:
            N, C = float(_positive(params=params)), float(_positive(compute=compute))
            gamma_n = (self.beta + s) / (self.d * self.beta * self._gamma_rho())
            power = gamma_n * (C / COST) ** (2 * self.beta) * N ** -(self.alpha + 2 * self.beta) * log2_block
            return power ** (1 / (s + 2 * self.beta))
        raise ValueError(f"best_bits: give compute, or tokens, or params and compute; got {sorted(given) or 'nothing'}")

    def allocate(self, compute: float, *, block_size: float | Literal["channel"] = 128) -> Allocation:
        """Parameters, tokens and bits with the lowest loss for C = (6/16)·bits·N·D operations (Eq. 25 and 54)."""
        C, log2_block = float(_positive(compute=compute)), float(self._log2_block(block_size))
        if log2_block == 0:
            raise ValueError("block_size: at 1 the law has no penalty, and the fewest bits are always the best")
        s = self.delta + self.nu
        # At the optimum P^s = γ_D D^β log₂B and N^α = q D^β, which leaves one equation in D: P·N·D = C/k.
        q = (s + self.beta) * self.alpha * self.n / (self.beta * self.d * (s - self.alpha))
        p = self._gamma_d() * log2_block
        log_D = (math.log(C / COST) - math.log(p) / s - math.log(q) / self.alpha) / (
            self.beta / s + self.beta / self.alpha + 1
        )
        D = math.exp(log_D)
        N, P = (q * D**self.beta) ** (1 / self.alpha), (p * D**self.beta) ** (1 / s)
        loss = self.base_loss(params=N, tokens=D) + D**self.beta / N**self.alpha * log2_block / (
            self._gamma_rho() * P**s
        )
        return Allocation(N, D, P, float(loss))

    def predict(self, table: RunTable) -> np.ndarray:
        """The loss of every run in nats."""
        features = self.features(
            table,
            alpha=self.alpha,
            beta=self.beta,
            delta=self.delta,
            nu=self.nu,
            log2_channel=self.log2_channel,
        )
        return features @ np.array([self.n, self.d, self.epsilon, 1 / self.gamma])

    @classmethod
    def features(
        cls,
        table: RunTable,
        *,
        alpha: float,
        beta: float,
        delta: float,
        nu: float,
        log2_channel: float = CHANNEL_LOG2_BLOCK,
    ) -> np.ndarray:
        """N^-α, D^-β, 1, and the penalty without 1/γ."""
        N, D, E, M = table.params, table.tokens, table.exponent_bits, table.mantissa_bits
        log2_block = np.nan_to_num(np.log2(table.block_size), nan=log2_channel)
        penalty = D**beta / N**alpha * log2_block / ((E + 0.5) ** delta * (M + 0.5) ** nu)
        return np.stack([N**-alpha, D**-beta, np.ones(len(table)), penalty], axis=1)

    @classmethod
    def from_fit(cls, exponents: dict[str, float], coefficients: dict[str, float]) -> "ScalingLaw":
        """γ stands in the denominator."""
        rest = {name: value for name, value in coefficients.items() if name != "per_gamma"}
        return cls(**exponents, **rest, gamma=1 / coefficients["per_gamma"])

    @classmethod
    def free(cls, table: RunTable) -> dict[str, tuple[float, ...]]:
        """Different exponent and mantissa widths too; the channel's effective block where blocks tell the scale."""
        grid = super().free(table)
        quantized = table.rows(table.quantized)
        for column in ("exponent_bits", "mantissa_bits"):
            _needs(quantized, column, 2)
        channel = np.isnan(quantized.block_size)
        return {**grid, "log2_channel": (8.0, 13.0)} if channel.any() and not channel.all() else grid

    def _capacity(self, exponent_bits: ArrayLike, mantissa_bits: ArrayLike) -> np.ndarray:
        """γ (E + ½)^δ (M + ½)^ν."""
        E, M = _at_least(0, exponent_bits=exponent_bits), _at_least(0, mantissa_bits=mantissa_bits)
        return self.gamma * (E + 0.5) ** self.delta * (M + 0.5) ** self.nu

    def _log2_block(self, block_size: BlockSize) -> np.ndarray:
        if isinstance(block_size, str):
            if block_size != CHANNEL:
                raise ValueError(f"block_size: expected a number of at least 1 or {CHANNEL!r}, got {block_size!r}")
            return np.float64(self.log2_channel)
        return np.log2(_at_least(1, block_size=block_size))

    def _gamma_rho(self) -> float:
        """γ δ^δ ν^ν / (δ+ν)^(δ+ν): the capacity at the best split is γ_ρ P^(δ+ν) (Eq. 20 and 34)."""
        d, v = self.delta, self.nu
        return self.gamma * d**d * v**v / (d + v) ** (d + v)

    def _gamma_d(self) -> float:
        """(δ+ν-α) / (n α γ_ρ) (Eq. 47)."""
        return (self.delta + self.nu - self.alpha) / (self.n * self.alpha * self._gamma_rho())


def _positive(**named: ArrayLike) -> np.ndarray:
    [(name, value)] = named.items()
    array = _array(name, value)
    if (array <= 0).any():
        raise ValueError(f"{name}: must be positive, got {value!r}")
    return array


def _at_least(least: float, **named: ArrayLike) -> np.ndarray:
    [(name, value)] = named.items()
    array = _array(name, value)
    if (array < least).any():
        raise ValueError(f"{name}: must be at least {least}, got {value!r}")
    return array


def _array(name: str, value: ArrayLike) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number or numbers, got {value!r}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: must be finite, got {value!r}")
    return array


def _plain(x: np.ndarray) -> float | np.ndarray:
    return float(x) if np.ndim(x) == 0 else x
