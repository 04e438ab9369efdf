"""The Hunyuan-Large recipe (arXiv 2411.02265): recycle routing, shared keys and values, learning rates per expert."""

from .budget import cache_bytes_per_token, count_parameters
from .config import HunyuanLargeConfig
from .model import HunyuanLargeForCausalLM, HunyuanLargeModel, register
from .moe import Experts, MoELayer, RecycleRouter, RoutingStatistics

__all__ = [
    "Experts",
    "HunyuanLargeConfig",
    "HunyuanLargeForCausalLM",
    "HunyuanLargeModel",
    "MoELayer",
    "RecycleRouter",
    "RoutingStatistics",
    "cache_bytes_per_token",
    "count_parameters",
    "register",
]
