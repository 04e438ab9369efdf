"""Weights of a transformers model from a folder of safetensors, one tensor at a time, sharded models too."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

# Entries of a config by which weights of equal shapes mean something else.
_MEANING = [
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "rope_parameters",
    "tie_word_embeddings",
]
_SHOWN = 3  # tensors in an error


@torch.no_grad()
def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fill `model` from a folder that `save_pretrained` or `tenfold export` wrote, all of it or nothing.

    Of a sharded model each process keeps its share of a tensor, and never holds more than one whole.

    Raises:
        ValueError: no safetensors, damaged ones, or those of another model: the config's entries or the tensors that
            differ.
    """
    _check_config(model, folder)
    files = _files(folder)
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"init_from: {folder}: {error}") from error
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (no mapping)
        parameters = dict(model.named_parameters())  # a tied head is not among them
        known = model.state_dict().keys()
        wrong = [f"{name} is missing" for name in parameters if name not in where]
        wrong += [f"{name} is not the model's" for name in where if name not in known]
        for name in parameters.keys() & where.keys():
            found, expected = tuple(where[name].get_slice(name).get_shape()), tuple(parameters[name].shape)
            if found != expected:
                wrong.append(f"{name} is {found}, the model's {expected}")
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise ValueError(f"init_from: {folder}: another model's weights: {'; '.join(wrong[:_SHOWN])}{more}")
        for name, parameter in parameters.items():
            tensor = where[name].get_tensor(name).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                share = distribute_tensor(
                    tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                )
                parameter.copy_(share)
            else:
                parameter.copy_(tensor)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"init_from: {folder} has no model.safetensors, nor an index of several")
    return [folder / "model.safetensors"]


def _check_config(model: PreTrainedModel, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"init_from: {folder} has no config.json")
    ours = model.config
    theirs = type(ours).from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    wrong = [
        f"{name} is {_short(there)}, the model's {_short(here)}"
        for name in _MEANING
        if (there := getattr(theirs, name, None)) != (here := getattr(ours, name, None))
    ]
    if wrong:
        raise ValueError(f"init_from: {folder}: another model: {'; '.join(wrong)}")


def _short(value: Any) -> str:
    return str(value) if len(str(value)) < 80 else str(value)[:79] + "…"
