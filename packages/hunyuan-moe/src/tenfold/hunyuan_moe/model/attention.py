"""Grouped-query attention whose keys and values a run of layers really shares (CLA), with a norm of its own in each.

The released layers of a pair differ in the weight w of their key norm, and keys are normalized after the rotation R.
RMSNorm(k)·w is linear in w, so that with n(·) for RMSNorm without a weight

    score_tj = ⟨n(R q_t)·w_q, n(R k_j)·w_k⟩ = ⟨n(R q_t)·w_q·w_k, n(R k_j)⟩

The first layer of a run caches n(R k_j) and v_j, once; every layer puts its own w_k into its query. The result is that
of the released code, which writes a copy of the keys and values for every layer.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import (
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .config import HunyuanLargeConfig


class HunyuanLargeAttention(nn.Module):
    """Attention of one layer, which makes keys and values or reads those of its run: see the head of this file."""

    is_causal = True

    def __init__(self, config: HunyuanLargeConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.produces = config.kv_sharing_modes[layer_idx] is None
        dim, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(dim, config.num_attention_heads * self.head_dim, bias=bias)
        if self.produces:
            self.k_proj = nn.Linear(dim, config.num_key_value_heads * self.head_dim, bias=bias)
            self.v_proj = nn.Linear(dim, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, dim, bias=bias)
        if config.use_qk_norm:
            self.query_layernorm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.key_layernorm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Hidden states `(B, T, dim)` to the same, the weights where there are any, and the run's keys and values.

        `key` and `value` are what the run's first layer returned, `(B, kv_heads, T with the cache, head_dim)`; that
        layer itself ignores them.
        """
        query = self._heads(self.q_proj(hidden_states))
        if self.produces:
            key, value = self._heads(self.k_proj(hidden_states)), self._heads(self.v_proj(hidden_states))
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            if self.config.use_qk_norm:
                key = self._normalize(key)
            key = key.to(value.dtype)  # under autocast the rotation is in float32
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
        else:
            query, _ = apply_rotary_pos_emb(query, query[:, :1], *position_embeddings)
        if self.config.use_qk_norm:
            query = self._normalize(query) * (self.query_layernorm.weight * self.key_layernorm.weight)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query.to(key.dtype), key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.flatten(2)), weights, key, value

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.head_dim,), eps=self.config.rms_norm_eps)
