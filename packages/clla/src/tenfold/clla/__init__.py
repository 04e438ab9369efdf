"""Cross-Layer Latent Attention (arXiv 2410.15252): a KV cache under 2 %, as a transformers model."""

from .budget import bytes_per_token
from .cache import CLLACache
from .config import CLLAConfig, sharing_layout
from .ladder import rung
from .model import CLLAForCausalLM, CLLAModel, register
from .module import CLLAModule
from .steps import calibrate_steps

__all__ = [
    "CLLACache",
    "CLLAConfig",
    "CLLAForCausalLM",
    "CLLAModel",
    "CLLAModule",
    "bytes_per_token",
    "calibrate_steps",
    "register",
    "rung",
    "sharing_layout",
]
