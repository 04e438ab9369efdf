"""Cog attention inside transformers models: `register()`, then `attn_implementation="cog"`."""

import functools
import inspect
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tenfold.kernels import cog_attention

from .weights import attention_weights

# What models hand to every attention function and what changes nothing here: masks already hold windows and packing.
_UNDERSTOOD = {
    *("sliding_window", "position_ids", "cache_position", "deterministic", "seq_idx", "num_items_in_batch"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "use_cache", "return_dict"),
    *("output_hidden_states", "output_router_logits"),
}
# They go through transformers' attention interface in part, or look the name up in a table of their own.
_PARTLY = {"bigbird_pegasus", "deepseek_ocr2", "git", "sam", "sam_hq", "superglue", "unlimited_ocr"}


def register(name: str = "cog") -> None:
    """Add Cog attention to transformers under `name`, for every model that takes `attn_implementation`.

    Example:
        >>> register()
        >>> model = LlamaForCausalLM(LlamaConfig(..., attn_implementation="cog"))
        >>> keep_softmax(model)  # the paper's rule: softmax in the first and the last layer
    """
    AttentionInterface.register(name, cog_attention_forward)
    AttentionMaskInterface.register(name, cog_mask)
    _hook(PreTrainedConfig, "to_dict", _with_attention)
    _hook(PreTrainedModel, "get_correct_attn_implementation", _if_applicable)


def keep_softmax(model: PreTrainedModel, layers: Sequence[int] = (0, -1)) -> None:
    """Use softmax attention in `layers` and Cog in the others; by default the paper's first and last.

    The choice is written into the model's config (`cog_softmax_layers`), so `save_pretrained` keeps it, and with
    it the attention itself: `from_pretrained` gives a Cog model again where `register()` was called, and an error
    where it was not. Only layers with attention are counted, which in hybrids are some of all. Negative indices count
    from the last; an empty sequence makes every layer Cog.

    Raises:
        ValueError: a layer that the model does not have, a model that does not run Cog attention, or one whose
            attention layers are not numbered from first to last (encoder-decoders, ViT): they are all Cog.
    """
    config = model.config.get_text_config()
    if AttentionInterface().get(config._attn_implementation) is not cog_attention_forward:
        raise ValueError(
            f"model: runs {config._attn_implementation!r} attention; call register() and build or load it with "
            'attn_implementation="cog" first'
        )
    _refuse(model)
    numbers = [
        getattr(m, "layer_idx", None) for m in model.modules() if getattr(m, "config", None) is config and _attends(m)
    ]
    known = sorted({number for number in numbers if isinstance(number, int)})
    if config.is_encoder_decoder or not known or len(known) != len(numbers):
        raise ValueError(
            f"model: {type(model).__name__} does not number its attention layers from 0 to "
            f"{config.num_hidden_layers - 1}, so that layers cannot be told apart"
        )
    depth = len(known)
    for layer in layers:
        if not -depth <= layer < depth:
            raise ValueError(f"layers: the model has {depth} attention layers, there is no layer {layer}")
    config.cog_softmax_layers = sorted({known[layer % depth] for layer in layers})


def cog_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function: `(batch, heads, time, dim)` in, `(batch, time, heads, dim)` out.

    A mask of None means plain causal attention for a causal module, the last query aligned with the last key.
    Weights are returned only when the model is asked for `output_attentions`: that costs the Tq×Tk matrix.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    softmax = getattr(module, "layer_idx", None) in getattr(module.config, "cog_softmax_layers", ())
    mask = _boolean(attention_mask)
    causal = causal and mask is None

    weights = None
    if kwargs.pop("output_attentions", getattr(module.config, "output_attentions", False)):
        kind = "softmax" if softmax else "cog"
        weights = attention_weights(query, key, kind=kind, causal=causal, mask=mask, scale=scaling)
    for unsupported, given in kwargs.items():
        if unsupported not in _UNDERSTOOD and given is not None and given is not False:
            raise ValueError(f"{unsupported}: Cog attention does not know it, use another attention for this model")
    if softmax:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, is_causal=causal, **kwargs
        )
        return out, weights

    if value.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"value: {type(module).__name__} has values of width {value.shape[-1]} and keys of width {key.shape[-1]} "
            "(as in MLA); Cog attention takes one width"
        )
    if dropout:
        raise ValueError(f"attention_dropout: Cog attention has no dropout on its weights, got {dropout}; set it to 0")
    out = cog_attention(query, key, value, causal=causal, mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), weights


def cog_mask(*, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **kwargs) -> Tensor | None:
    """Transformers' mask function: a bool mask, or None where plain causal attention says the same.

    None is left to the cases in which Cog's and SDPA's own causal flags agree, since softmax layers may share the
    mask: a square, or a single query that attends everything. SDPA's further shortcut, for an empty static cache,
    aligns the first query with the first key and would leak the future here. Bidirectional masks are always built.
    """
    kwargs.pop("allow_is_bidirectional_skip", None)
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
        allow_is_bidirectional_skip=False,
        **kwargs,
    )


def _is_cog(name: object) -> bool:
    return isinstance(name, str) and AttentionInterface().get(name) is cog_attention_forward


def _hook(owner: type, name: str, wrap) -> None:
    """Wrap a method of transformers, once."""
    method = getattr(owner, name)
    if not hasattr(method, "_cog"):
        wrapped = wrap(method)
        wrapped._cog = True
        setattr(owner, name, wrapped)


def _with_attention(to_dict):
    """A config that is set to Cog writes so, which transformers does not: it would load as softmax, without a word."""

    @functools.wraps(to_dict)
    def wrapped(self, *args, **kwargs):
        written = to_dict(self, *args, **kwargs)
        if attention := _attention(self):
            written["attn_implementation"] = attention
        return written

    return wrapped


def _attention(config: PreTrainedConfig) -> str | dict | None:
    """What gives this config and its sub-configs their Cog attention back; None where there is none."""
    own = config._attn_implementation if _is_cog(config._attn_implementation) else None
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    parts = {key: _attention(part) for key, part in parts.items() if isinstance(part, PreTrainedConfig)}
    if all(part == own for part in parts.values()):
        return own
    return ({"": own} if own else {}) | {key: part for key, part in parts.items() if part}


def _if_applicable(get_correct):
    """Refuse Cog where a model would ignore it or break its masks: when it is built, or set."""

    @functools.wraps(get_correct)
    def wrapped(self, requested_attention, *args, **kwargs):
        if _is_cog(requested_attention):
            _refuse(self)
        return get_correct(self, requested_attention, *args, **kwargs)

    return wrapped


def _attends(module: nn.Module) -> bool:
    """Whether the module calls transformers' attention interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _refuse(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation() or model.config.model_type in _PARTLY:
        raise ValueError(
            f"attn_implementation: {type(model).__name__} does not call transformers' attention interface everywhere, "
            "so that it cannot run Cog; in a composite model, name the part that can, as {'text_config': 'cog'}"
        )


def _boolean(mask: Tensor | None) -> Tensor | None:
    """A user's own additive 4-D mask (0 = attend, very negative = do not) as the bool mask that it stands for."""
    if mask is None or not mask.is_floating_point():
        return mask
    attend = mask == 0
    if not bool((attend | (mask <= -1e4)).all()):
        raise ValueError(
            "attention_mask: a float mask must hold 0 (attend) or the dtype's minimum; Cog takes no biases"
        )
    return attend
