"""Cog Attention (arXiv 2411.07176): attention with negative weights, for torch, transformers and diffusion."""

from .attention import CogAttention, KVCache
from .cogformer import Cogformer
from .diffusion import UViCModule
from .transformers import keep_softmax, register
from .uvic import UViC
from .weights import attention_weights

__all__ = [
    "CogAttention",
    "Cogformer",
    "KVCache",
    "UViC",
    "UViCModule",
    "attention_weights",
    "keep_softmax",
    "register",
]
