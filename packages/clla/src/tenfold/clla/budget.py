"""What a cache costs: bytes per token by formula, ratios to MHA, and the tokens that fit into a memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table

from tenfold.core.errors import UserError, unknown
from tenfold.core.files import write_whole
from tenfold.core.methods import configs

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


def budget(config: str = "paper", memory: float = 80.0, kv_heads: int | None = None, plot: Path | None = None) -> None:
    """What the cache of every rung costs: bytes per token, share of MHA's, tokens that fit.

    The rotary key is counted in as many bits as the latent; the title has the bytes of the config as it is.

    Args:
        config: a shipped config, a YAML file of the same form, or a folder that `save_pretrained` wrote.
        memory: in GB of 10⁹ bytes, all of it for the cache.
        kv_heads: key and value heads of GQA and CLA.
        plot: an SVG file to write the figure to.
    """
    if memory <= 0:
        raise UserError(f"memory: must be positive, got {memory}")
    base = load_config(config)
    costs = ladder_costs(base, kv_heads=kv_heads)
    title = (
        f"{base.num_hidden_layers} layers of {base.num_attention_heads} heads of {base.head_dim}, latent "
        f"{base.latent_dim}, rotary key {base.rope_dim}, {base.share_factor} layers a cache, "
        f"{base.cache_code} codes, scales per {base.cache_scales}; rotary key in the latent's bits. As configured, "
        f"cache_bits {base.cache_bits} and rope_bits {base.rope_bits or base.cache_bits}: "
        f"{bytes_per_token(base):,} bytes"
    )
    table = Table(
        "rung", "bits", "bytes per token", "of MHA", f"tokens in {memory:g} GB", "", title=title, title_justify="left"
    )
    for column in table.columns[1:5]:
        column.justify = "right"
    for cost in costs:
        bar = "█" * max(1, round(12 * cost.ratio))
        tokens = f"{cost.tokens(memory * 1e9):,}"
        row = (cost.name, str(cost.bits), f"{cost.bytes_per_token:,}", f"{100 * cost.ratio:.2f} %", tokens, bar)
        table.add_row(*row, end_section=cost.bits == 4)
    Console().print(table)
    if plot is not None:
        from tenfold.core.claims.figures import svg

        with write_whole(plot) as file:
            file.write_text(svg(cost_figure(costs), prefix="budget"), encoding="utf-8")


def cost_figure(costs: list[Cost]) -> "Figure":
    """Bytes per token of every rung, a bar for each number of bits, on a logarithmic axis."""
    from tenfold.core.claims.figures import bars

    series = {f"{bits} bits": [[c.bytes_per_token for c in costs if c.bits == bits]] for bits in (16, 8, 4)}
    figure = bars(RUNGS, series, ylabel="cache bytes per token")
    figure.axes[0].set_yscale("log")
    return figure


def load_config(name: str) -> CLLAConfig:
    """The CLLAConfig of a shipped or own YAML config, or of a saved model.

    Raises:
        UserError: there is none, or it is not one.
    """
    from .module import CLLAModule

    path = Path(name)
    if (path / "config.json").is_file():
        try:
            kind = CLLAConfig.get_config_dict(path)[0].get("model_type")
            if kind != CLLAConfig.model_type:
                raise ValueError(f"config.json is not that of a CLLA model, its model_type is {kind!r}")
            return CLLAConfig.from_pretrained(path)
        except (ValueError, OSError, StrictDataclassError) as error:
            raise UserError(f"config {name}: {' '.join(str(error).split())}") from error
    shipped = configs("tenfold.clla")
    if name not in shipped and not path.is_file():
        raise UserError(f"config: {unknown('name', name, shipped)} (or a YAML file, or a folder with a config.json)")
    try:
        settings = yaml.safe_load(shipped.get(name, path).read_text(encoding="utf-8"))["model"]["init_args"]
        return CLLAModule(**settings).config()
    except (KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        gist = " ".join(str(error).split())
        raise UserError(f"config {name}: expected model.init_args of a CLLAModule ({gist})") from error
    except ValueError as error:
        raise UserError(f"config {name}: {error}") from error
