"""The ladder from MHA to CLLA: one base configuration, every rung of it, and equal parameters for all."""

from copy import deepcopy

import torch

from .config import CLLAConfig

RUNGS = ("MHA", "GQA", "MQA", "CLA", "MLA", "CLLA")


def rung(base: CLLAConfig, name: str, *, kv_heads: int | None = None, **changes) -> CLLAConfig:
    """`base` as another rung of the ladder; sizes, and what is not the rung's own, stay.

    Args:
        base: a CLLA; its `share_factor` (or `producers`) is CLA's and CLLA's, its latent MLA's and CLLA's.
        name: MHA: keys and values of every head in every layer. GQA: of `kv_heads`. MQA: of one. CLA: MHA's, shared
            by layers. MLA: a latent in every layer. CLLA: a latent shared by layers.
        kv_heads: key and value heads of GQA, by default a quarter of the heads; of CLA, by default all.
        changes: further arguments of CLLAConfig, such as `cache_bits`.

    Raises:
        ValueError: an unknown name, or sizes that do not go together.
    """
    if name not in RUNGS:
        raise ValueError(f"rung: must be one of {', '.join(RUNGS)}, got {name!r}")
    heads = base.num_attention_heads
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise ValueError(f"kv_heads: must be positive and divide num_attention_heads {heads}, got {kv_heads}")
    per_head = {
        "MHA": heads,
        "GQA": max(1, heads // 4) if kv_heads is None else kv_heads,
        "MQA": 1,
        "CLA": heads if kv_heads is None else kv_heads,
    }
    settings = base.to_dict()
    settings["attention"] = "heads" if name in per_head else "latent"
    settings["num_key_value_heads"] = per_head.get(name, heads)
    if name not in ("CLA", "CLLA"):
        settings |= {"share_factor": 1, "producers": None}
    if name in per_head:
        settings |= {"rope_frequencies": None, "cache_scales": "token"}
    settings |= {"attn_implementation": base._attn_implementation, **changes}
    return CLLAConfig(**settings)


def count_parameters(config: CLLAConfig) -> int:
    """Of the whole language model; counted on the meta device, so of any size."""
    from .model import CLLAForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in CLLAForCausalLM(config).parameters())


def with_parameters_of(config: CLLAConfig, reference: CLLAConfig) -> CLLAConfig:
    """`config` with the feed-forward width at which it has as many parameters as `reference`, to the nearest.

    What a rung saves in attention goes back to its feed-forward. One step of the width is 3·dim·layers parameters,
    so the counts agree within half of that.
    """
    missing = count_parameters(reference) - count_parameters(config)
    step = 3 * config.hidden_size * config.num_hidden_layers
    matched = deepcopy(config)
    matched.intermediate_size = config.intermediate_size + round(missing / step)
    if matched.intermediate_size < 1:
        raise ValueError("reference: too small, no feed-forward would be left")
    return matched
