"""Inputs that find bugs: seeded, in every memory layout, with numbers on which all dtypes agree."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "transposed", "sliced", "expanded"]

MARGIN = 1 << 14  # elements on either side: further than one tile of any kernel reaches


def cog_inputs(
    batch: int = 2,
    heads: int = 4,
    queries: int = 17,
    keys: int | None = None,
    dim: int = 16,
    *,
    kv_heads: int | None = None,
    mask: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: Layout = "contiguous",
    seed: int = 0,
) -> dict[str, Tensor]:
    """`query`, `key`, `value` for `cog_attention`, and a random `mask` of the given shape.

    Queries and keys are multiples of 1/4 up to 4: every dtype holds them, and float32 sums their products
    exactly in any order. So the sign of every score, at which the weights jump, is the same for all who
    compute it; about one score in two hundred is exactly 0.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads

    def draw(heads: int, time: int) -> Tensor:
        return torch.randn(batch, heads, time, dim, generator=generator)

    tensors = {
        "query": _on_grid(draw(heads, queries)),
        "key": _on_grid(draw(kv_heads, keys)),
        "value": draw(kv_heads, keys),
    }
    tensors = {name: lay_out(t.to(device, dtype), layout) for name, t in tensors.items()}
    if mask is not None:
        tensors["mask"] = (torch.rand(mask, generator=generator) < 0.7).to(device)
    return tensors


def logprob_inputs(
    rows: int = 37,
    vocab: int = 101,
    dim: int = 16,
    *,
    bias: bool = False,
    ignored: float = 0.0,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: Layout = "contiguous",
    seed: int = 0,
) -> dict[str, Tensor]:
    """`hidden`, `weight`, `target` for `linear_logprob`, and `bias` if asked.

    About the fraction `ignored` of the targets is `ignore_index`.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator)
    target = torch.randint(vocab, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < ignored] = ignore_index
    # An expanded weight would make every token equally likely.
    weight_layout = "contiguous" if layout == "expanded" else layout
    tensors = {
        "hidden": lay_out(hidden.to(device, dtype), layout),
        "weight": lay_out(weight.to(device, dtype), weight_layout),
        "target": target.to(device),
    }
    if bias:
        tensors["bias"] = torch.randn(vocab, generator=generator).to(device, dtype)
    return tensors


def bit_patterns(dtype: torch.dtype, count: int | None = None, *, seed: int = 0) -> Tensor:
    """Floats with random bits: of every size, subnormal and infinite ones and NaN among them.

    Without `count`, every one of the 65,536 patterns of a 16-bit dtype, in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    if count is None:
        patterns = torch.randperm(1 << 16, generator=generator).sub(1 << 15).to(torch.int16)
    elif dtype.itemsize == 2:
        patterns = torch.randint(-(1 << 15), 1 << 15, (count,), generator=generator, dtype=torch.int16)
    else:
        patterns = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator).to(torch.int32)
    return patterns.view(dtype)


def latent_inputs(
    batch: int = 2,
    heads: int = 3,
    queries: int = 5,
    keys: int = 37,
    dim: int = 24,
    *,
    rope: int = 8,
    mask: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    latent_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    layout: Layout = "contiguous",
    seed: int = 0,
) -> dict[str, Tensor]:
    """`query_latent`, `query_rope`, `latent`, `rope` for `latent_attention`, and a random `mask` of that shape.

    With `rope=0` there is no rotary part. The latents, in `latent_dtype` if that is another, have columns of
    different sizes, as those of a trained model do.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = {"latent": dim} | ({"rope": rope} if rope else {})
    tensors = {}
    for name, width in widths.items():
        query = torch.randn(batch, heads, queries, width, generator=generator)
        tensors[f"query_{name}"] = lay_out(query.to(device, dtype), layout)
    for name, width in widths.items():
        vectors = torch.randn(batch, keys, width, generator=generator)
        vectors *= torch.randn(width, generator=generator).div(2).exp()
        tensors[name] = lay_out(vectors.to(device, latent_dtype or dtype), layout)
    if mask is not None:
        tensors["mask"] = (torch.rand(mask, generator=generator) < 0.7).to(device)
    return tensors


def grouped_inputs(
    sizes: Sequence[int] = (5, 0, 17, 1),
    dim: int = 24,
    out: int = 16,
    *,
    rest: int = 0,
    linear: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: Layout = "contiguous",
    seed: int = 0,
) -> dict[str, Tensor]:
    """`x`, `weight`, `offsets` for `grouped_matmul`, groups of the given sizes and `rest` rows after them.

    `linear`: the weights lie in memory as `(E, out, dim)`, as those of `torch.nn.Linear`.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes) + rest, dim, generator=generator)
    weight = torch.randn(len(sizes), dim, out, generator=generator) / dim**0.5
    if linear:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return {
        "x": lay_out(x.to(device, dtype), layout),
        "weight": weight.to(device, dtype) if linear else lay_out(weight.to(device, dtype), layout),
        "offsets": offsets.to(device),
    }


def swiglu_inputs(
    sizes: Sequence[int] = (5, 0, 17, 1),
    dim: int = 24,
    inner: int = 20,
    out: int = 16,
    *,
    rest: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: Layout = "contiguous",
    seed: int = 0,
) -> dict[str, Tensor]:
    """`x`, `gate_up`, `down`, `offsets` for `grouped_swiglu`, groups of the given sizes and `rest` rows after them."""
    options = {"dtype": dtype, "device": device, "layout": layout}
    first = grouped_inputs(sizes, dim, 2 * inner, rest=rest, seed=seed, **options)
    second = grouped_inputs(sizes, inner, out, seed=seed + 1, **options)
    up, down = (lay_out(inputs["weight"].transpose(1, 2), layout) for inputs in (first, second))
    return {"x": first["x"], "gate_up": up, "down": down, "offsets": first["offsets"]}


def routing_logits(
    tokens: int = 37,
    experts: int = 8,
    *,
    skew: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: Layout = "contiguous",
    seed: int = 0,
) -> Tensor:
    """Logits for `route_tokens`, in which the first expert is ahead of the last by `skew` on average."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) + skew * torch.linspace(1, 0, experts)
    return lay_out(logits.to(device, dtype), layout)


def lay_out(tensor: Tensor, layout: Layout) -> Tensor:
    """`tensor` with other strides.

    `transposed`: the third last dimension inside the second last, as attention heads come out of a projection
    (of a matrix: by columns). `sliced`: every other element of a larger tensor, from the second on.
    `expanded`: the first dimension longer than 1 gets stride 0, its first entry repeated: the only layout
    that changes values.
    """
    match layout:
        case "contiguous":
            return tensor.contiguous()
        case "transposed":
            a, b = (-3, -2) if tensor.dim() > 2 else (-2, -1)
            return tensor.transpose(a, b).contiguous().transpose(a, b)
        case "sliced":
            larger = tensor.new_zeros(*(n + 1 for n in tensor.shape[:-1]), 2 * tensor.shape[-1] + 1)
            return larger[(*(slice(1, None) for _ in tensor.shape[:-1]), slice(1, None, 2))].copy_(tensor)
        case "expanded":
            long = next((i for i, n in enumerate(tensor.shape) if n > 1), None)
            return tensor if long is None else tensor.narrow(long, 0, 1).expand_as(tensor)
    raise ValueError(f"layout: unknown {layout!r}; accepted: contiguous, transposed, sliced, expanded")


def with_margin(tensor: Tensor) -> Tensor:
    """The same values and strides inside an allocation that holds NaN everywhere else.

    So a read outside the tensor, or in the gaps of a sliced one, shows in the result. Integers get their
    largest value instead, bools True.
    """
    kind = tensor.dtype
    filling = torch.nan if kind.is_floating_point else True if kind == torch.bool else torch.iinfo(kind).max
    spans = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    extent = sum(spans) + 1 if tensor.numel() else 0
    room = torch.full((extent + 2 * MARGIN,), filling, dtype=kind, device=tensor.device)
    inside = room.as_strided(tensor.shape, tensor.stride(), MARGIN)
    # An expanded tensor's own elements overlap: write each place once.
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    inside[once].copy_(tensor[once])
    return inside


def _on_grid(x: Tensor) -> Tensor:
    return x.mul(4).round().clamp(-16, 16).div(4)
