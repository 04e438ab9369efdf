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
        vocab_size: tokens; that of the data.
        layers: decoder blocks.
        dim: width of the residual stream.
        heads: query heads.
        ffn: inner width of the SwiGLU feed-forward.
        max_length: longest sequence in tokens.
        fmt: format of the quantized operands (`e4m3`, `e2m1`, `e5m2ocp`), or None to quantize nothing.
        targets: the quantized operands: P1 input, P2 weight, P3 and P5 gradient, P4 weight and P6 input in the
            backward pass.
        scale: one scale per `tensor`, `channel` or `block`; None for none.
        block_size: elements that share a scale; must divide `dim` and `ffn`.
        block_axis: blocks along the axis that a product sums over (`contraction`), or the `last` one.
        rounding: ties to `even`, or `away` from zero as in the paper's simulator; or `stochastic`.
        kv_heads: key and value heads; `heads` by default.
        tie_embeddings: whether the head's weight is the embedding's.
        separate_documents: whether a token attends only its own document.
        init_std: standard deviation of the initial weights.
        lr: the highest learning rate.
        min_lr_ratio: the last learning rate, as a share of `lr`.
        warmup_steps: over which the learning rate rises.
        weight_decay: of AdamW.
        betas: of AdamW.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        layers: int = 6,
        dim: int = 128,
        heads: int = 4,
        ffn: int = 384,
        max_length: int = 512,
        fmt: str | None = "e4m3",
        targets: tuple[Operand, ...] = TARGETS,
        scale: Scale | None = "block",
        block_size: int = 128,
        block_axis: Literal["contraction", "last"] = "contraction",
        rounding: Rounding = "even",
        kv_heads: int | None = None,
        tie_embeddings: bool = False,
        separate_documents: bool = False,
        init_std: float = 0.02,
        lr: float = 3e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        # Made here so that a format or block that cannot be is told before anything is built.
        recipe = QuantRecipe(
            fmt or {},
            targets=targets if fmt else None,
            scale=scale,
            block_size=block_size,
            block_axis=block_axis,
            rounding=rounding,
        )
        for features in (dim, ffn):
            recipe.check_layer("the model", features, features)
        super().__init__(
            vocab_size=vocab_size,
            layers=layers,
            dim=dim,
            heads=heads,
            ffn=ffn,
            max_length=max_length,
            kv_heads=kv_heads,
            tie_embeddings=tie_embeddings,
            separate_documents=separate_documents,
            init_std=init_std,
            lr=lr,
            min_lr_ratio=min_lr_ratio,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            betas=betas,
        )
        self.hparams.setdefault("attention", "sdpa")
        self.save_hyperparameters()
        self.recipe = recipe

    def build(self) -> PreTrainedModel:
        """The model to train, with fresh weights."""
        model = super().build()
        return quantize_linears_(model, self.recipe) if self.recipe.formats else model


def count_params(model: PreTrainedModel) -> int:
    """N of the law: the weights of a transformer's layers, without embeddings, head, norms and biases."""
    return sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear))
