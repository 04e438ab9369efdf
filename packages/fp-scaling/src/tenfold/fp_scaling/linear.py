"""Linear layers whose matrix products have quantized operands, and the one line that puts them into a model."""

import inspect
import re
import warnings
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from .recipe import QuantRecipe

CLASSIFIERS = ("lm_head", "classifier", "score", "head")


class _QuantizedProduct(torch.autograd.Function):
    """The three products of Eq. 8. What is saved for the backward is what a plain linear layer saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: QuantRecipe) -> Tensor:
        """`(tokens, in)` and `(out, in)` to `(tokens, out)`."""
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return recipe.quantize("P1", x) @ recipe.quantize("P2", weight).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        recipe: QuantRecipe = ctx.recipe
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = recipe.quantize("P3", grad) @ recipe.quantize("P4", weight)
        if ctx.needs_input_grad[1]:
            dw = recipe.quantize("P5", grad).t() @ recipe.quantize("P6", x)
        return dx, dw, None


def quant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: QuantRecipe) -> Tensor:
    """`x @ weight.T + bias`, forward and backward with the operands that `recipe` quantizes.

    Under autocast, x, weight and bias are first cast to its dtype, as for a plain linear layer. The bias and its
    gradient are never quantized.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        recipe: with nothing quantized, this is `torch.nn.functional.linear`.
    """
    if not recipe.formats:
        return F.linear(x, weight, bias)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    out = _QuantizedProduct.apply(x.reshape(-1, x.shape[-1]), weight, recipe).reshape(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class QuantLinear(nn.Linear):
    """`nn.Linear` with quantized operands; parameters, their names and checkpoints are nn.Linear's.

    Args:
        in_features, out_features: as for nn.Linear.
        bias: as for nn.Linear.
        recipe: which operands are quantized, and how.
        options: `device` and `dtype`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, recipe: QuantRecipe, **options: Any
    ) -> None:
        recipe.check_layer("the layer", in_features, out_features)
        super().__init__(in_features, out_features, bias, **options)
        self.recipe = recipe

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return quant_linear(input, self.weight, self.bias, self.recipe)

    def extra_repr(self) -> str:
        """Sizes and recipe, for `print(model)`."""
        return f"{super().extra_repr()}, {self.recipe.describe()}"


class QuantConv1D(Conv1D):
    """Transformers' linear layer of GPT-2, whose weight is `(in, out)`, with quantized operands."""

    recipe: QuantRecipe

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return quant_linear(x, self.weight.t(), self.bias, self.recipe) if self.recipe.formats else super().forward(x)


FALCON = "FalconLinear"  # of transformers: nn.Linear, its product and its bias rounded one after the other
_QUANTIZED = {nn.Linear: QuantLinear, FALCON: QuantLinear, Conv1D: QuantConv1D}


def quantize_linears_(
    model: nn.Module, recipe: QuantRecipe, *, skip: tuple[str, ...] | list[str] | None = None, adapters: bool = False
) -> nn.Module:
    """Turn the linear layers of `model` into quantized ones, in place.

    Parameters stay the same objects under the same names: optimizers, tied weights, hooks and checkpoints keep working.
    Convert before `torch.compile`, DDP or FSDP wrap the model. `nn.Linear` and transformers' `Conv1D` (GPT-2) are
    converted, whatever holds them, and Falcon's own linear layer; other subclasses are not, since they compute
    something of their own, nor are layers with one output feature, gates. Products that are no such layer stay as they
    are. Where one would think otherwise there is a warning: nn.MultiheadAttention, experts whose weights are stacked in
    one tensor, with their share of all parameters, and layers whose weight the model multiplies itself, as Mamba does.

    Args:
        model: any module; converted layers get the new recipe.
        recipe: which operands are quantized, and how.
        skip: layers to leave, as patterns of their names (`"lm_head"`, `"layers.0.*"`; a pattern without a dot
            is compared with the last part of a name). By default, as in the paper, the classifier: what a
            transformers model calls its output embeddings, layers called lm_head, classifier, score or head, and
            those that share their weight with an embedding. Patterns replace this default: name the classifier among
            them, or it is quantized; `()` leaves nothing out.
        adapters: whether PEFT's adapters, small beside what they adapt, are quantized too.

    Returns:
        `model`.

    Raises:
        ValueError: nothing to convert, a pattern of `skip` that matches no layer, or a layer whose features the
            blocks do not divide; the model is then as it was.
    """
    if isinstance(skip, str):
        raise TypeError(f"skip: expected several patterns such as ('lm_head',), got {skip!r}")
    left_alone = set() if adapters else _adapters(model)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if _kind(layer) in _KINDS and _features(layer)[1] > 1 and id(layer) not in left_alone
    }
    left = _classifiers(model, layers) if skip is None else set()
    for pattern in CLASSIFIERS if skip is None else skip:
        matched = {name for name in layers if _matches(name, pattern)}
        if skip is not None and not matched:
            raise ValueError(f"skip: no linear layer is called {pattern!r}; there are {', '.join(layers) or 'none'}")
        left |= matched
    chosen = {name: layer for name, layer in layers.items() if name not in left}
    if not chosen:
        others = {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and _kind(m) not in _KINDS}
        own = f"; its {', '.join(sorted(others))} may compute something of their own" if others else ""
        raise ValueError(f"model: has no linear layer to quantize (nn.Linear or transformers' Conv1D){own}")
    for name, layer in chosen.items():
        recipe.check_layer(name or "the layer", *_features(layer))
    if attentions := [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]:
        warnings.warn(
            f"{attentions[0]}: nn.MultiheadAttention computes with its weights itself: its projections stay "
            "unquantized. In evaluation, nn.TransformerEncoderLayer goes around its quantized layers too, unless "
            "torch.backends.mha.set_fastpath_enabled(False)."
        )
    _warn_of_products_elsewhere(model, chosen)
    for layer in chosen.values():
        layer.__class__ = _QUANTIZED.get(_kind(layer), type(layer))
        layer.recipe = recipe
    return model


def _warn_of_products_elsewhere(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Say which weights are multiplied where no layer is called, and so stay in full precision."""
    stacked = {
        f"{name}.{own}": p.numel()
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn")
        for own, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and p.shape[0] > 1
    }
    if stacked:
        share = sum(stacked.values()) / sum(p.numel() for p in model.parameters())
        warnings.warn(
            f"{next(iter(stacked))}: {len(stacked)} stacks of matrices, {100 * share:.0f} % of the parameters, are no "
            "linear layers and stay unquantized."
        )
    modules = dict(model.named_modules())
    for name in chosen:
        parent, _, last = name.rpartition(".")
        if last in _weights_read(type(modules[parent])):
            warnings.warn(
                f"{name}: {type(modules[parent]).__name__} multiplies with its weight itself: that product stays "
                "unquantized."
            )


@cache
def _weights_read(kind: type) -> set[str]:
    """The layers whose weight a module's own code computes with, found in its source; empty where there is none."""
    read: set[str] = set()
    for name, function in vars(kind).items():
        if inspect.isfunction(function) and not re.search("init|reset", name):
            try:
                source = inspect.getsource(function)
            except (OSError, TypeError):
                continue
            read |= set(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data_ptr|requires_grad))", source))
    return read


def dequantize_(model: nn.Module) -> nn.Module:
    """Turn every quantized layer of `model` back into a plain one, in place; returns `model`."""
    plain = {quantized: kind for kind, quantized in _QUANTIZED.items() if kind is not FALCON}
    for layer in model.modules():
        if type(layer) in plain:
            layer.__class__ = plain[type(layer)]
            del layer.recipe
    return model


_KINDS = {*_QUANTIZED, *_QUANTIZED.values()}


def _kind(layer: nn.Module) -> type | str:
    return FALCON if type(layer).__name__ == FALCON else type(layer)


def _adapters(model: nn.Module) -> set[int]:
    """The layers that are PEFT's adapters, by what it says of each layer that it has wrapped."""
    wrapped = [m for m in model.modules() if hasattr(m, "adapter_layer_names") and hasattr(m, "base_layer")]
    held = [getattr(m, name) for m in wrapped for name in m.adapter_layer_names if hasattr(m, name)]
    return {id(layer) for part in held if isinstance(part, nn.Module) for layer in part.modules()}


def _classifiers(model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    """The layers that are some transformers model's output embeddings, or share their weight with an embedding."""
    heads = [m.get_output_embeddings() for m in model.modules() if hasattr(m, "get_output_embeddings")]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {name for name, layer in layers.items() if any(layer is h for h in heads) or id(layer.weight) in embeddings}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or ("." not in pattern and fnmatchcase(name.rpartition(".")[2], pattern))


def _features(layer: nn.Module) -> tuple[int, int]:
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
