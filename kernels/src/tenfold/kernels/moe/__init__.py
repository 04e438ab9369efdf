"""Mixture of experts: routing with recycling, the permutation of tokens to their experts, grouped products."""

from .matmul import grouped_matmul
from .permutation import permute_tokens, unpermute_tokens
from .routing import Routing, route_tokens

__all__ = ["Routing", "grouped_matmul", "permute_tokens", "route_tokens", "unpermute_tokens"]
