"""Hunyuan-Large as a transformers model."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, DynamicCache
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import (
    HunYuanMoEV1PreTrainedModel,
    HunYuanMoEV1RotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from tenfold.core.lm import CACHE

from ..moe import Experts, MoELayer, RecycleRouter
from .attention import HunyuanLargeAttention
from .checkpoint import check_folder, register_layout, released_shapes
from .config import HunyuanLargeConfig


def register() -> None:
    """Make Hunyuan-Large known to `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.

    Example:
        >>> register()
        >>> model = AutoModelForCausalLM.from_pretrained("Hunyuan-A52B-Pretrain")
    """
    AutoConfig.register("hunyuan", HunyuanLargeConfig, exist_ok=True)
    AutoModel.register(HunyuanLargeConfig, HunyuanLargeModel, exist_ok=True)
    AutoModelForCausalLM.register(HunyuanLargeConfig, HunyuanLargeForCausalLM, exist_ok=True)


@dataclass
class HunyuanLargeOutput(MoeModelOutputWithPast):
    """The decoder's output, with the mean of the layers' balance losses."""

    balance_loss: Tensor | None = None


class HunyuanLargeDecoderLayer(GradientCheckpointingLayer):
    """Attention and experts, each after a norm and beside the residual stream."""

    def __init__(self, config: HunyuanLargeConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HunyuanLargeAttention(config, layer_idx)
        self.mlp = MoELayer(
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            top_k=config.moe_topk,
            shared_experts=config.num_shared_expert,
            routing=config.routing,
            capacity_factor=config.capacity_factor,
        )
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, key: Tensor | None, value: Tensor | None, **kwargs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next hidden states, the balance loss, and the keys and values of the run for its next layer.

        All that gradients flow through comes in and goes out by position, as activation checkpointing needs it.
        """
        out, _, key, value = self.self_attn(self.input_layernorm(hidden_states), key, value, **kwargs)
        hidden_states = hidden_states + out
        out, routing = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + out, routing.balance_loss, key, value


class HunyuanLargePreTrainedModel(HunYuanMoEV1PreTrainedModel):
    """What transformers has to know of the model."""

    config_class = HunyuanLargeConfig
    config: HunyuanLargeConfig
    _no_split_modules: ClassVar = ["HunyuanLargeDecoderLayer"]
    _keep_in_fp32_modules_strict: ClassVar = ["mlp.gate.wg"]  # a router in bfloat16 is another router
    _can_record_outputs: ClassVar = {
        "hidden_states": HunyuanLargeDecoderLayer,
        "attentions": HunyuanLargeAttention,
        "router_logits": OutputRecorder(RecycleRouter, index=0),
    }

    def __init__(self, config: HunyuanLargeConfig, *args, **kwargs):
        register_layout()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)


class HunyuanLargeModel(HunyuanLargePreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: HunyuanLargeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            HunyuanLargeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = HunYuanMoEV1RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: Cache | None = None,
        **kwargs,
    ) -> HunyuanLargeOutput:
        """As every transformers decoder; the cache holds keys and values once per run of layers.

        In training no cache is made: transformers tells packed documents apart by position_ids that begin anew, but
        not where there is a cache, and not where an attention_mask is given, even one of ones alone.
        `cache` is what transformers from 5.24 on calls `past_key_values`.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.training:
            use_cache = False
            cache = None if self.gradient_checkpointing else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        hidden, key, value, balance = inputs_embeds, None, None, []
        rotation = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            if layer.self_attn.produces:
                key = value = None
            hidden, balance_loss, key, value = layer(
                hidden,
                key,
                value,
                position_embeddings=rotation,
                attention_mask=mask,
                cache=cache,
                **kwargs,
            )
            balance.append(balance_loss)
        return HunyuanLargeOutput(
            last_hidden_state=self.norm(hidden),
            balance_loss=torch.stack(balance).mean(),
            **{CACHE: cache},
        )


class HunyuanLargeForCausalLM(HunyuanLargePreTrainedModel, GenerationMixin):
    """The language model of arXiv 2411.02265: recycle routing in training, a cache that pairs of layers share.

    Folders are written and read in the released checkpoint's layout, tensor for tensor; `from_pretrained` refuses one
    with missing, additional or misshapen tensors before it loads anything.

    Example:
        >>> model = HunyuanLargeForCausalLM.from_pretrained(
        ...     "Hunyuan-A52B-Instruct", dtype="bfloat16", device_map="auto"
        ... )
        >>> model.generate(tokens, max_new_tokens=100)
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HunyuanLargeConfig):
        super().__init__(config)
        self.model = HunyuanLargeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs) -> PreTrainedModel:
        """As transformers', but strict.

        Raises:
            ValueError: a local folder whose tensors are not exactly the model's, all of them named in one line; one
                with a head beside the embedding that should be it.
        """
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder", ""))
        whole = pretrained_model_name_or_path is not None and (folder / "config.json").is_file()
        if whole and "state_dict" not in kwargs:  # an adapter's folder has no config of the model
            checked = config
            if not isinstance(checked, HunyuanLargeConfig):  # transformers, too, changes what the folder says
                changes = {name: value for name, value in kwargs.items() if hasattr(HunyuanLargeConfig, name)}
                checked = HunyuanLargeConfig.from_pretrained(config or folder, **changes)
            with torch.device("meta"):
                shapes = released_shapes(HunyuanLargeForCausalLM(checked))
            check_folder(folder, shapes, tied=checked.tie_word_embeddings)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        cache: Cache | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Logits, and with `labels` the loss: in training with the balance loss, in evaluation without.

        With `num_items_in_batch`, the labels of all micro-batches of an update (transformers' Trainer), the loss is a
        share of the update's: the cross entropy's sum over them, and the balance loss in proportion to the labels here.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training:
                share = labels_share(labels, **kwargs)
                loss = loss + self.config.router_aux_loss_coef * share * outputs.balance_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.balance_loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def labels_share(
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> Tensor | float:
    """The share of an update's labels that a micro-batch has; 1 where there is no more than this batch.

    Args:
        labels: `(B, T)`, of which the first of each row is nothing's target.
        num_items_in_batch: labels of the update, counted as transformers' Trainer does.
        shift_labels: the targets, where they are given.
        ignore_index: of tokens that are no target.
        kwargs: what else the loss function is given.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    count = targets.ne(ignore_index).sum()
    return count / torch.as_tensor(num_items_in_batch, device=count.device)
