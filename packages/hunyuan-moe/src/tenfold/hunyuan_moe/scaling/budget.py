"""What a model costs before it is built: parameters, activated parameters, bytes of cache."""

from typing import NamedTuple

import torch

from ..model.config import HunyuanLargeConfig
from ..moe import Experts


class Parameters(NamedTuple):
    """How many a model has, and how many a token uses."""

    total: int
    activated: int


def count_parameters(config: HunyuanLargeConfig) -> Parameters:
    """Count them, on the meta device: no memory is needed.

    Activated are those that one token passes: all but the specialized experts that it does not use. Embeddings
    count, once where they are tied.

    Example:
        >>> count_parameters(HunyuanLargeConfig())
        Parameters(total=388698128640, activated=51318800640)
    """
    from ..model.modeling import HunyuanLargeForCausalLM

    with torch.device("meta"):
        model = HunyuanLargeForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
    return Parameters(total, total - experts // config.num_experts * (config.num_experts - config.moe_topk))


def cache_bytes_per_token(config: HunyuanLargeConfig, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of keys and values per token and sequence, each stored once per run of layers (table 2 of the paper)."""
    stored = config.kv_sharing_modes.count(None)
    return 2 * stored * config.num_key_value_heads * config.head_dim * dtype.itemsize
