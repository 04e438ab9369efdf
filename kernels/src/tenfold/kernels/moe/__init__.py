"""Mixture of experts: routing with recycling, tokens to their experts and back, products and feed-forwards."""

from .experts import expert_swiglu
from .matmul import grouped_matmul
from .permutation import permute_tokens, unpermute_tokens
from .routing import Routing, route_tokens
from .swiglu import grouped_swiglu

__all__ = [
    "Routing",
    "expert_swiglu",
    "grouped_matmul",
    "grouped_swiglu",
    "permute_tokens",
    "route_tokens",
    "unpermute_tokens",
]
