"""What may change when a run goes on: options that would not take effect are refused, the others do."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

from ..errors import UserError
from .checkpoint import load_checkpoint
from .record import CONFIG


def check_options(config: dict[str, Any], checkpoint: Path) -> None:
    """Refuse a config that differs from the run's in what resumed training would not heed.

    All of `trainer` may differ, and of model and data what their classes name in `may_change`.

    Raises:
        UserError: every option that is refused, what it is and what the run has.
    """
    if refused := differences(config, checkpoint):
        raise UserError(
            f"{refused}; a run that goes on keeps this. To begin a run with its weights: tenfold export RUN FOLDER, "
            "then --model.init_from FOLDER"
        )


def differences(config: dict[str, Any], checkpoint: Path) -> str:
    """What `check_options` refuses, in words; "" if nothing."""
    found = _differences(config, _then(config, checkpoint))
    return "; ".join(f"{name}: {now}, the run has {then}" for name, now, then in found)


def _then(config: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The config that the checkpoint was trained with: the run's; of a checkpoint alone, what it knows of its model."""
    file = checkpoint.parent.parent / CONFIG
    if file.is_file():
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    known = {} if checkpoint.is_dir() else load_checkpoint(checkpoint).get("hyper_parameters", {})
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
    return {**config, "model": {**config["model"], "init_args": arguments}}


def _differences(config: dict[str, Any], then: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Options of model, data and seed that differ and may not: name, value now, value then."""
    if config["seed_everything"] != then["seed_everything"]:
        yield "seed_everything", config["seed_everything"], then["seed_everything"]
    for part in ("model", "data"):
        now, before = config[part], then[part]
        if now["class_path"] != before["class_path"]:
            yield f"{part}.class_path", now["class_path"], before["class_path"]
            continue
        module, _, name = now["class_path"].rpartition(".")
        free = getattr(getattr(import_module(module), name), "may_change", ())
        old = before.get("init_args", {})
        for name, value in now.get("init_args", {}).items():
            if name in old and value != old[name] and name not in free:
                yield f"{part}.{name}", value, old[name]


class CurrentSettings(Callback):
    """Has optimizer and schedule go on with the config's settings, not with those that the checkpoint was saved with.

    Lightning restores the learning rate, weight decay and the like with the optimizer's state, so that another value in
    the config would be recorded and not used.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of the settings before the checkpoint's take their place."""
        self._groups = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]
        self._rates = [list(config.scheduler.base_lrs) for config in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them back: the schedule's rate is that of the step which training has come to.

        Raises:
            ValueError: another learning rate under a schedule whose rates build on each other.
        """
        if trainer.ckpt_path is None:
            return
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                reached = group["lr"]
                group.update(settings)
                if trainer.lr_scheduler_configs:
                    group["lr"] = reached
        for config, rates in zip(trainer.lr_scheduler_configs, self._rates, strict=True):
            schedule = config.scheduler
            if isinstance(schedule, LambdaLR):
                schedule.base_lrs = rates
                steps = schedule.last_epoch
                schedule._last_lr = [
                    rate * ratio(steps) for rate, ratio in zip(rates, schedule.lr_lambdas, strict=True)
                ]
                for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
                    group["lr"] = rate
            elif list(schedule.base_lrs) != rates:
                raise ValueError(
                    f"model: the learning rate is {rates}, the run's {list(schedule.base_lrs)}, and "
                    f"{type(schedule).__name__} cannot go on with another"
                )
