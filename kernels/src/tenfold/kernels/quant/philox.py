"""The random bits of stochastic rounding: Philox4x32-10, the generator of Triton and of CUDA, in plain torch.

Element i of a tensor gets word i % 4 of the block with the counter i // 4: the same on every device, in every
launch and however the work is divided. (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.)
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def random_words(seed: Tensor, first: int, count: int) -> Tensor:
    """32 random bits, as int64, for each of the elements `first … first + count - 1`."""
    blocks = torch.arange(first // 4, (first + count + 3) // 4, device=seed.device)
    c0, c1, c2, c3 = blocks & MASK, blocks >> 32, torch.zeros_like(blocks), torch.zeros_like(blocks)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        high_a, low_a = _multiply(c0, 0xD2511F53)
        high_b, low_b = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return torch.stack([c0, c1, c2, c3], 1).flatten()[first % 4 :][:count]


def _multiply(c: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of 32-bit numbers, which overflows int64 into its sign bit."""
    product = c * constant
    return (product >> 32) & MASK, product & MASK
