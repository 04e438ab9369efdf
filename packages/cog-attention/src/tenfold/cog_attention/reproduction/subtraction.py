"""The indirect-object step in isolation: one attention head that must copy one token and delete another.

To name the indirect object ("When Mary and John went to the store, John gave a drink to" → Mary) a model has to
copy one name and remove the other. Here the tokens are vectors v_j with a role mark each: one marked +, one
marked −, the others unmarked; the answer is v₊ − v₋.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.kernels import cog_attention

ROLES = 3  # +, −, unmarked


class Subtractor(nn.Module):
    """Attention heads over marked tokens: queries and keys read the marks, values the vectors.

    Args:
        dim: of the token vectors.
        heads: each with its own keys and its own full value-output matrix, so the number of heads is all that
            limits the model.
        attention: `cog` or `softmax`.
    """

    def __init__(self, dim: int, heads: int, attention: Literal["cog", "softmax"]):
        super().__init__()
        self.attend = cog_attention if attention == "cog" else F.scaled_dot_product_attention
        self.query = nn.Parameter(torch.randn(heads, 1, 8))
        self.key = nn.Parameter(torch.randn(heads, ROLES, 8))
        self.output = nn.Parameter(torch.randn(heads, dim, dim) / dim**0.5)

    def forward(
        self, vectors: Float[Tensor, "batch time dim"], roles: Float[Tensor, "batch time roles"]
    ) -> Float[Tensor, "batch dim"]:
        """The heads' summed output at a query position of its own."""
        B, heads = len(vectors), len(self.query)
        keys = roles[:, None] @ self.key  # (B, heads, T, 8)
        values = vectors[:, None].expand(B, heads, *vectors.shape[1:])
        queries, width = self.query.expand(B, heads, 1, 8), vectors.shape[-1]
        # Values wider than keys: pad the keys, for ops that want one head dimension.
        keys, queries = F.pad(keys, (0, width - 8)), F.pad(queries, (0, width - 8))
        mixed = self.attend(queries, keys, values, scale=8**-0.5)[:, :, 0]
        return torch.einsum("bhd,hde->be", mixed, self.output)


def subtraction_error(
    *, attention: Literal["cog", "softmax"], heads: int, seed: int, steps: int = 500, dim: int = 16, time: int = 8
) -> float:
    """Train a `Subtractor` and return its test error E‖o − (v₊ − v₋)‖² / E‖v₊ − v₋‖².

    0 is perfect and 1 is what answering zero costs. One softmax head cannot get below ½: its weights are all
    positive, so the best it can do is to copy v₊ and leave v₋ be, or the reverse.
    """
    torch.manual_seed(seed)
    model = Subtractor(dim, heads, attention)
    # At a rate of 0.03 two softmax heads often stay at one head's optimum.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        vectors, roles, target = _tokens(256, time, dim)
        loss = F.mse_loss(model(vectors, roles), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    vectors, roles, target = _tokens(8192, time, dim)
    with torch.no_grad():
        return (F.mse_loss(model(vectors, roles), target) / target.square().mean()).item()


def _tokens(batch: int, time: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    vectors = torch.randn(batch, time, dim)
    marked = torch.rand(batch, time).topk(2).indices  # where + and − are
    role = torch.full((batch, time), 2).scatter_(1, marked, torch.tensor([[0, 1]]).expand(batch, 2))
    rows = torch.arange(batch)
    return vectors, F.one_hot(role, ROLES).float(), vectors[rows, marked[:, 0]] - vectors[rows, marked[:, 1]]
