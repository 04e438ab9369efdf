"""The ops of the Tenfold packages: one definition each, computed by Triton, on the CPU, or as written."""

from .backend import use_backend
from .cog import cog_attention
from .logprob import linear_logprob
from .moe import Routing, grouped_matmul, permute_tokens, route_tokens, unpermute_tokens

__all__ = [
    "Routing",
    "cog_attention",
    "grouped_matmul",
    "linear_logprob",
    "permute_tokens",
    "route_tokens",
    "unpermute_tokens",
    "use_backend",
]
