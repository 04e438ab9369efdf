"""Which configs, checkpoint and folder a run has: the part of the command line that is not LightningCLI's."""

import json
import os
import re
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import yaml

from ..errors import UserError, unknown
from ..methods import Method, configs
from .record import CONFIG, LAST

_ROOT = Path("runs")


@dataclass
class RunOptions:
    """What `--config`, `--resume` and `--ckpt_path` came to.

    Args:
        folder: where a fit is kept, `runs/<method>/<config>`; or that of the checkpoint.
        checkpoint: to begin with; None is from scratch.
        rest: the arguments for LightningCLI, with the configs as files.
        given: the arguments as they were given.
    """

    folder: Path
    checkpoint: Path | None = None
    rest: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, method: Method, verb: str, arguments: list[str]) -> "RunOptions":
        """Take the three options out of `arguments`.

        Raises:
            UserError: a config that is missing or not YAML, no run to resume, or an option without its value.
        """
        names, resume, checkpoint, rest = _split(arguments)
        if checkpoint == "last":
            resume, checkpoint = resume or "", None
        files = [] if resume is not None else [_config(method, name) for name in names]
        for file in files:
            _check(file)
        root = _root(files, rest) / method.name
        if resume is not None:
            folder = _run_folder(root, resume, names)
            files = [folder / CONFIG]
            _check(files[0])
            path: Path | None = folder / LAST
        else:
            path = Path(checkpoint) if checkpoint is not None else None
            if path and (path / LAST).exists():  # a run's folder
                path /= LAST
            folder = _new_folder(root, files)
            run = path.parent.parent if path else None
            if verb != "fit" and run and (run / CONFIG).exists():
                folder, files = run, files or [run / CONFIG]
        rest = _named_loggers(rest, folder)
        given = [argument for file in files for argument in ("--config", str(file))]
        return cls(folder, path, [*given, *rest], arguments)


_TEXT = (".txt", ".jsonl", ".bz2", ".gz", ".xz")
_LOGGERS = {  # each with the modules of which it needs one
    "CSVLogger": ("csv",),
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
}


def _named_loggers(rest: list[str], folder: Path) -> list[str]:
    """`--trainer.logger NAME` as a logger that writes into the run's folder; metrics.csv is written anyway."""
    found: list[str] = []
    left = list(rest)
    while left:
        option, equals, value = left.pop(0).partition("=")
        if option == "--trainer.logger":
            value = value if equals else (left.pop(0) if left else "")
            if value in _LOGGERS:
                if not any(map(find_spec, needed := _LOGGERS[value])):
                    raise UserError(f"trainer.logger: {value} needs pip install {needed[0]}")
                arguments = {"save_dir": str(folder), "name": "tensorboard", "version": ""}
                if value == "WandbLogger":
                    arguments = {"save_dir": str(folder), "name": folder.name, "project": folder.parent.name}
                logger = {"class_path": f"lightning.pytorch.loggers.{value}", "init_args": arguments}
                value = "true" if value == "CSVLogger" else json.dumps(logger)
            found.append(f"{option}={value}")
            continue
        found.append(option + equals + value)
    return found


def _split(arguments: list[str]) -> tuple[list[str], str | None, str | None, list[str]]:
    """Names of configs, run to resume ("" for the latest), checkpoint, and the other arguments."""
    names: list[str] = []
    resume = checkpoint = None
    rest: list[str] = []
    left = list(arguments)
    while left:
        option, equals, value = left.pop(0).partition("=")
        path = value if equals else (left[0] if left else "")
        if option == "--data" and (
            Path(path).is_dir() or Path(path).suffix in (".txt", ".jsonl", ".bz2", ".gz", ".xz")
        ):
            raise UserError(f"--data {path}: did you mean --data.path {path}?")
        if option not in ("--config", "-c", "--resume", "--ckpt_path"):
            rest.append(option + equals + value)
            continue
        if not equals and left and not left[0].startswith("-"):
            value = left.pop(0)
        if not value and option != "--resume":
            raise UserError(f"{option}: expected a value after it")
        if option == "--resume":
            resume = value
        elif option == "--ckpt_path":
            checkpoint = value
        else:
            names.append(value)
    return names, resume, checkpoint, rest


def _config(method: Method, name: str) -> Path:
    shipped = configs(method.package)
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"config: there is no file {name}; shipped: {', '.join(shipped) or 'none'}")
    raise UserError(f"config: {unknown('name', name, shipped)} (or the path of a YAML file)")


def _check(file: Path) -> None:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"config {file}: not valid YAML{where}: {getattr(error, 'problem', error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        got = type(content).__name__
        raise UserError(f"config {file}: expected sections (trainer, model, data), got a {got}")


def _root(files: list[Path], rest: list[str]) -> Path:
    """Where runs are kept: `trainer.default_root_dir` where it is given, else `runs`."""
    root = None
    for file in files:
        trainer = yaml.safe_load(file.read_text(encoding="utf-8")).get("trainer")
        root = (trainer.get("default_root_dir") if isinstance(trainer, dict) else None) or root
    for argument, following in pairwise([*rest, ""]):
        option, equals, value = argument.partition("=")
        if option == "--trainer.default_root_dir":
            root = value if equals else following
    return Path(root) if root else _ROOT


def _run_folder(base: Path, resume: str, names: list[str]) -> Path:
    """The run that `--resume` means: a folder, or the latest of the method, or of the config named."""
    if resume:
        folder = Path(resume)
        if not (folder / LAST).exists():
            raise UserError(f"resume: {resume} holds no run, there is no checkpoints/last.ckpt in it")
        return folder
    name = Path(names[-1]).stem if names else None
    found = [
        file
        for file in base.glob("*/checkpoints/last.ckpt")
        if name is None or re.fullmatch(rf"{re.escape(name)}(-\d+)?", file.parent.parent.name)
    ]
    if not found:
        raise UserError(f"resume: there is no run to go on with in {base / (name or '')}")
    return max(found, key=lambda file: file.stat().st_mtime).parent.parent


def _new_folder(base: Path, files: list[Path]) -> Path:
    """`<base>/<config>`, with a number where that is taken, the same in every process of a run."""
    if folder := os.environ.get("TENFOLD_RUN_FOLDER"):  # set by the process that started this one
        return Path(folder)
    name = files[-1].stem if files else time.strftime("%Y-%m-%d-%H%M%S")
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    if job and job != "none":  # processes started by others, which agree on this alone
        return base / f"{name}-{job}"
    folder, number = base / name, 1
    while folder.exists():
        number += 1
        folder = base / f"{name}-{number}"
    return folder
