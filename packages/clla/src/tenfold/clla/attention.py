"""Cross-Layer Latent Attention: the first layer of a run caches a latent, the others read it.

With g the producer of layer l (g = s·⌊l/s⌋ for adjacent runs of s) and ⟨·⟩ what the cache gives back of a vector:

    producer l = g:  c_t = RMSNorm(W_DKV h_t),   k_t = RoPE(W_KR h_t)           cached: ⟨c_t⟩, ⟨k_t⟩
    every layer l:   q_t = W_Q h_t, split per head i into content q_t,i and rotary part r_t,i = RoPE(·)
                     s_tj,i = (q_t,i · W_UK,i ⟨c_j⟩ + r_t,i · ⟨k_j⟩) / √(d_h + d_r)
                     o_t,i = Σ_j softmax_j(s)_j W_UV,i ⟨c_j⟩,   out = W_O [o_t,1; …]

`⟨·⟩` rounds to the cache's bits, in training too and for the current token too, so that a model is trained on what
it will read. A reader has no W_DKV and no W_KR, and caches nothing. With static scales per channel, c is cached in
units of its steps (`steps`), by which it is multiplied before W_UK and W_UV, or, where these are absorbed, the query
and the output.
Sharing by CLA (arXiv 2405.12981), latents by MLA (DeepSeek-V2, arXiv 2405.04434); their combination is a
reconstruction of arXiv 2410.15252.
"""

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

from tenfold.kernels import PackedLatents, latent_attention

from .cache import CLLACache
from .config import CLLAConfig
from .formats import Stored, dense
from .steps import initial_step, learned_step


class Entry(NamedTuple):
    """What a producer leaves for the readers of its run, in one forward pass."""

    first: Stored  # latents, or keys
    second: Stored | None  # rotary keys, or values
    past: bool  # whether there is more than this pass's tokens
    steps: Tensor | None = None  # that latents are stored in units of
    up: tuple[nn.Module, nn.Module] | None = None  # the up-projections of keys and values


class _Attention(nn.Module):
    """What both kinds have: queries and output, the place in a run, transformers' attention functions."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: CLLAConfig, layer_idx: int, query_width: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.producer = config.cache_producers[layer_idx]
        self.produces = self.producer == layer_idx
        readers = [layer for layer, producer in enumerate(config.cache_producers) if producer == self.producer]
        self.is_last_reader = layer_idx == readers[-1]
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        width = self.heads * query_width
        if config.query_dim is None:
            self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        else:
            self.q_proj = nn.Sequential(
                nn.Linear(config.hidden_size, config.query_dim, bias=config.attention_bias),
                LlamaRMSNorm(config.query_dim, config.rms_norm_eps),
                nn.Linear(config.query_dim, width, bias=False),
            )

    def _queries(self, hidden: Tensor) -> Tensor:
        return self.q_proj(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _store(
        self, first: Tensor, second: Tensor | None, cache: CLLACache | None
    ) -> tuple[Stored, Stored | None, bool]:
        """What the cache gives back of new vectors and those before, and whether there were any before.

        Without a cache, and where gradients are to flow, they are rounded as the cache would. The cache itself holds
        no gradient, and packed latents have none.
        """
        past = cache is not None and cache.get_seq_length(self.layer_idx) > 0
        packed = past and self.config.attention == "latent"
        if cache is not None:
            stored = cache.update(first, second, self.layer_idx)
        if cache is None or (torch.is_grad_enabled() and not packed):
            vectors = [x for x in (first, second) if x is not None]
            rounded = [f.round(x) for f, x in zip(self.config.cache_formats(self.layer_idx), vectors, strict=True)]
            if past:
                before = [dense(x, new.dtype)[:, :, : -new.shape[2]] for x, new in zip(stored, rounded, strict=True)]
                rounded = [torch.cat(pair, dim=2) for pair in zip(before, rounded, strict=True)]
            stored = rounded[0], (rounded[1] if len(rounded) > 1 else None)
        return *stored, past

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
        """Softmax attention over expanded keys and values, `(B, heads, T, ·)`, by the configured function."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


class LatentAttention(_Attention):
    """MLA (runs of one layer) and CLLA: see the head of this file."""

    def __init__(self, config: CLLAConfig, layer_idx: int):
        content, rotary = config.head_dim, config.rotary_dim
        super().__init__(config, layer_idx, content + rotary)
        self.rotary = rotary
        self.scaling = (content + rotary) ** -0.5
        dim, bias = config.hidden_size, config.attention_bias
        if self.produces:
            self.kv_down_proj = nn.Linear(dim, config.latent_dim, bias=bias)
            weighted = config.latent_norm and config.quantizer == "after_norm"
            self.kv_norm = LlamaRMSNorm(config.latent_dim, config.rms_norm_eps) if weighted else nn.Identity()
            self.latent_steps = None
            if config.cache_scales == "channel":
                step = initial_step(config.cache_formats(layer_idx)[0])
                self.latent_steps = nn.Parameter(torch.full((config.latent_dim,), step))
        self.makes_rope = rotary > 0 and (self.produces or config.rope_key == "own")
        if self.makes_rope:
            self.k_rope_proj = nn.Linear(dim, rotary, bias=bias)
        values = config.value_latent_dim
        keys = config.latent_dim - values if values else config.latent_dim
        self.expands = self.produces or not config.share_up_projections
        if self.expands:
            self.k_up_proj = nn.Linear(keys, self.heads * content, bias=False)
            self.v_up_proj = nn.Linear(values or config.latent_dim, self.heads * content, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: CLLACache | None = None,  # by its name until transformers 5.24, and from then on
        cache: CLLACache | None = None,
        *,
        shared: MutableMapping[int, Entry],
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states `(B, T, dim)` to the same, and the weights where transformers' function gives them."""
        cache = past_key_values if cache is None else cache
        content, rotary = self._queries(hidden_states).split([self.head_dim, self.rotary], dim=-1)
        new_rope = self.k_rope_proj(hidden_states)[:, None] if self.makes_rope else None
        if self.rotary:
            rotary, new_rope = rotate(rotary, new_rope, position_embeddings)
        entry = self._entry(hidden_states, new_rope, cache, shared)
        if entry.past:
            return self._absorbed(content, rotary, entry, attention_mask), None

        # The layers are called, not their weights multiplied: they may be adapted (PEFT) or quantized.
        k_up, v_up = entry.up
        latent = dense(_one_head(entry.first), hidden_states.dtype)
        if entry.steps is not None:
            latent = (latent * entry.steps).to(hidden_states.dtype)
        key = k_up(latent[..., : k_up.in_features]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = v_up(latent[..., -v_up.in_features :]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.rotary:
            rope = dense(entry.second, hidden_states.dtype)
            key = torch.cat([key, rope.expand(-1, self.heads, -1, -1)], dim=-1)
        query = torch.cat([content, rotary], dim=-1)
        return self._attend(query, key, value, attention_mask, **kwargs)

    def _entry(
        self, hidden: Tensor, new_rope: Tensor | None, cache: CLLACache | None, shared: MutableMapping[int, Entry]
    ) -> Entry:
        """What this layer attends to: made and left for the run by a producer, taken up by its readers."""
        if self.produces:
            latent, steps = self.kv_norm(self.kv_down_proj(hidden))[:, None], None
            format = self.config.cache_formats(self.layer_idx)[0]
            if not format.scales:
                if self.latent_steps is None:
                    raise ValueError(
                        "cache_scales: the model was made without steps per channel; they come with "
                        "from_pretrained(folder, cache_scales='channel')"
                    )
                steps = learned_step(self.latent_steps, format)
                latent = latent.to(torch.promote_types(latent.dtype, torch.float32)) / steps
            elif self.latent_steps is not None and torch.is_grad_enabled():
                latent = latent + 0 * self.latent_steps.to(latent.dtype)  # DDP wants a gradient of every parameter
            entry = Entry(*self._store(latent, new_rope, cache), steps)
            shared[self.layer_idx] = entry = entry._replace(up=(self.k_up_proj, self.v_up_proj))
        else:
            entry = shared[self.producer]
            if new_rope is not None:
                entry = entry._replace(second=self._store(new_rope, None, cache)[0])
            if self.expands:
                entry = entry._replace(up=(self.k_up_proj, self.v_up_proj))
        if cache is not None and self.is_last_reader:
            del shared[self.producer]  # with offloading, this is the last of the run's cache on the device
        return entry

    def _absorbed(self, content: Tensor, rotary: Tensor, entry: Entry, mask: Tensor | None) -> Tensor:
        """The same attention over the cache as it lies: W_UK moved to the query, W_UV to the output."""
        k_up, v_up = (effective_weight(layer).unflatten(0, (self.heads, -1)) for layer in entry.up)
        query = content @ k_up
        if entry.steps is not None:  # far fewer numbers than in the weights
            query = query * entry.steps[: query.shape[-1]].to(query.dtype)
        query = F.pad(
            query, (0, entry.first.shape[-1] - query.shape[-1])
        )  # nothing to do unless the values have their own part
        mask = boolean(mask)
        z = latent_attention(
            query,
            rotary if self.rotary else None,
            _one_head(entry.first),
            _one_head(entry.second) if self.rotary else None,
            scale=self.scaling,
            causal=mask is None,
            mask=mask,
        )
        if entry.steps is not None:
            z = z * entry.steps.to(z.dtype)
        out = z[..., -v_up.shape[-1] :] @ v_up.transpose(1, 2)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class HeadsAttention(_Attention):
    """MHA, MQA and GQA, and by sharing over layers CLA: keys and values of each head are cached."""

    def __init__(self, config: CLLAConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.head_dim)
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        if self.produces:
            width = config.num_key_value_heads * config.head_dim
            self.k_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
            self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: CLLACache | None = None,  # by its name until transformers 5.24, and from then on
        cache: CLLACache | None = None,
        *,
        shared: MutableMapping[int, Entry],
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states `(B, T, dim)` to the same, and the weights where transformers' function gives them."""
        cache, new_key = past_key_values if cache is None else cache, None
        if self.produces:
            heads = (self.config.num_key_value_heads, -1)
            new_key, value = (
                proj(hidden_states).unflatten(-1, heads).transpose(1, 2) for proj in (self.k_proj, self.v_proj)
            )
        query, new_key = rotate(self._queries(hidden_states), new_key, position_embeddings)
        if self.produces:
            shared[self.layer_idx] = Entry(*self._store(new_key, value, cache))
        key, value = (dense(x, query.dtype) for x in shared[self.producer][:2])
        if cache is not None and self.is_last_reader:
            del shared[self.producer]
        return self._attend(query, key, value, attention_mask, **kwargs)


def effective_weight(layer: nn.Module) -> Tensor:
    """The matrix W by which a linear layer multiplies, `(out, in)`, whatever adapters or quantizers it consists of.

    Of a plain layer, its weight; of another what it makes of the identity, which costs a product of its own: merge
    adapters for long decoding.
    """
    if type(layer) is nn.Linear:
        return layer.weight
    weight = layer.weight
    return layer(torch.eye(layer.in_features, dtype=weight.dtype, device=weight.device)).t()


def rotate(query: Tensor, key: Tensor | None, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotary embeddings on queries `(B, heads, T, ·)`, and on keys where this layer makes some."""
    query, rotated = apply_rotary_pos_emb(query, query[:, :1] if key is None else key, *position_embeddings)
    return query, None if key is None else rotated


def boolean(mask: Tensor | None) -> Tensor | None:
    """Transformers' mask as True = attend: bool as for SDPA, or a float one of zeros and very negative numbers."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    attend = mask == 0
    if not bool((attend | (mask <= -1e4)).all()):
        raise ValueError(
            "attention_mask: a float mask must hold 0 (attend) or the dtype's minimum, the cache's attention takes no "
            "biases"
        )
    return attend


def _one_head(x: Stored) -> Stored:
    """`(B, 1, T, ·)` as `(B, T, ·)`, packed or not."""
    return x.map(lambda part: part[:, 0]) if isinstance(x, PackedLatents) else x[:, 0]
