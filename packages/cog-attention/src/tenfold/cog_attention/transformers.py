"""Cog attention inside transformers models: `register()`, then `attn_implementation="cog"`."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tenfold.kernels import cog_attention

from .weights import attention_weights


def register(name: str = "cog") -> None:
    """Add Cog attention to transformers under `name`, for every model that takes `attn_implementation`.

    Example:
        >>> register()
        >>> model = LlamaForCausalLM(LlamaConfig(..., attn_implementation="cog"))
        >>> keep_softmax(model)  # the paper's rule: softmax in the first and the last layer
    """
    AttentionInterface.register(name, cog_attention_forward)
    AttentionMaskInterface.register(name, cog_mask)


def keep_softmax(model: PreTrainedModel, layers: Sequence[int] = (0, -1)) -> None:
    """Use softmax attention in `layers` and Cog in the others; by default the paper's first and last.

    The choice is written into the model's config (`cog_softmax_layers`), so `save_pretrained` keeps it, and with
    it the attention itself: `from_pretrained` gives a Cog model again where `register()` was called, and an error
    where it was not. Negative indices count from the last layer; an empty sequence makes every layer Cog.

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
    depth = config.num_hidden_layers
    numbers = {module.layer_idx for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)}
    if config.is_encoder_decoder or numbers != set(range(depth)):
        raise ValueError(
            f"model: {type(model).__name__} does not number its attention layers from 0 to {depth - 1}, so that "
            "layers cannot be told apart"
        )
    for layer in layers:
        if not -depth <= layer < depth:
            raise ValueError(f"layers: the model has {depth} layers, there is no layer {layer}")
    config.cog_softmax_layers = sorted({layer % depth for layer in layers})
    _remember(config)


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
    _remember(module.config)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    softmax = getattr(module, "layer_idx", None) in getattr(module.config, "cog_softmax_layers", ())
    mask = _boolean(attention_mask)
    causal = causal and mask is None

    weights = None
    if kwargs.pop("output_attentions", getattr(module.config, "output_attentions", False)):
        kind = "softmax" if softmax else "cog"
        weights = attention_weights(query, key, kind=kind, causal=causal, mask=mask, scale=scaling)
    for unsupported in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(unsupported) is not None:
            raise ValueError(f"{unsupported}: has no meaning for signed weights, use another attention for this model")
    if softmax:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, is_causal=causal, **kwargs
        )
        return out, weights

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


def _remember(config: PreTrainedConfig) -> None:
    """Have `save_pretrained` write which attention the weights were trained with.

    Transformers does not: without this key a saved Cog model would load as a softmax model, without a word. With
    it, it loads as Cog, or, where `register` was not called, not at all.
    """
    if getattr(config, "attn_implementation", None) is None:
        config.attn_implementation = config._attn_implementation


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
