"""Cogformer: the paper's decoder language model, with its softmax twin and a differential baseline."""

from typing import Literal

from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaForCausalLM, PreTrainedModel

from tenfold.core.lm import CausalLM

from .transformers import keep_softmax, register


class Cogformer(CausalLM):
    """Trains a Llama whose attention is Cog but in `softmax_layers`, or one of two baselines of the same size.

    Cog attention adds no parameters: `cog` and `softmax` models of the same sizes and seed start from the same
    weights. `differential` is transformers' DiffLlama (arXiv 2410.05258), which takes negative weights from the
    difference of two softmaxes and has four more vectors of `dim / heads` per layer.

    Args:
        attention: `cog`, `softmax` or `differential`.
        softmax_layers: the layers that keep softmax in a `cog` model; by default the paper's first and last.
        others: sizes and optimizer, as `CausalLM` takes them.
    """

    def __init__(
        self,
        *,
        attention: Literal["cog", "softmax", "differential"] = "cog",
        softmax_layers: tuple[int, ...] = (0, -1),
        **others,
    ) -> None:
        if attention not in ("cog", "softmax", "differential"):
            raise ValueError(f"attention: must be 'cog', 'softmax' or 'differential', got {attention!r}")
        super().__init__(attention=attention, **others)

    def build(self) -> PreTrainedModel:
        """The model to train, with fresh weights."""
        attention = self.hparams.attention
        config = self.llama_config(attention="cog" if attention == "cog" else "sdpa")
        if attention == "differential":
            return DiffLlamaForCausalLM(DiffLlamaConfig(**_common(config.to_dict()), attn_implementation="sdpa"))
        if attention == "softmax":
            return LlamaForCausalLM(config)
        register()
        model = LlamaForCausalLM(config)
        keep_softmax(model, self.hparams.softmax_layers)
        return model


def _common(llama: dict) -> dict:
    """The entries of a Llama's config that say how large the model is."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings tie_word_embeddings bos_token_id eos_token_id rms_norm_eps "
        "initializer_range"
    )
    return {name: llama[name] for name in names.split()}
