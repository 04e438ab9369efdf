"""The laws that the paper compares with, fitted as carefully as its own."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .fitting import Law
from .table import RunTable

EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.8)


@dataclass(frozen=True, kw_only=True)
class ChinchillaLaw(Law):
    """L = n/N^α + d/D^β + ε (Hoffmann et al., arXiv 2203.15556; Eq. 2 of the paper): precision is not in it."""

    n: float
    alpha: float
    d: float
    beta: float
    epsilon: float
    grid: ClassVar = {"alpha": EXPONENTS, "beta": EXPONENTS}
    terms: ClassVar = ("n", "d", "epsilon")

    @classmethod
    def features(cls, table: RunTable, *, alpha: float, beta: float) -> np.ndarray:
        """N^-α, D^-β, 1."""
        return np.stack([table.params**-alpha, table.tokens**-beta, np.ones(len(table))], axis=1)

    def predict(self, table: RunTable) -> np.ndarray:
        """The loss of every run in nats."""
        return self.n * table.params**-self.alpha + self.d * table.tokens**-self.beta + self.epsilon


@dataclass(frozen=True, kw_only=True)
class PrecisionLaw(Law):
    """Chinchilla with N_eff = N·(1 - e^(-P/γ)), P = E + M + 1 (Kumar et al., arXiv 2411.04330; Eq. 4-6).

    One number, the width in bits, stands for the format; the size of the scale's block is not in it.
    """

    n: float
    alpha: float
    d: float
    beta: float
    epsilon: float
    gamma: float
    grid: ClassVar = {"alpha": EXPONENTS, "beta": EXPONENTS, "gamma": (0.3, 0.5, 0.8, 1.3, 2.0, 3.2)}
    terms: ClassVar = ("n", "d", "epsilon")

    @classmethod
    def free(cls, table: RunTable) -> dict[str, tuple[float, ...]]:
        """Different widths too."""
        if len(np.unique(_bits(table))) < 2:
            raise ValueError("table: exponent_bits + mantissa_bits: at least 2 different widths are needed")
        return super().free(table)

    @classmethod
    def features(cls, table: RunTable, *, alpha: float, beta: float, gamma: float) -> np.ndarray:
        """N_eff^-α, D^-β, 1."""
        effective = table.params * -np.expm1(-_bits(table) / max(gamma, 1e-3))
        return np.stack([effective**-alpha, table.tokens**-beta, np.ones(len(table))], axis=1)

    def predict(self, table: RunTable) -> np.ndarray:
        """The loss of every run in nats."""
        features = self.features(table, alpha=self.alpha, beta=self.beta, gamma=self.gamma)
        return features @ np.array([self.n, self.d, self.epsilon])


def _bits(table: RunTable) -> np.ndarray:
    return table.exponent_bits + table.mantissa_bits + 1
