"""The grouped products in transformers' own MoE models: `register_experts()`, `experts_implementation="tenfold"`."""

import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from tenfold.kernels import Routing, expert_swiglu, grouped_matmul, permute_tokens, unpermute_tokens


def register_experts(name: str = "tenfold") -> None:
    """Add the grouped products to transformers under `name`, for every model that takes `experts_implementation`.

    The models' own routers go on choosing: nothing is recycled or dropped. From then on a mixture of experts that does
    not go through transformers' experts functions (Llama 4, JetMoE, DBRX, Switch, NLLB) refuses the name with a
    ValueError, where transformers would go on as before without a word.

    Example:
        >>> register_experts()
        >>> model = MixtralForCausalLM.from_pretrained(folder, experts_implementation="tenfold")
    """
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    check = PreTrainedModel.get_correct_experts_implementation
    if not hasattr(check, "__wrapped__"):
        PreTrainedModel.get_correct_experts_implementation = _refusing(check)


def _refusing(check):
    @functools.wraps(check)
    def checked(self: PreTrainedModel, requested: str | None) -> str:
        name = check(self, requested)
        if ALL_EXPERTS_FUNCTIONS.get(name) is experts_forward and not self._can_set_experts_implementation():
            settings = self.config.to_dict()
            names = " ".join([*settings, *(settings.get("ffn_config") or ())])
            if "expert" in names:  # else it has none, such as the vision tower of a larger model
                raise ValueError(
                    f"experts_implementation: {type(self).__name__} does not go through transformers' experts "
                    f"functions, so {name!r} would do nothing"
                )
        return name

    return checked


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Transformers' experts function: tokens `(T, dim)`, their experts and weights `(T, k)`, to `(T, dim)`.

    Experts from `num_experts` on are those of other processes (expert parallelism): they add nothing here.
    """
    routing = chosen_routing(top_k_index, top_k_weights, self.num_experts)
    if _is_swiglu(self):
        weights = self.gate_up_proj, self.down_proj
        gate_up, down = (weight.transpose(1, 2) if self.is_transposed else weight for weight in weights)
        return expert_swiglu(hidden_states.to(down.dtype), gate_up, down, routing).to(hidden_states.dtype)
    rows, _ = permute_tokens(hidden_states, routing)
    rows = _feed_forward(self, rows, routing, top_k_index)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return unpermute_tokens(rows, routing).to(hidden_states.dtype)


def _is_swiglu(experts: nn.Module) -> bool:
    """Whether these experts are what `expert_swiglu` computes: SwiGLU without biases or a norm after it."""
    return (
        experts.has_gate
        and not experts.has_post_expert_norm
        and experts.is_concatenated
        and not experts.has_bias
        and type(experts)._apply_gate is _default_apply_gate
        and isinstance(experts.act_fn, nn.SiLU | SiLUActivation)
    )


def _feed_forward(self: nn.Module, rows: Tensor, routing: Routing, top_k_index: Tensor) -> Tensor:
    """Any other experts, in two grouped products."""
    expert = None
    if self.has_bias:
        expert = rows.new_empty(len(rows), dtype=torch.int64)
        expert[routing.row.flatten()] = top_k_index.flatten().clamp(max=self.num_experts - 1)

    def multiply(x: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)
        x = grouped_matmul(
            x.to(weight.dtype), weight if self.is_transposed else weight.transpose(1, 2), routing.offsets
        )
        return x if expert is None else x + getattr(self, f"{name}_bias")[expert]

    if self.has_gate:
        rows = self._apply_gate(multiply(rows, "gate_up_proj"))
    else:
        rows = self.act_fn(multiply(rows, "up_proj"))
    return multiply(rows, "down_proj")


def chosen_routing(expert: Tensor, weight: Tensor, experts: int) -> Routing:
    """The `Routing` of a choice that somebody else made, for `expert_swiglu` or the ops that it consists of.

    Args:
        expert: `(T, k)`; from `experts` on they count as dropped.
        weight: `(T, k)`, as it shall be applied.
        experts: how many there are.
    """
    places = torch.arange(expert.numel(), device=expert.device)
    grouped, order = expert.flatten().sort(stable=True)
    row = torch.empty_like(order).scatter_(0, order, places).view_as(expert)
    offsets = torch.searchsorted(grouped, torch.arange(experts + 1, device=expert.device))
    dropped = expert >= experts
    return Routing(
        expert=expert.masked_fill(dropped, -1),
        weight=weight,
        slot=(row - offsets[expert.clamp(max=experts)]).masked_fill(dropped, -1),
        load=offsets.diff(),
        recycled=torch.zeros_like(dropped),
        dropped=dropped,
        balance_loss=weight.new_zeros(()),
        row=row,
        offsets=offsets,
    )
