"""What a cache costs: bytes per token by formula, ratios to MHA, and the tokens that fit into a memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import CLLAConfig
from .formats import BITS
from .ladder import RUNGS, rung

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cost:
    """One rung's cache."""

    name: str
    bits: int
    bytes_per_token: int
    ratio: float  # to MHA in 16 bits

    def tokens(self, memory: float) -> int:
        """That fit into `memory` bytes, of one sequence or of all together."""
        return int(memory // self.bytes_per_token)


def bytes_per_token(config: CLLAConfig, *, element_size: int = 2, scales: bool = True) -> int:
    """Bytes that a CLLACache takes for one more token, over all layers; slack of its buffers left out.

    With L layers in ⌈L/s⌉ runs, widths d_c and d_r in q bits, and one float16 scale per group of g numbers:

        heads   ⌈L/s⌉ · 2 · n_kv · (d_h·q/8 + 2·⌈d_h/g⌉)
        latent  ⌈L/s⌉ · (d_c·q_c/8 + 2·⌈d_c/g⌉ + d_r·q_r/8 + 2·⌈d_r/g⌉)

    and `element_size` bytes a number, without scales, in 16 bits. Asymmetric codes have an offset beside each scale,
    4 bytes for 2; with scales per channel those of the latent, 2·⌈d_c/g⌉, are not there.

    Args:
        config: of the model.
        element_size: bytes of the model's dtype, 2 for bfloat16.
        scales: whether they count; False is for comparing with figures that leave them out.
    """
    formats = [f for layer in range(config.num_hidden_layers) for f in config.cache_formats(layer)]
    if scales:
        return sum(f.bytes(element_size) for f in formats)
    return sum(f.heads * (f.width * element_size if f.bits == 16 else -(-f.width * f.bits // 8)) for f in formats)


def ladder_costs(base: CLLAConfig, *, kv_heads: int | None = None) -> list[Cost]:
    """Every rung in 16, 8 and 4 bits, the rotary key in as many; MHA in 16 bits first."""
    costs = []
    for name in RUNGS:
        for bits in sorted(BITS, reverse=True):
            size = bytes_per_token(rung(base, name, kv_heads=kv_heads, cache_bits=bits, rope_bits=None))
            costs.append(Cost(name, bits, size, size / (costs[0].bytes_per_token if costs else size)))
    return costs


def cost_figure(costs: list[Cost]) -> "Figure":
    """Bytes per token of every rung, a bar for each number of bits, on a logarithmic axis."""
    from tenfold.core.claims.figures import bars

    series = {f"{bits} bits": [[c.bytes_per_token for c in costs if c.bits == bits]] for bits in (16, 8, 4)}
    figure = bars(RUNGS, series, ylabel="cache bytes per token")
    figure.axes[0].set_yscale("log")
    return figure
