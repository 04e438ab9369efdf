"""Learning-rate schedules, stepped after each update: `"interval": "step"` in Lightning.

They need torch alone; transformers has the like under other names, which start at a learning rate of 0.
"""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, total_steps: int, min_ratio: float = 0.1) -> LambdaLR:
    """Linear warm-up, then half a cosine down to a floor, where it stays.

    The learning rate of update k = 0, 1, ..., relative to the optimizer's:

        (k + 1) / (W + 1)                                           k < W
        m + (1 - m) · (1 + cos(π · min(1, (k - W) / (T - W)))) / 2  k ≥ W

    Args:
        optimizer: whose learning rates are scaled.
        warmup_steps: W.
        total_steps: T.
        min_ratio: m, the floor.

    Raises:
        ValueError: negative steps, or a floor that is not in [0, 1].
    """
    _check(min_ratio, warmup_steps=warmup_steps, total_steps=total_steps)

    def ratio(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, ratio)


def warmup_stable_decay(
    optimizer: Optimizer, *, warmup_steps: int, decay_steps: int, total_steps: int, min_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up, a plateau, and a linear decay over the last steps (WSD, arXiv 2404.06395).

    The learning rate of update k = 0, 1, ..., relative to the optimizer's:

        (k + 1) / (W + 1)                          k < W
        1                                          W ≤ k < T - D
        m + (1 - m) · max(0, (T - k) / D)          k ≥ T - D

    Args:
        optimizer: whose learning rates are scaled.
        warmup_steps: W.
        decay_steps: D.
        total_steps: T.
        min_ratio: m, the floor.

    Raises:
        ValueError: negative steps, or a floor that is not in [0, 1].
    """
    _check(min_ratio, warmup_steps=warmup_steps, decay_steps=decay_steps, total_steps=total_steps)

    def ratio(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        left = min(1.0, max(0, total_steps - step) / max(1, decay_steps))
        return min_ratio + (1 - min_ratio) * left

    return LambdaLR(optimizer, ratio)


def _check(min_ratio: float, **steps: int) -> None:
    for name, value in steps.items():
        if value < 0:
            raise ValueError(f"{name}: must not be negative, got {value}")
    if not 0 <= min_ratio <= 1:
        raise ValueError(f"min_ratio: must be from 0 to 1, got {min_ratio}")
