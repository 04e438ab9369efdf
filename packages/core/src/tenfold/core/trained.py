"""Opening a run: its model with the trained weights, outside of any Trainer."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning import LightningModule

from . import methods
from .data.tokenizer import Tokenizer, load_tokenizer
from .errors import UserError
from .messages import one_line
from .training.checkpoint import load_any_checkpoint
from .training.record import CONFIG, LAST, TOKENIZER, read_record


@dataclass
class TrainedRun:
    """A run as it was left.

    Args:
        folder: of the run.
        method: that it trained.
        config: all of `config.yaml`.
        module: with the weights of the last checkpoint, in evaluation mode, on the CPU.
        step: updates that it was trained for.
        tokenizer: of the run, if it has one.
        record: what `run.json` holds, or None.
    """

    folder: Path
    method: methods.Method
    config: dict[str, Any]
    module: LightningModule
    step: int
    tokenizer: Tokenizer | None
    record: dict[str, Any] | None


def open_run(folder: Path) -> TrainedRun:
    """Build the run's model and load its last checkpoint, a sharded one too.

    Raises:
        UserError: a folder that is not a run, a damaged checkpoint, or a config that no longer fits the code.
    """
    for file in (CONFIG, LAST):
        if not (folder / file).exists():
            raise UserError(f"run: {folder} holds no run, there is no {file} in it")
    record = read_record(folder)
    method = methods.load(record["method"] if record else folder.resolve().parent.name)
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    checkpoint = load_any_checkpoint(folder / LAST)
    module = build_module(config["model"], folder / CONFIG)
    if hasattr(module, "configure_model"):
        module.configure_model()
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {folder / LAST}: not the model of {folder / CONFIG}: {what}") from error
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    return TrainedRun(folder, method, config, module.eval(), checkpoint["global_step"], tokenizer, record)


def build_module(model: dict[str, Any], source: Path) -> LightningModule:
    """The module of a config's section `model`, without weights.

    Raises:
        UserError: a class or an argument that is not accepted; it names `source`.
    """
    arguments = {**model.get("init_args", {})}
    if "init_from" in arguments:
        arguments["init_from"] = None  # the checkpoint has what it was for
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False, required=True)
    try:
        config = parser.parse_object({"model": {**model, "init_args": arguments}})
        return parser.instantiate_classes(config).model
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"config {source}: {one_line(str(error), lambda where: ())}") from error
