"""The Hunyuan-Large recipe (arXiv 2411.02265): recycle routing, shared keys and values, learning rates per expert."""

from .adapters.cla import CLAMixin, share_key_values
from .adapters.experts import register_experts
from .adapters.rope import extend_context, rope_base
from .learning_rates import batch_at_ratio, expert_lr_ratio, expert_parameter_groups, optimal_lr, three_phase
from .model.config import HunyuanLargeConfig
from .model.modeling import HunyuanLargeForCausalLM, HunyuanLargeModel, register
from .model.module import HunyuanLarge
from .moe import Experts, MoELayer, RecycleRouter, RoutingStatistics
from .noise import NoiseBatch, noise_batch
from .scaling.budget import cache_bytes_per_token, count_parameters
from .scaling.flops import Flops, flops_per_token
from .scaling.law import fit_isoflops, minimal_compute, training_flops

__all__ = [
    "CLAMixin",
    "Experts",
    "Flops",
    "HunyuanLarge",
    "HunyuanLargeConfig",
    "HunyuanLargeForCausalLM",
    "HunyuanLargeModel",
    "MoELayer",
    "NoiseBatch",
    "RecycleRouter",
    "RoutingStatistics",
    "batch_at_ratio",
    "cache_bytes_per_token",
    "count_parameters",
    "expert_lr_ratio",
    "expert_parameter_groups",
    "extend_context",
    "fit_isoflops",
    "flops_per_token",
    "minimal_compute",
    "noise_batch",
    "optimal_lr",
    "register",
    "register_experts",
    "rope_base",
    "share_key_values",
    "three_phase",
    "training_flops",
]
