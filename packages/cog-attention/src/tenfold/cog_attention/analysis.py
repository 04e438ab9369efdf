"""The paper's measurements on a trained model: collapse, weight signs, what heads do to tokens, attention sinks."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

PROMPTS = {  # the two probes of the paper's code: a question, and a digit that may differ before n ones
    "find_a_zero": "Is there a zero in the following sequences?",
    "count_ones": "How many ones are in the following sequences?",
}


def attention_maps(model: PreTrainedModel, tokens: Int[Tensor, "batch time"]) -> list[Tensor]:
    """The attention weights of each layer, `(batch, heads, time, time)`, signed in layers with Cog attention."""
    implementation = model.config._attn_implementation
    try:
        if implementation != "cog":  # transformers' fused softmax keeps its weights to itself
            model.set_attn_implementation("eager")
        with torch.no_grad():
            return list(model(tokens, output_attentions=True, use_cache=False).attentions)
    finally:
        model.set_attn_implementation(implementation)


class WeightStatistics(NamedTuple):
    """Means over heads and query rows (but the first row, which has one key), per layer: `(layers,)` each."""

    negative: Tensor  # Σ_j |w_ij| over the negative weights
    row_sum: Tensor  # Σ_j w_ij
    row_sum_std: Tensor  # its standard deviation over rows and heads
    sink: Tensor  # |w_i0|: what goes to the first token


def weight_statistics(maps: list[Tensor]) -> WeightStatistics:
    """Signs, row sums and the attention sink of each layer's map, as `attention_maps` gives them.

    Softmax has `negative` 0 and `row_sum` 1 in every row. Uniform attention would give a sink of (H_T − 1)/(T − 1),
    H_T being the T-th harmonic number; a value far above that is a sink.
    """
    rows = [w[:, :, 1:] for w in maps]
    sums = [w.sum(-1) for w in rows]
    return WeightStatistics(
        negative=torch.stack([-w.clamp(max=0).sum(-1).mean() for w in rows]),
        row_sum=torch.stack([s.mean() for s in sums]),
        row_sum_std=torch.stack([s.std() for s in sums]),
        sink=torch.stack([w[..., 0].abs().mean() for w in rows]),
    )


class HeadOperations(NamedTuple):
    """What each head does to the tokens it sees, shares of its query-key pairs; `(layers, heads)` each."""

    copy: Tensor  # positive weight, at least the uniform share
    delete: Tensor  # negative weight, at least the uniform share
    retain: Tensor  # a weight below it: the token is left alone
    balance: Tensor  # min(copy, delete)/max(copy, delete): 1 copies as much as it deletes, 0 does one thing only


def head_operations(maps: list[Tensor]) -> HeadOperations:
    """Sort each head's weights into copying, deleting and retaining tokens, by their sign and size.

    The paper calls a positive weight a copy, a negative one a deletion, and a minimal one retention; that
    "minimal" means less than the row's uniform share 1/(number of keys) is this function's own choice.
    """
    copies, deletes = [], []
    for w in maps:
        T = w.shape[-1]
        keys = torch.arange(1, T + 1, device=w.device, dtype=w.dtype)
        pairs = torch.ones(T, T, device=w.device, dtype=torch.bool).tril()
        share = (1 / keys)[:, None]
        copies.append(((w >= share) & pairs).sum((0, 2, 3)) / (len(w) * pairs.sum()))
        deletes.append(((w <= -share) & pairs).sum((0, 2, 3)) / (len(w) * pairs.sum()))
    copy, delete = torch.stack(copies), torch.stack(deletes)
    balance = torch.minimum(copy, delete) / torch.maximum(copy, delete).clamp(min=1e-12)
    return HeadOperations(copy, delete, 1 - copy - delete, balance)


@torch.no_grad()
def ov_direction(model: PreTrainedModel, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "layers heads"]:
    """How much a head's value-output matrix points a token back at itself: the mean cosine, −1 to 1.

    For every token t at a layer's input x: cos(W_O W_V norm(x), u_t − mean u), u_t being t's row of the output
    embedding. A head whose weights carry the sign can leave this near 0 or change it freely; a softmax head
    deletes only where it is negative. The final norm is left out, as usual in direct logit attribution.
    """
    states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    unembed = model.get_output_embeddings().weight
    target = unembed[tokens] - unembed.mean(0)
    cosines = []
    for layer, x in zip(model.base_model.layers, states, strict=False):
        attention = layer.self_attn
        head_dim = attention.head_dim
        groups = attention.num_key_value_groups
        values = attention.v_proj(layer.input_layernorm(x)).unflatten(-1, (-1, head_dim))
        values = values.repeat_interleave(groups, dim=2)  # (B, T, heads, head_dim)
        out = attention.o_proj.weight.unflatten(1, (-1, head_dim))  # (dim, heads, head_dim)
        writes = torch.einsum("bthd,mhd->bthm", values, out)
        cosines.append(torch.cosine_similarity(writes, target[:, :, None], dim=-1).mean((0, 1)))
    return torch.stack(cosines)


@torch.no_grad()
def representation_gap(
    model: PreTrainedModel, first: Int[Tensor, " time"], second: Int[Tensor, " time2"], chunk: int
) -> float:
    """How far apart the model keeps two prompts that differ little: the paper's measure of collapse.

    d = h(first) − h(second), h being the last position's state after the final norm; d is cut into pieces of
    `chunk` (the head dimension, though they are slices of the residual stream and not heads) and the result is
    the mean over pieces of max |d|. The paper plots it divided by its value at the shortest length; read both,
    the level is half of the story.
    """
    states = [model.base_model(x[None], use_cache=False).last_hidden_state[0, -1] for x in (first, second)]
    return (states[0] - states[1]).unflatten(0, (-1, chunk)).abs().amax(-1).mean().item()


def collapse_prompts(
    probe: str, n: int, question: list[int], zero: int, one: int
) -> tuple[Int[Tensor, " time"], Int[Tensor, " time2"]]:
    """The paper's pair of prompts, `n` ones long, as token ids.

    Args:
        probe: `find_a_zero` ("0" + ones against "1" + ones) or `count_ones` (n + 1 ones against n).
        n: how many ones.
        question: the tokens of `PROMPTS[probe]`.
        zero: the token of "0".
        one: the token of "1".
    """
    if probe not in PROMPTS:
        raise ValueError(f"probe: unknown {probe!r}; accepted: {', '.join(PROMPTS)}")
    ones = [one] * n
    pair = {"find_a_zero": ([zero, *ones], [one, *ones]), "count_ones": ([*ones, one], ones)}[probe]
    return tuple(torch.tensor(question + digits) for digits in pair)


def path_mass(maps: list[Tensor], early: int = 8) -> tuple[float, float]:
    """L1 mass that reaches the last position along all attention paths, in all and from the `early` first tokens.

    The last row of Π_l (A_l + I)/2, averaged over heads in each A_l and over the batch. For softmax the rows of
    the product sum to 1 and their mass gathers on early tokens (over-squashing); signed weights cancel.
    """
    paths = None
    for w in maps:
        mean = w.mean(1)
        step = (mean + torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype)) / 2
        paths = step if paths is None else step @ paths
    last = paths[:, -1].abs()
    return last.sum(-1).mean().item(), last[:, :early].sum(-1).mean().item()
