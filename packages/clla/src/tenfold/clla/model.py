"""CLLA as a transformers model: Llama's own parts around shared latent attention."""

from collections import UserDict
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from tenfold.core.lm import CACHE

from .attention import HeadsAttention, LatentAttention
from .cache import CLLACache
from .config import CLLAConfig
from .steps import initial_step


def register() -> None:
    """Make CLLA known to `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`, so that they load its folders.

    Example:
        >>> register()
        >>> model = AutoModelForCausalLM.from_pretrained("runs/my-clla")
    """
    AutoConfig.register("clla", CLLAConfig, exist_ok=True)
    AutoModel.register(CLLAConfig, CLLAModel, exist_ok=True)
    AutoModelForCausalLM.register(CLLAConfig, CLLAForCausalLM, exist_ok=True)


class CLLARotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's, as wide as the rotary part, with a converted model's own frequencies where it has them."""

    def __init__(self, config: CLLAConfig):
        config = config.__class__.from_dict(config.to_dict())
        config.head_dim = config.rotary_dim or 2  # which is what Llama's goes by
        super().__init__(config)

    @staticmethod
    def compute_default_rope_parameters(config: CLLAConfig, **kwargs) -> tuple[Tensor, float]:
        """Radians per token of each pair."""
        frequencies, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        if config.rope_frequencies is not None:
            frequencies = frequencies.new_tensor(config.rope_frequencies)
        return frequencies, scaling


class CLLADecoderLayer(LlamaDecoderLayer):
    """Llama's block with another attention."""

    def __init__(self, config: CLLAConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = {"latent": LatentAttention, "heads": HeadsAttention}[config.attention](config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class CLLAPreTrainedModel(LlamaPreTrainedModel):
    """What transformers has to know of the model."""

    config_class = CLLAConfig
    config: CLLAConfig
    _no_split_modules: ClassVar = ["CLLADecoderLayer"]
    # Keys are wider than values, and the cache's own attention takes the masks of these two alone.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_record_outputs: ClassVar = {
        "hidden_states": CLLADecoderLayer,
        "attentions": (LatentAttention, HeadsAttention),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "latent_steps", None) is not None:
            step = initial_step(self.config.cache_formats(module.layer_idx)[0])
            initialization.constant_(module.latent_steps, step)


class CLLAModel(CLLAPreTrainedModel, LlamaModel):
    """The decoder without its head."""

    def __init__(self, config: CLLAConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([CLLADecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = CLLARotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CLLACache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: CLLACache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As Llama's. A cache is made where `use_cache` asks for one, by default in evaluation mode.

        A given cache must be a `CLLACache`; `cache` is what transformers from 5.24 on calls `past_key_values`. No
        gradient flows to what it holds from earlier calls. To the tokens of this call it does if there were none
        before, or keys and values are cached; latents are read as they lie, and `backward` raises a RuntimeError.

        Raises:
            ValueError, TypeError: a cache of another kind or config, or more tokens than the model has positions.
        """
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and not (self.training and self.gradient_checkpointing):
            cache = CLLACache(self.config)
        if cache is not None:
            if not isinstance(cache, CLLACache):
                got = type(cache).__name__
                raise TypeError(f"past_key_values: expected a CLLACache(model.config), got a {got}")
            cache.check(self.config)
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is None:
            raise ValueError("input_ids: missing, and there are no inputs_embeds either")
        length = (cache.get_seq_length() if cache is not None else 0) + inputs.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids: {length} tokens, cache included, but the model's max_position_embeddings is "
                f"{self.config.max_position_embeddings}"
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            shared=UserDict(),  # of a dict, FSDP2 would give each layer a copy
            **{CACHE: cache},
            **kwargs,
        )


class CLLAForCausalLM(CLLAPreTrainedModel, LlamaForCausalLM):
    """A causal language model whose cache is small: MHA, MQA, GQA, CLA, MLA or CLLA, by its config.

    Example:
        >>> model = CLLAForCausalLM(CLLAConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16))
        >>> model.generate(tokens, max_new_tokens=100)
    """

    def __init__(self, config: CLLAConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = CLLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """Give `generate` a CLLACache where it would make a DynamicCache, StaticCache or QuantizedCache."""
        if model_kwargs.get(CACHE) is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        kind = generation_config.cache_implementation
        kinds = (None, "dynamic", "static", "offloaded", "offloaded_static")
        if kind not in kinds:
            accepted = ", ".join(map(repr, kinds[1:]))
            raise ValueError(
                f"cache_implementation: accepted are {accepted}, got {kind!r}; the bits of the cache are the config's "
                "cache_bits"
            )
        static = kind is not None and "static" in kind
        length = max(max_cache_length, generation_config.max_cache_len or 0) if static else None
        model_kwargs[CACHE] = CLLACache(
            self.config, max_length=length, offloading=kind is not None and "offloaded" in kind
        )
