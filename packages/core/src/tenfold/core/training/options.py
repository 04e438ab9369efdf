"""The options of a config's own classes, with types, text and the config's values: `tenfold fit M --help`."""

from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning import Trainer

from ..errors import UserError
from ..methods import Method, configs


def print_options(method: Method, arguments: list[str], usage: str) -> None:
    """Print the options of model and data, then Lightning's.

    Args:
        method: whose first config is taken where none is given.
        arguments: with `--config FILE`s among them.
        usage: what to print before the options.
    """
    files = [Path(value) for option, value in pairwise(arguments) if option == "--config"]
    files = files or list(configs(method.package).values())[:1]
    sections: dict[str, dict[str, Any]] = {"model": {}, "data": {}}
    for file in files:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for name, section in sections.items():
            given = content.get(name) or {}
            section["class_path"] = given.get("class_path", section.get("class_path"))
            section["init_args"] = section.get("init_args", {}) | (given.get("init_args") or {})
    parser = ArgumentParser(usage=usage, add_help=False)
    for name, section in sections.items():
        path = section["class_path"]
        if path is None:
            raise UserError(f"{name}.class_path: not given; a config says which classes to use")
        module, _, last = path.rpartition(".")
        parser.add_class_arguments(getattr(import_module(module), last), name, fail_untyped=False)
        known = parser.get_defaults().as_flat()
        parser.set_defaults({k: v for n, v in section["init_args"].items() if hasattr(known, k := f"{name}.{n}")})
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False)
    parser.print_help()
