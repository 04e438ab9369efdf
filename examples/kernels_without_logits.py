"""The loss of a language model's head over a large vocabulary, without its matrix of logits: `uv run python FILE`."""

import torch
from torch.nn import functional as F

from tenfold.kernels import linear_logprob
from tenfold.kernels.testing import peak_memory

hidden = torch.randn(1024, 256, requires_grad=True)
weight = (torch.randn(32_000, 256) / 16).requires_grad_()
target = torch.randint(32_000, (1024,))


def ours():
    return torch.autograd.grad(-linear_logprob(hidden, weight, target).mean(), (hidden, weight))


def plain():
    return torch.autograd.grad(F.cross_entropy(hidden @ weight.T, target), (hidden, weight))


for a, b in zip(ours(), plain(), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
print(f"the same gradients; peak memory {peak_memory(ours) >> 20} MB instead of {peak_memory(plain) >> 20} MB")
