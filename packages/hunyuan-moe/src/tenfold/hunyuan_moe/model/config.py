"""The configuration of a Hunyuan-Large model, in the released checkpoint's own words."""

from typing import Any

from transformers import HunYuanMoEV1Config

ROUTINGS = ("recycle", "drop", "dropless")


class HunyuanLargeConfig(HunYuanMoEV1Config):
    """Hunyuan-Large (arXiv 2411.02265); the defaults are the released Pretrain model's.

    It reads the config.json of the released checkpoints as it is. Two arguments have no counterpart there:
    `routing`, since the released code never limits the experts, and `router_aux_loss_coef`, since it computes
    the balance loss and throws it away.

    Args:
        num_experts: specialized experts of a layer.
        moe_topk: of them, those that a token uses.
        num_shared_expert: experts that every token uses; one of the width of so many is built. 0 for none.
        routing: what training does with tokens beyond an expert's capacity: `recycle` sends them to random experts
            with room, `drop` leaves them to the shared expert, `dropless` has no capacity. Evaluation is always
            dropless, so that a sequence does not depend on its neighbours.
        capacity_factor: an expert's capacity in units of the mean load, tokens · moe_topk / num_experts.
        router_aux_loss_coef: weight of the balance loss in training; the paper does not give its own.
        use_cla: whether runs of `cla_share_factor` layers share keys and values; the first of a run makes them.
        cla_share_factor: layers per run.
        use_qk_norm: whether queries and keys are normalized, per head and after the rotation.
        rope_parameters: `{"rope_type": "dynamic", "alpha": α, "factor": 1.0}` is a fixed base of
            rope_theta · α^(d/(d-2)), as in the released models; `rope_theta` and `rope_scaling` are understood too.
        kwargs: HunYuanMoEV1Config's: sizes, tokens, norms.

    Raises:
        ValueError: a value that is not accepted, or sizes that do not go together.
    """

    model_type = "hunyuan"
    base_model_tp_plan: Any = None
    base_model_ep_plan: Any = None

    vocab_size: int = 128512
    hidden_size: int = 6400
    intermediate_size: int = 18304
    num_hidden_layers: int = 64
    num_attention_heads: int = 80
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 262144
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    num_experts: int = 16
    moe_topk: int | list[int] = 1
    num_shared_expert: int | list[int] = 1
    use_mixed_mlp_moe: bool = True
    routing: str = "recycle"
    capacity_factor: float = 1.0
    router_aux_loss_coef: float = 0.01
    use_cla: bool = True
    cla_share_factor: int = 2
    use_qk_norm: bool = True

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None and not {"rope_theta", "rope_scaling"} & kwargs.keys():
            self.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "alpha": 100_000.0, "factor": 1.0}
        self.moe_topk = _one("moe_topk", self.moe_topk)
        self.num_shared_expert = _one("num_shared_expert", self.num_shared_expert)
        if not self.use_mixed_mlp_moe:  # the released name for having shared experts
            self.num_shared_expert = 0
        if self.head_dim is None:
            self.head_dim = kwargs.get("attention_head_dim") or self.hidden_size // self.num_attention_heads
        self.ignore_keys_at_rope_validation = {"alpha"}
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name in ("num_hidden_layers", "num_experts", "moe_topk", "cla_share_factor", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.num_shared_expert < 0:
            raise ValueError(f"num_shared_expert: must not be negative, got {self.num_shared_expert}")
        if self.moe_topk > self.num_experts:
            raise ValueError(f"moe_topk: {self.moe_topk} is more than the {self.num_experts} experts")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} do not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: must be even, the rotation turns pairs; got {self.head_dim}")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act: the experts are SwiGLU, 'silu'; got {self.hidden_act!r}")
        if self.router_aux_loss_coef < 0:
            raise ValueError(f"router_aux_loss_coef: must not be negative, got {self.router_aux_loss_coef}")
        check_routing(self.routing, self.capacity_factor)

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """For each layer, whether it reads the keys and values of an earlier one: transformers' caches ask."""
        run = self.cla_share_factor if self.use_cla else 1
        return ["reuse" if layer % run else None for layer in range(self.num_hidden_layers)]


def check_routing(routing: str, capacity_factor: float) -> None:
    """Raise ValueError for an unknown routing, or a capacity in which it cannot work."""
    if routing not in ROUTINGS:
        raise ValueError(f"routing: must be one of {', '.join(map(repr, ROUTINGS))}, got {routing!r}")
    least = 1.0 if routing == "recycle" else 0.0
    if not (capacity_factor >= least and capacity_factor > 0):
        accepted = "at least 1, recycling needs a place for every token" if routing == "recycle" else "positive"
        raise ValueError(f"capacity_factor: must be {accepted}; got {capacity_factor}")


def _one(name: str, value: int | list[int]) -> int:
    """A number that the released configurations may give once per layer."""
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise ValueError(f"{name}: must be the same in all layers, got {value}")
    return values.pop()
