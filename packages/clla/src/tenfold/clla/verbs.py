"""What `tenfold clla` offers: `budget`, what a cache costs, and `convert`, a CLLA model from a checkpoint."""

import shutil
from pathlib import Path

import yaml
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table

from tenfold.core.claims.figures import svg
from tenfold.core.errors import UserError, unknown
from tenfold.core.files import write_whole, write_whole_folder
from tenfold.core.methods import configs

from .budget import bytes_per_token, cost_figure, ladder_costs
from .config import CLLAConfig, Scales
from .convert import calibration_tokens, checkpoint_config, convert_model, converted_config, has_biases, load_checkpoint
from .formats import Code
from .module import CLLAModule


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
        with write_whole(plot) as file:
            file.write_text(svg(cost_figure(costs), prefix="budget"), encoding="utf-8")


def convert(
    checkpoint: Path,
    output: Path | None = None,
    latent_dim: int = 512,
    rope_dim: int = 64,
    share_factor: int = 2,
    cache_bits: int = 4,
    cache_code: Code = "symmetric",
    cache_scales: Scales = "token",
    window: int = 256,
    calibration: Path | None = None,
    tokens: int = 20_000,
) -> None:
    """Start a CLLA model from a Llama, Mistral or Qwen2 checkpoint, and report what its attention lost.

    The result needs training before it is of use; it loads with `CLLAForCausalLM.from_pretrained`.

    Args:
        checkpoint: a folder with a config.json and safetensors.
        output: the folder to write, which must not be there yet; by default the checkpoint's with `-clla` added.
        latent_dim: numbers of the latent.
        rope_dim: numbers of the rotary key.
        share_factor: layers that share a cache.
        cache_bits: 4, 8 or 16.
        cache_code: what 4 or 8 bits stand for: symmetric or asymmetric integers, or float (FP4, FP8).
        cache_scales: token: stored with the codes; channel: a step for each number of the latent, which the cache does
            not hold, of least squared error on the calibration text, or without one on normal numbers.
        window: distances in tokens over which keys that are no longer rotated shall be right on average.
        calibration: text (.txt or .jsonl) to measure the hidden states on; by default they are taken to be white.
        tokens: of it.
    """
    folder = checkpoint.resolve()
    output = folder.with_name(folder.name + "-clla") if output is None else output
    if output.exists():
        raise UserError(f"output: {output} is there already")
    config = checkpoint_config(checkpoint)
    settings = {
        "latent_dim": latent_dim,
        "rope_dim": rope_dim,
        "share_factor": share_factor,
        "cache_bits": cache_bits,
        "cache_code": cache_code,
        "cache_scales": cache_scales,
    }
    try:
        if window < 1:
            raise ValueError(f"window: must be at least 1, got {window}")
        converted_config(config, **settings, biased=calibration is not None or has_biases(config))
        text = None if calibration is None else calibration_tokens(checkpoint, calibration, tokens, config)
        model, errors = convert_model(load_checkpoint(checkpoint), **settings, window=window, calibration=text)
    except ValueError as error:
        raise UserError(str(error)) from error
    with write_whole_folder(output) as temporary:
        model.save_pretrained(temporary)
        for pattern in ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*"):
            for file in checkpoint.glob(pattern):
                shutil.copy(file, temporary)
    table = Table("layer", "reads", "keys", "values", "rotation", title="Relative errors", title_justify="left")
    producers = model.config.cache_producers
    for layer, error in enumerate(errors):
        row = (f"{100 * error[name]:.1f} %" for name in ("keys", "values", "rotation"))
        table.add_row(str(layer), str(producers[layer]), *row)
    console = Console()
    console.print(table)
    console.print(
        "keys, values: what the latent does not hold of them. rotation: what keys lose by not being rotated.\n"
        f"Written to {output}; train it before use.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def load_config(name: str) -> CLLAConfig:
    """The CLLAConfig of a shipped or own YAML config, or of a saved model.

    Raises:
        UserError: there is none, or it is not one.
    """
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
