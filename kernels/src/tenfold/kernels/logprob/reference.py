"""Per-token log-probabilities by their definition: plain torch, correct in float64. The tests' oracle."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int) -> Tensor:
    """`log_softmax(hidden @ weightᵀ + bias)` at each row's target; 0 where that is `ignore_index`."""
    ignored = target == ignore_index
    hidden = hidden.masked_fill(ignored[:, None], 0.0)  # else its NaN reaches the gradient of weight as 0·NaN
    scores = F.linear(hidden, weight, bias)
    logp = scores.log_softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    logp = logp.gather(1, target.masked_fill(ignored, 0)[:, None]).squeeze(1)
    return logp.masked_fill(ignored, 0.0)
