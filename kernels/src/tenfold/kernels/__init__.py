"""The ops of the Tenfold packages: one definition each, computed by Triton, on the CPU, or as written."""

from .backend import use_backend
from .cog import cog_attention
from .logprob import linear_logprob

__all__ = ["cog_attention", "linear_logprob", "use_backend"]
