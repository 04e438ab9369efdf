"""`QuantizedLM`: a Llama whose linear layers train with quantized operands."""

from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from tenfold.core.lm import CausalLM

from .linear import quantize_linears_
from .recipe import TARGETS, Operand, QuantRecipe, Rounding, Scale


class QuantizedLM(CausalLM):
    """Trains a Llama with quantized linear layers, all but the head, as the paper's models are.

    Quantization changes neither parameters nor initial weights: models of the same sizes and seed start alike
    whatever `fmt` is. Weights, their updates, norms, attention scores and the head stay in the trainer's precision.

    Args:
        fmt: format of the quantized operands (`e4m3`, `e2m1`, `e5m2ocp`), or None to quantize nothing.
        targets: the quantized operands: P1 input, P2 weight, P3 and P5 gradient, P4 weight and P6 input in the
            backward pass.
        scale: one scale per `tensor`, `channel` or `block`; None for none.
        block_size: elements that share a scale; must divide `dim` and `ffn`.
        block_axis: blocks along the axis that a product sums over (`contraction`), or the `last` one.
        rounding: ties to `even`, or `away` from zero as in the paper's simulator; or `stochastic`.
        others: sizes and optimizer, as `CausalLM` takes them.
    """

    def __init__(
        self,
        *,
        fmt: str | None = "e4m3",
        targets: tuple[Operand, ...] = TARGETS,
        scale: Scale | None = "block",
        block_size: int = 128,
        block_axis: Literal["contraction", "last"] = "contraction",
        rounding: Rounding = "even",
        **others,
    ) -> None:
        # Made here so that a format or block that cannot be is told before anything is built.
        self.recipe = QuantRecipe(
            fmt or {},
            targets=targets if fmt else None,
            scale=scale,
            block_size=block_size,
            block_axis=block_axis,
            rounding=rounding,
        )
        super().__init__(**others)
        for name in ("dim", "ffn"):
            features = self.hparams[name]
            self.recipe.check_layer(f"the model's {name}", features, features)

    def build(self) -> PreTrainedModel:
        """The model to train, with fresh weights."""
        model = super().build()
        return quantize_linears_(model, self.recipe) if self.recipe.formats else model


def count_params(model: PreTrainedModel) -> int:
    """N of the law: the weights of a transformer's layers, without embeddings, head, norms and biases."""
    return sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear))
