"""Longer contexts in stages: a higher base of the rotary frequencies, for any transformers model."""

import math

import torch
from transformers import PreTrainedModel

from ..model.config import HunyuanLargeConfig

# Of transformers' rotary parameters, those of the scalings that a new base replaces.
KNOWN = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor"),
    *("high_freq_factor", "mscale", "mscale_all_dim", "truncate", "alpha"),
}


def extend_context(model: PreTrainedModel, *, max_length: int, base: float) -> None:
    """Give a model a longer context before it is trained on: `max_length` positions, rotary base `base`.

    The paper trains at 32K and then at 256K, about 10 billion tokens each, 25 % of them natural long text, and
    raises the base to 1e9 for 256K; the base for 32K is not published. The change is kept by `save_pretrained`. A
    scaling that the model had is replaced.

    Args:
        model: whose rotary embeddings share one set of parameters.
        max_length: tokens.
        base: θ of the frequencies θ^(-2i/d).

    Raises:
        ValueError: a context that is not longer, a base that is not above 1, or a model without rotary embeddings, or
            with several kinds of them, or with parameters that a new base would lose; the model is then as it was.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None)
    if foreign := sorted(set(parameters or {}) - KNOWN):
        raise ValueError(f"model: its rotary embedding has {', '.join(foreign)}, which a new base would lose")
    rotary = [m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "original_inv_freq")]
    if not rotary or not parameters or "rope_theta" not in parameters:
        raise ValueError(f"model: {type(model).__name__} has no rotary embedding with one base for all layers")
    if max_length < config.max_position_embeddings:
        raise ValueError(
            f"max_length: {max_length} is less than the model's {config.max_position_embeddings} positions"
        )
    if not 1 < base < math.inf:
        raise ValueError(f"base: must be above 1 and finite, got {base}")
    kept = {k: v for k, v in parameters.items() if k == "partial_rotary_factor"}
    before = config.rope_parameters, config.max_position_embeddings
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(base), **kept}
    config.max_position_embeddings = max_length
    try:
        with torch.device("meta"):
            fresh = dict(type(model)(model.config).named_modules())
        rebuilt = [type(module)(config).to(module.inv_freq.device) for module in rotary]
    except Exception as error:  # whatever a model's own code makes of the config
        config.rope_parameters, config.max_position_embeddings = before
        raise ValueError(f"model: {type(model).__name__} does not take another rotary base: {error}") from error
    for module, new in zip(rotary, rebuilt, strict=True):
        module.__dict__.update(new.__dict__ | {"training": module.training})
    for name, module in model.named_modules():  # YaRN multiplies into the scale of attention, too
        scaling = getattr(fresh[name], "scaling", None)
        if isinstance(scaling, int | float) and hasattr(module, "scaling"):
            module.scaling = scaling


def rope_base(config: HunyuanLargeConfig) -> float:
    """The base that the frequencies come from, alpha included: 1.343e9 for the released Pretrain model."""
    parameters, d = config.rope_parameters, config.head_dim
    return parameters["rope_theta"] * (parameters.get("alpha") or 1.0) ** (d / (d - 2))
