"""`MoELayer`: a shared expert beside specialized ones, with recycle routing, as an `nn.Module` that needs torch alone.

    y_t = FFN_shared(x_t) + Σ_e w_t,e · FFN_e(x_t)      e: the expert that token t uses, by default one

(arXiv 2411.02265, section 2.2.2). Which expert, and with what weight, is `tenfold.kernels.route_tokens`' to say: the
one that the router prefers, or, in training, where that one is full, another with room.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.kernels import Routing, expert_swiglu, route_tokens

from .model.config import check_routing


class RoutingStatistics(NamedTuple):
    """What the router did in the last forward pass; tensors, so that no device is waited for."""

    load: Tensor  # (experts,) tokens of each expert
    recycled: Tensor  # share of the assignments that went elsewhere than the router wanted
    dropped: Tensor  # share of the assignments that no expert took


class RecycleRouter(nn.Module):
    """Sends tokens to experts by a linear layer in float32, which stays so where a model is cast to half precision.

    In training, under a capacity of ⌈capacity_factor · T · top_k / experts⌉ for the T tokens of a call; in evaluation
    without one, so that a token's expert depends on that token alone.

    Args:
        dim: width of the tokens.
        experts: to choose from.
        top_k: experts per token.
        routing: `recycle`, `drop` or `dropless`, for training.
        capacity_factor: at least 1 for `recycle`.

    Raises:
        ValueError: no experts, `top_k` beyond them, or a routing or capacity that cannot work.
    """

    def __init__(
        self, dim: int, experts: int, *, top_k: int = 1, routing: str = "recycle", capacity_factor: float = 1.0
    ):
        super().__init__()
        check_routing(routing, capacity_factor)
        if experts < 1:
            raise ValueError(f"experts: must be at least 1, got {experts}")
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: must be from 1 to the {experts} experts, got {top_k}")
        self.experts, self.top_k = experts, top_k
        self.routing, self.capacity_factor = routing, capacity_factor
        self.wg = nn.Linear(dim, experts, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Logits `(T, experts)` of tokens `(T, dim)`, and where they go."""
        with torch.autocast(x.device.type, enabled=False):  # half precision moves tokens to other experts
            logits = self.wg(x.to(self.wg.weight.dtype))
        return logits, route_tokens(
            logits, self.top_k, self.capacity(len(x)) if self.training else None, recycle=self.routing == "recycle"
        )

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        def apply(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if out.is_floating_point() and out.dtype.itemsize < 4:
                return tensor.to(out.device, torch.promote_types(tensor.dtype, torch.float32))
            return out

        return super()._apply(apply, recurse)

    def capacity(self, tokens: int) -> int | None:
        """Most tokens of an expert in a training step of so many; None without a limit."""
        if self.routing == "dropless":
            return None
        return max(1, math.ceil(self.capacity_factor * tokens * self.top_k / self.experts))

    def extra_repr(self) -> str:
        """What is not in the weights' shapes, for `print(model)`."""
        return f"top_k={self.top_k}, routing={self.routing!r}, capacity_factor={self.capacity_factor}"


class Experts(nn.Module):
    """SwiGLU feed-forwards of one size, computed together; the weights lie as in transformers.

    Args:
        dim: width of the tokens.
        ffn: inner width.
        experts: how many.
    """

    def __init__(self, dim: int, ffn: int, experts: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * ffn, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, ffn))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution."""
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Tokens `(T, dim)` through the experts that `routing` names, weighted and added up."""
        return expert_swiglu(x, self.gate_up_proj, self.down_proj, routing)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        experts, dim, ffn = self.down_proj.shape
        return f"experts={experts}, dim={dim}, ffn={ffn}"


class SwiGLU(nn.Module):
    """The shared expert: `down(silu(gate(x)) · up(x))`."""

    def __init__(self, dim: int, ffn: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn, bias=False)
        self.up_proj = nn.Linear(dim, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoELayer(nn.Module):
    """Shared and specialized experts with recycle routing, in place of a feed-forward layer.

    Args:
        dim: width of the tokens.
        ffn: inner width of an expert.
        experts: specialized ones.
        top_k: of them, those that a token uses.
        shared_experts: those that every token uses: one feed-forward as wide as so many; 0 for none.
        routing: `recycle`, `drop` or `dropless`, for training; evaluation is dropless.
        capacity_factor: an expert's capacity in units of the mean load.

    Example:
        >>> layer = MoELayer(dim=512, ffn=1024, experts=16)
        >>> y, routing = layer(x)  # (batch, time, 512)
        >>> loss = task_loss(y) + 0.01 * routing.balance_loss
        >>> layer.statistics.load, layer.statistics.recycled
    """

    def __init__(
        self,
        dim: int,
        ffn: int,
        experts: int,
        *,
        top_k: int = 1,
        shared_experts: int = 1,
        routing: str = "recycle",
        capacity_factor: float = 1.0,
    ):
        super().__init__()
        for name, value, least in (("dim", dim, 1), ("ffn", ffn, 1), ("shared_experts", shared_experts, 0)):
            if value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value}")
        self.gate = RecycleRouter(dim, experts, top_k=top_k, routing=routing, capacity_factor=capacity_factor)
        self.experts = Experts(dim, ffn, experts)
        self.shared_mlp = SwiGLU(dim, ffn * shared_experts) if shared_experts else None
        self.statistics: RoutingStatistics | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Tokens `(..., dim)` to the same, and where they went: `routing.balance_loss` is to be added to the loss."""
        tokens = x.flatten(0, -2)
        _, routing = self.gate(tokens)
        # Of the last pass alone: activation checkpointing, which computes a pass twice, counts nothing twice.
        recycled, dropped = (x.float().mean().nan_to_num() for x in (routing.recycled, routing.dropped))  # of none, 0
        self.statistics = RoutingStatistics(routing.load, recycled, dropped)
        y = self.experts(tokens, routing).view_as(x)
        return (y if self.shared_mlp is None else y + self.shared_mlp(x)), routing
