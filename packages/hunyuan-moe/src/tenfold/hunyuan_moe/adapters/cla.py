"""Cross-layer attention for anyone's transformers model: runs of layers that share keys and values.

The first layer of a run makes keys and values, and the others attend to them as its own attention does: normalized,
rotated, and from the cache if there is one. They have no key and value projections of their own, and the cache holds
nothing for them.
"""

import ast
import inspect
from textwrap import dedent
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import KVSharingDict

from tenfold.core.lm import CACHE

PROJECTIONS = ("k_proj", "v_proj")
NORMS = ("k_norm", "v_norm", "k_layernorm", "key_layernorm")  # of the keys and values, as the families call them
STATE = "shared_key_values"


def share_key_values(model: PreTrainedModel, factor: int = 2, *, init: str = "producer") -> PreTrainedModel:
    """Let each run of `factor` layers share the keys and values of its first one (CLA), and return the model.

    It is changed in place. Its attention, its cache and its masks stay those of its family: `generate`,
    `attn_implementation`, static caches and activation checkpointing go on working. What was learned with keys and
    values in every layer is damaged and has to be trained again.

    A static cache that is filled with zeros ahead, as `generate` does for chunked prefill, has room for all layers.

    `config.cla_share_factor` keeps the factor. `save_pretrained` writes the model for a class with `CLAMixin`; its own
    class would make new projections, of which transformers warns.

    Args:
        model: a decoder whose attention layers have `k_proj` and `v_proj`: Llama, Mistral, Qwen2, Qwen3, Gemma,
            Mixtral, Qwen3-MoE and others of that form, also inside a vision-language model.
        factor: layers per run; the last run may be shorter. 1 changes nothing.
        init: the projections that a run keeps: `producer` for its first layer's, or `mean` for the mean of all of its
            layers', as in uptraining for grouped queries (arXiv 2305.13245).

    Raises:
        TypeError: not a transformers model.
        ValueError: a model of another form, or whose layers in a run differ in more than their weights.

    Example:
        >>> model = share_key_values(AutoModelForCausalLM.from_pretrained(folder), factor=2)
    """
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor: must be a whole number of layers, at least 1, got {factor!r}")
    if init not in ("producer", "mean"):
        raise ValueError(f"init: must be 'producer' or 'mean', got {init!r}")
    if factor == 1:
        return model
    if not hasattr(model, "get_decoder"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    decoder = model.get_decoder()
    layers = _attention_layers(model, decoder)
    runs = [layers[i : i + factor] for i in range(0, len(layers), factor)]
    for run in runs:
        for layer in run[1:]:
            _check_alike(run[0], layer)
    for producer, *readers in runs:
        if init == "mean":
            _average(producer, readers)
        for layer in (producer, *readers):
            layer.reads_layer = producer.layer_idx
            layer.register_forward_pre_hook(_give_keys_and_values, with_kwargs=True)
        for layer in readers:
            _take_projections(layer)
    decoder.register_forward_pre_hook(_begin, with_kwargs=True)
    decoder.config.cla_share_factor = factor
    return model


class CLAMixin:
    """Makes a transformers class share keys and values as its config says: `cla_share_factor`, 1 where there is none.

    A plain checkpoint loads too: the projections that it has and the model does not are left out, with a warning.

    Example:
        >>> class SharedLlama(CLAMixin, LlamaForCausalLM): ...
        >>> model = SharedLlama(LlamaConfig(..., cla_share_factor=2))
        >>> model.save_pretrained(folder)
        >>> model = SharedLlama.from_pretrained(folder)
        >>> AutoModelForCausalLM.register(LlamaConfig, SharedLlama, exist_ok=True)  # plain Llamas stay plain
    """

    def __init__(self, config: PreTrainedConfig, *args, cla_share_factor: int | None = None, **kwargs):
        super().__init__(config, *args, **kwargs)
        if cla_share_factor is None:
            cla_share_factor = getattr(config.get_text_config(), "cla_share_factor", 1)
        share_key_values(self, cla_share_factor)


class _Absent:
    """Stands where a projection was, with no parameters: the family's code computes with zeros that nobody reads."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.width)  # real ones: OLMo clamps them in place


class _Handover:
    """Stands for the cache in the attention of one layer: notes what its run's first layer attends to, or gives it."""

    def __init__(self, cache: Cache | None, shared: KVSharingDict, producer: int):
        self.cache, self.shared, self.producer = cache, shared, producer

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if layer_idx != self.producer:
            shared_key, shared_value = self.shared[self.producer]
            return shared_key.to(key.device), shared_value.to(value.device)  # a device map may part a run
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer_idx, *args, **kwargs)
        if not torch.is_grad_enabled():
            self.shared.clear()  # the runs before are done; a backward pass may want them again
        self.shared[layer_idx] = key, value
        return key, value


def _begin(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pass a place for the keys and values through the layers: of this forward pass, so that no two ever mix."""
    checkpointing = decoder.training and getattr(decoder, "gradient_checkpointing", False)
    if checkpointing and getattr(decoder._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "use_reentrant: such checkpointing loses the gradients of shared keys and values, set it to False"
        )
    return args, kwargs | {STATE: KVSharingDict()}


def _give_keys_and_values(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Put the handover in the cache's place; inside of the layer, where checkpointing has taken the cache away."""
    shared = kwargs.pop(STATE, None)
    if shared is None:
        raise ValueError(
            f"{STATE}: not passed to layer {layer.layer_idx}, which shares keys and values; call it through its model, "
            "whose family must hand keyword arguments on to the attention"
        )
    kwargs[CACHE] = _Handover(kwargs.get(CACHE), shared, layer.reads_layer)
    return args, kwargs


def _attention_layers(model: PreTrainedModel, decoder: nn.Module) -> list[nn.Module]:
    """The decoder's attention layers from first to last, all of a form that can share."""
    name, config = type(model).__name__, decoder.config
    if config.is_encoder_decoder:
        raise ValueError(f"model: {name} is an encoder-decoder, its attention layers are not one stack")
    if isinstance(getattr(type(config), "kv_sharing_modes", None), property):
        raise ValueError(f"model: {name} shares keys and values between layers already (config.kv_sharing_modes)")
    layers = [m for m in decoder.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "q_proj")]
    depth = config.num_hidden_layers
    if [layer.layer_idx for layer in layers] != list(range(depth)):
        found = {type(m).__name__ for m in decoder.modules() if "attention" in type(m).__name__.lower()}
        raise ValueError(
            f"model: {name} has {len(layers)} attention layers with q_proj, k_proj and v_proj for its {depth} layers; "
            f"found {', '.join(sorted(found)) or 'no attention'}"
        )
    for layer in layers:
        children = ", ".join(n for n, _ in layer.named_children())
        if any(not isinstance(getattr(layer, p, None), nn.Module) for p in PROJECTIONS):
            raise ValueError(f"model: layer {layer.layer_idx} of {name} has no k_proj and v_proj, but {children}")
        for projection in (getattr(layer, p) for p in PROJECTIONS):
            if not hasattr(projection, "out_features"):
                raise ValueError(f"model: {type(projection).__name__} of {name} has no out_features, as nn.Linear has")
    _check_signatures(name, layers[0], decoder)
    return layers


def _check_signatures(name: str, layer: nn.Module, decoder: nn.Module) -> None:
    block = next(m for m in decoder.modules() if layer in m.children())
    for module, needed in ((decoder, ()), (block, ()), (layer, (CACHE,))):
        parameters = inspect.signature(module.forward).parameters
        missing = [n for n in needed if n not in parameters]
        if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
            missing.append("**kwargs")
        if missing:
            raise ValueError(f"model: {type(module).__name__} of {name} takes no {', '.join(missing)}")
    attention = next(n for n, child in block.named_children() if child is layer)
    if not _hands_on(block, attention):
        raise ValueError(f"model: {type(block).__name__} of {name} does not hand its **kwargs on to {attention}")


def _hands_on(block: nn.Module, attention: str) -> bool:
    """Whether a block's code passes on what it does not know; also if that cannot be told, then its first pass will."""
    try:
        code = ast.parse(dedent(inspect.getsource(type(block).forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    calls = [n for n in ast.walk(code) if isinstance(n, ast.Call) and ast.unparse(n.func) == f"self.{attention}"]
    return not calls or any(keyword.arg is None for call in calls for keyword in call.keywords)


def _check_alike(producer: nn.Module, reader: nn.Module) -> None:
    """Refuse a run whose layers see keys differently: sliding windows, no rotation, other heads."""
    plain = (int, float, str, bool, type(None))
    a, b = ({k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in (producer, reader))
    a |= {n: tuple(p.shape) for n, p in producer.named_parameters()}
    b |= {n: tuple(p.shape) for n, p in reader.named_parameters()}
    for name in sorted((a.keys() | b.keys()) - {"layer_idx"}):
        if a.get(name) != b.get(name):
            raise ValueError(
                f"factor: layers {producer.layer_idx} and {reader.layer_idx} cannot share, they differ in {name}: "
                f"{a.get(name)} and {b.get(name)}"
            )


@torch.no_grad()
def _average(producer: nn.Module, readers: list[nn.Module]) -> None:
    for name in PROJECTIONS:
        for kind, parameter in getattr(producer, name).named_parameters():
            others = [getattr(reader, name).get_parameter(kind) for reader in readers]
            parameter.copy_(torch.stack([parameter, *(p.to(parameter.device) for p in others)]).mean(0))


def _take_projections(reader: nn.Module) -> None:
    for name in PROJECTIONS:
        width = getattr(reader, name).out_features
        delattr(reader, name)
        setattr(reader, name, _Absent(width))
    for name in NORMS:
        if isinstance(getattr(reader, name, None), nn.Module):
            delattr(reader, name)
            setattr(reader, name, _identity)


def _identity(x: Tensor) -> Tensor:
    return x
