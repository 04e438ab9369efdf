"""What a token costs in training: the matrix products of a model, counted from its configuration."""

from typing import NamedTuple

from ..model.config import HunyuanLargeConfig


class Flops(NamedTuple):
    """Floating-point operations per token, forward and backward, by where they are spent."""

    projections: int  # queries, keys, values, output
    attention: int  # queries times keys, weights times values
    router: int
    experts: int  # specialized and shared
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def flops_per_token(config: HunyuanLargeConfig, length: int) -> Flops:
    """Count the operations of training on one token of a sequence of `length`: C is their total times D.

    A multiply-add is two operations; each product of the forward pass costs twice itself in the backward pass.
    Counted are the products alone: projections (of keys and values only in the layers that make them), the whole
    square of attention, as torch's `FlopCounterMode` and the usual MFU count it (a causal kernel does about half of
    it), the router, each token's `moe_topk` specialized experts and the shared ones, and the head, tied or not. Norms,
    rotations, softmax, looking up embeddings and a second forward pass for activation checkpointing are not. A
    dropped token counts as if it had its expert.

    This is 6 for each activated parameter that multiplies something, and the context. The paper's 9.59·N + 2.3e8,
    which it does not derive, is another count.

    Args:
        config: whose model is counted; nothing is built.
        length: T, tokens of a training sequence.

    Example:
        >>> config = HunyuanLargeConfig()
        >>> flops_per_token(config, 4096).total / count_parameters(config).activated
        6.39...
    """
    if length < 1:
        raise ValueError(f"length: must be at least 1, got {length}")
    dim, layers, experts = config.hidden_size, config.num_hidden_layers, config.num_experts
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    makes_keys = config.kv_sharing_modes.count(None)
    used = config.moe_topk + config.num_shared_expert
    multiply_adds = Flops(
        projections=2 * dim * (layers * queries + makes_keys * keys),
        attention=layers * 2 * queries * length,
        router=layers * dim * experts,
        experts=layers * used * 3 * dim * config.intermediate_size,
        head=dim * config.vocab_size,
    )
    return Flops(*(2 * 3 * n for n in multiply_adds))
