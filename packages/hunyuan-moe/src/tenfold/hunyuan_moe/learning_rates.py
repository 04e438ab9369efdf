"""Learning rates by expert, and over the course of training (arXiv 2411.02265, sections 2.2.4 and 2.3.2)."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

PAPERS_RATIO = 0.31  # of a specialized expert's rate to the shared one's, with 16 experts


def optimal_lr(batch: float, *, max_lr: float, noise_batch: float) -> float:
    """The best learning rate of an Adam-like optimizer for a batch of this size.

        ε(B) = 2 ε_max / (√(B_noise/B) + √(B/B_noise))

    (arXiv 2405.14578). It grows as √B in small batches, peaks at B_noise, and falls beyond.

    Args:
        batch: B, in tokens or sequences.
        max_lr: ε_max.
        noise_batch: B_noise, in the same unit; it grows as the loss falls. `noise_batch` estimates its like.
    """
    _positive(batch=batch, max_lr=max_lr, noise_batch=noise_batch)
    return 2 * max_lr / (math.sqrt(noise_batch / batch) + math.sqrt(batch / noise_batch))


def expert_lr_ratio(x: float, experts: int = 16) -> float:
    """The rate of a specialized expert, which sees 1/n of the batch, relative to that of the rest.

        r = ε(B/n) / ε(B) = √n · (1 + x) / (n + x),    x = B/B_noise

    It is 1/√n in small batches, 1 at x = √n, √n in large ones. The paper's 0.31 for n = 16 is x = 0.26; the paper
    writes the inverse of this ratio, but says that the experts' rate is scaled down.

    Args:
        x: the batch in units of the noise batch, of which `noise_batch` gives the order of magnitude.
        experts: n; with top-k routing, experts / k.
    """
    _positive(x=x, experts=experts)
    return math.sqrt(experts) * (1 + x) / (experts + x)


def batch_at_ratio(ratio: float, experts: int = 16) -> float:
    """The inverse of `expert_lr_ratio`: B/B_noise.

    Raises:
        ValueError: a ratio that no batch has, outside 1/√n to √n.
    """
    _positive(experts=experts)
    root = math.sqrt(experts)
    if not 1 / root < ratio < root:
        raise ValueError(f"ratio: must be between {1 / root:g} and {root:g} for {experts} experts, got {ratio}")
    return (ratio * experts - root) / (root - ratio)


def expert_parameter_groups(
    model: nn.Module, lr: float, *, ratio: float = PAPERS_RATIO, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, in which the specialized experts learn at `lr · ratio`.

    Specialized experts are modules whose class is called `…Experts…`, lists and dictionaries called `experts`, and
    modules with a 3-D `down_proj`: this package's `Experts` and those of transformers' MoE models, stacked in one
    tensor or not, with the adapters on them (PEFT). Routers, shared experts and everything else learn at `lr`.
    Vectors, biases and embeddings are not decayed.

    Args:
        model: of torch or transformers.
        lr: of everything but the specialized experts.
        ratio: from `expert_lr_ratio`.
        weight_decay: of matrices.

    Raises:
        ValueError: a rate or ratio that is not positive, or a model without such experts.

    Example:
        >>> torch.optim.AdamW(expert_parameter_groups(model, lr=3e-4), betas=(0.9, 0.95))
    """
    _positive(lr=lr, ratio=ratio)
    holders = _expert_modules(model)
    if not holders:
        raise ValueError(f"model: {type(model).__name__} has no specialized experts")
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            expert = name.startswith(holders) and not {"router", "gate"} & set(name.split("."))
            decays = p.ndim > 1 and id(p) not in embedded and not (expert and name.endswith("bias"))
            trained.setdefault((expert, decays), []).append(p)

    def group(expert: bool, decays: bool) -> dict[str, Any]:
        return {
            "params": trained.get((expert, decays), []),
            "lr": lr * ratio if expert else lr,
            "weight_decay": weight_decay if decays else 0.0,
        }

    groups = [group(expert, decays) for expert in (False, True) for decays in (True, False)]
    return [g for g in groups if g["params"]]


def _expert_modules(model: nn.Module) -> tuple[str, ...]:
    """How the names of the specialized experts' parameters begin, those of adapters around them included."""
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        listed = last == "experts" and isinstance(module, nn.ModuleList | nn.ModuleDict)
        stacked = getattr(getattr(module, "down_proj", None), "ndim", 0) == 3
        if (
            listed or stacked or "Experts" in type(module).__name__
        ) and "shared" not in f"{name}{type(module)}".lower():
            while name.endswith(".base_layer"):  # PEFT wraps the module, its own parameters beside it
                name = name.removesuffix(".base_layer")
            found.append(f"{name}.")
    return tuple(found)


def three_phase(
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    anneal_share: float = 0.05,
    decay_ratio: float = 0.3,
    min_ratio: float = 0.1,
) -> LambdaLR:
    """Warm-up, a long gradual decay, and an annealing over the last steps.

    The learning rate of update k = 0, 1, ..., relative to the optimizer's, with A = (1 - anneal_share)·T:

        (k + 1) / (W + 1)                                              k < W
        d + (1 - d) · (1 + cos(π · (k - W) / (A - W))) / 2         W ≤ k < A
        m + (d - m) · max(0, (T - k) / (T - A))                    A ≤ k

    The paper gives the 5 % and the tenth. The shape of the decay, and d, where it ends, are not published: a cosine
    and 0.3 are this package's choice.

    Args:
        optimizer: whose learning rates are scaled, each group's by the same factor.
        warmup_steps: W.
        total_steps: T.
        anneal_share: of all steps.
        decay_ratio: d.
        min_ratio: m.

    Raises:
        ValueError: shares that are not in order, or a warm-up that runs into the annealing.
    """
    if not 0 <= min_ratio <= decay_ratio <= 1:
        raise ValueError(f"decay_ratio: must be from min_ratio {min_ratio} to 1, got {decay_ratio}")
    if not 0 < anneal_share < 1:
        raise ValueError(f"anneal_share: must be between 0 and 1, got {anneal_share}")
    anneal = (1 - anneal_share) * total_steps
    if not 0 <= warmup_steps <= anneal:
        raise ValueError(f"warmup_steps: must be from 0 to {anneal:g}, where the annealing begins, got {warmup_steps}")

    def ratio(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if step < anneal:
            done = (step - warmup_steps) / (anneal - warmup_steps)
            return decay_ratio + (1 - decay_ratio) * (1 + math.cos(math.pi * done)) / 2
        left = max(0.0, (total_steps - step) / (total_steps - anneal)) if total_steps else 0.0
        return min_ratio + (decay_ratio - min_ratio) * left

    return LambdaLR(optimizer, ratio)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: must be positive, got {value}")
