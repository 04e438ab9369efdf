"""The released checkpoint's layout on disk: a matrix per expert, in safetensors files, several or one."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

if TYPE_CHECKING:
    from .config import HunyuanLargeConfig

Shape = tuple[int, ...]
SHOWN = 8  # names of each kind in an error


def register_layout() -> None:
    """Have transformers stack the released matrices of the experts when it loads, and part them when it saves."""
    experts = "mlp.experts.*."
    register_checkpoint_conversion_mapping(
        "hunyuan",
        [
            WeightConverter(
                source_patterns=[f"{experts}gate_proj.weight", f"{experts}up_proj.weight"],
                target_patterns="mlp.experts.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                source_patterns=f"{experts}down_proj.weight",
                target_patterns="mlp.experts.down_proj",
                operations=[MergeModulelist(dim=0)],
            ),
        ],
        overwrite=True,
    )


def released_shapes(config: "HunyuanLargeConfig") -> dict[str, Shape]:
    """Every tensor of a released checkpoint, by name, with its shape."""
    from .model import HunyuanLargeForCausalLM

    with torch.device("meta"):
        model = HunyuanLargeForCausalLM(config)
    shapes: dict[str, Shape] = {}
    for name, parameter in model.named_parameters():  # a tied head is not among them
        prefix, _, last = name.rpartition(".experts.")
        if not prefix:
            shapes[name] = tuple(parameter.shape)
            continue
        experts, rows, columns = parameter.shape
        kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[last]
        for expert in range(experts):
            for kind in kinds:
                shapes[f"{prefix}.experts.{expert}.{kind}.weight"] = (rows // len(kinds), columns)
    return shapes


def check_folder(folder: Path, config: "HunyuanLargeConfig") -> None:
    """Compare the headers of a checkpoint's files with the model, before anything of any size is read.

    A folder without safetensors files is left to transformers to complain about.

    Raises:
        ValueError: a file that is missing or damaged, and every tensor that is missing, additional or misshapen,
            in one line.
    """
    files = _files(folder)
    if not files:
        return
    found: dict[str, Shape] = {}
    for file in files:
        found |= dict(_headers(file))
    expected = released_shapes(config)
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    additional = [n for n in found.keys() - expected.keys() - ignored if not n.endswith("rotary_emb.inv_freq")]
    wrong = {
        f"{name} is {_text(found[name])}, not {_text(shape)}": name
        for name, shape in expected.items()
        if name in found and found[name] != shape
    }
    problems = {"missing": expected.keys() - found.keys(), "not the model's": additional, "misshapen": wrong}
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{folder}: the tensors are not those of the config: {told}")


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else []
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors files: {error}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder}: the index names files that are not there: {_some(missing)}")
    return files


def _headers(file: Path) -> Iterator[tuple[str, Shape]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                yield name, tuple(tensors.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged, or not a safetensors file: {error}") from error


def _some(names: Mapping | list | set) -> str:
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _text(shape: Shape) -> str:
    return " × ".join(map(str, shape))
