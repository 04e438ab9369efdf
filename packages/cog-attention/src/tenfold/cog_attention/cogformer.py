"""Cogformer: the paper's decoder language model, with its softmax twin and a differential baseline."""

from typing import Literal

from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaForCausalLM, PreTrainedModel

from tenfold.core.lm import CausalLM, llama_config

from .transformers import keep_softmax, register


class Cogformer(CausalLM):
    """Trains a Llama whose attention is Cog but in `softmax_layers`, or one of two baselines of the same size.

    Cog attention adds no parameters: `cog` and `softmax` models of the same sizes and seed start from the same
    weights. `differential` is transformers' DiffLlama (arXiv 2410.05258), which takes negative weights from the
    difference of two softmaxes and has four more vectors of `dim / heads` per layer.

    Args:
        vocab_size: tokens; that of the data.
        layers: decoder blocks.
        dim: width of the residual stream.
        heads: query heads.
        ffn: inner width of the SwiGLU feed-forward.
        max_length: longest sequence in tokens.
        kv_heads: key and value heads; `heads` by default.
        attention: `cog`, `softmax` or `differential`.
        softmax_layers: the layers that keep softmax in a `cog` model; by default the paper's first and last.
        tie_embeddings: whether the head's weight is the embedding's.
        separate_documents: whether a token attends only its own document, as in the paper's code.
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
        ffn: int = 344,
        max_length: int = 512,
        kv_heads: int | None = None,
        attention: Literal["cog", "softmax", "differential"] = "cog",
        softmax_layers: tuple[int, ...] = (0, -1),
        tie_embeddings: bool = False,
        separate_documents: bool = False,
        init_std: float = 0.02,
        lr: float = 3e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        if attention not in ("cog", "softmax", "differential"):
            raise ValueError(f"attention: must be 'cog', 'softmax' or 'differential', got {attention!r}")
        super().__init__(
            vocab_size=vocab_size,
            layers=layers,
            dim=dim,
            heads=heads,
            ffn=ffn,
            max_length=max_length,
            kv_heads=kv_heads,
            attention=attention,
            tie_embeddings=tie_embeddings,
            separate_documents=separate_documents,
            init_std=init_std,
            lr=lr,
            min_lr_ratio=min_lr_ratio,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            betas=betas,
        )
        self.save_hyperparameters()

    def build(self) -> PreTrainedModel:
        """The model to train, with fresh weights."""
        h = self.hparams
        config = llama_config(
            vocab_size=h.vocab_size,
            layers=h.layers,
            dim=h.dim,
            heads=h.heads,
            ffn=h.ffn,
            max_length=h.max_length,
            kv_heads=h.kv_heads,
            attention="cog" if h.attention == "cog" else "sdpa",
            tie_embeddings=h.tie_embeddings,
            initializer_range=h.init_std,
        )
        if h.attention == "differential":
            return DiffLlamaForCausalLM(DiffLlamaConfig(**_common(config.to_dict()), attn_implementation="sdpa"))
        if h.attention == "softmax":
            return LlamaForCausalLM(config)
        register()
        model = LlamaForCausalLM(config)
        keep_softmax(model, h.softmax_layers)
        return model


def _common(llama: dict) -> dict:
    """The entries of a Llama's config that say how large the model is."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings tie_word_embeddings bos_token_id eos_token_id rms_norm_eps "
        "initializer_range"
    )
    return {name: llama[name] for name in names.split()}
