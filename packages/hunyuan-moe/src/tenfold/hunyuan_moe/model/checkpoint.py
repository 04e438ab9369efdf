"""The released checkpoint's layout on disk: a matrix per expert, in safetensors files, several or one."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from ..adapters.rope import rope_base
from .config import HunyuanLargeConfig

Shape = tuple[int, ...]
KINDS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # stacked, and as released
SHOWN = 8  # names of each kind in an error
ROWS = 4096  # of the embedding, compared with the head at a time


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


def released_shapes(model: PreTrainedModel) -> dict[str, Shape]:
    """Every tensor of the model's released checkpoint, by name, with its shape."""
    shapes: dict[str, Shape] = {}
    for name, parameter in model.named_parameters():  # a tied head is not among them
        prefix, _, last = name.rpartition(".experts.")
        if not prefix:
            shapes[name] = tuple(parameter.shape)
            continue
        experts, rows, columns = parameter.shape
        kinds = KINDS[last]
        for expert in range(experts):
            for kind in kinds:
                shapes[f"{prefix}.experts.{expert}.{kind}.weight"] = (rows // len(kinds), columns)
    return shapes


def check_folder(folder: Path, shapes: Mapping[str, Shape], *, tied: bool) -> None:
    """Compare the headers of a checkpoint's files with a model's shapes, before anything of any size is read.

    A folder without safetensors files is left to transformers to complain about.

    Raises:
        ValueError: a file that is missing or damaged, and every tensor that is missing, additional or misshapen,
            in one line; a head of its own, for a model whose head is the embedding.
    """
    files = _files(folder)
    if not files:
        return
    found: dict[str, Shape] = {}
    for file in files:
        found |= dict(_headers(file))
    ignored = {"lm_head.weight"} if tied else set()
    additional = [n for n in found.keys() - shapes.keys() - ignored if not n.endswith("rotary_emb.inv_freq")]
    wrong = {
        f"{name} is {_text(found[name])}, not {_text(shape)}": name
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    }
    problems = {"missing": shapes.keys() - found.keys(), "not the model's": additional, "misshapen": wrong}
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{folder}: the tensors are not those of the config: {told}")
    if ignored & found.keys() and not _same(files, "lm_head.weight", "model.embed_tokens.weight"):
        raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight")


@torch.no_grad()
def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fill a model from a folder in the released layout; of a sharded one (DTensors), each process reads its share.

    Raises:
        ValueError: a folder of another model: other tensors, or a config that gives them another meaning.
    """
    if not _files(folder):
        raise ValueError(f"{folder}: there is no model.safetensors, nor an index of several")
    _check_meaning(model.config, type(model.config).from_pretrained(folder), folder)
    check_folder(folder, released_shapes(model), tied=model.config.tie_word_embeddings)
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in _files(folder)]
        tensors = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (no mapping)

        def rows(name: str, first: int, last: int) -> Tensor:
            return tensors[name].get_slice(name)[first:last]

        for name, parameter in model.named_parameters():  # a tied head is not among them
            local, offset = _share(parameter)
            if not local.numel():
                continue
            prefix, _, last = name.rpartition(".experts.")
            if not prefix:
                local.copy_(rows(name, offset[0], offset[0] + len(local)))
                continue
            kinds = KINDS[last]
            size = parameter.shape[1] // len(kinds)  # rows of each kind, one kind after the other
            for expert, matrix in enumerate(local, start=offset[0]):
                for i, kind in enumerate(kinds):
                    begin, end = (min(max(x - i * size, 0), size) for x in (offset[1], offset[1] + len(matrix)))
                    if begin < end:
                        at = begin + i * size - offset[1]
                        matrix[at : at + end - begin] = rows(f"{prefix}.experts.{expert}.{kind}.weight", begin, end)


def _share(parameter: Tensor) -> tuple[Tensor, list[int]]:
    """The part of a parameter that this process has, and the index of its first element."""
    offset = [0] * parameter.ndim
    if not isinstance(parameter, DTensor):
        return parameter, offset
    for over, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):  # as torch.chunk parts
            size, parts = parameter.shape[placement.dim], parameter.device_mesh.size(over)
            offset[placement.dim] = -(-size // parts) * parameter.device_mesh.get_local_rank(over)
    return parameter.to_local(), offset


def _check_meaning(ours: HunyuanLargeConfig, theirs: HunyuanLargeConfig, folder: Path) -> None:
    """Refuse weights of equal shapes that mean something else."""
    names = "num_attention_heads", "num_key_value_heads", "moe_topk", "use_qk_norm", "rms_norm_eps"
    for name in (*names, "tie_word_embeddings"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(f"{folder}: its {name} is {getattr(theirs, name)}, the model's {getattr(ours, name)}")
    if rope_base(ours) != rope_base(theirs):
        raise ValueError(f"{folder}: its rotary base is {rope_base(theirs):g}, the model's {rope_base(ours):g}")


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


def _same(files: list[Path], *names: str) -> bool:
    """Whether two tensors hold the same numbers, of which few rows are read at a time."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        tensors = {name: file.get_slice(name) for file in opened for name in file.keys() if name in names}  # noqa: SIM118
        a, b = (tensors[name] for name in names)
        return a.get_shape() == b.get_shape() and all(
            torch.equal(a[i : i + ROWS], b[i : i + ROWS]) for i in range(0, a.get_shape()[0], ROWS)
        )


def _some(names: Mapping | list | set) -> str:
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _text(shape: Shape) -> str:
    return " × ".join(map(str, shape))
