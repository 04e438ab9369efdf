"""`tenfold fit|validate|predict M`: LightningCLI for a method, with run folders that can be resumed."""

import inspect
import json
import logging
import os
import re
import shutil
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import NonNegativeInt
from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ..errors import UserError
from ..files import write_whole
from ..messages import one_line
from ..methods import Method, configs
from .callbacks import LastCheckpoint, NonFiniteGuard, RandomState, StepCount
from .checkpoint import AtomicCheckpointIO, load_checkpoint
from .metrics import RunLogger
from .options import print_options
from .progress import StepBar, StepLines
from .record import TOKENIZER, RunRecord
from .resume import CurrentSettings, check_options, differences
from .runs import RunOptions

_USAGE = """tenfold {verb} {method} [OPTION ...]

  --config NAME|FILE   a shipped config ({configs}) or a YAML file; of several, the later wins
  --resume [RUN]       go on with an interrupted run: its folder, or by default the latest
  --ckpt_path FILE     begin with, or evaluate, a checkpoint; `last` is the latest run's
  --trainer.logger NAME beside metrics.csv: TensorBoardLogger or WandbLogger, in the run's folder; false for none
  --model.OPTION, --data.OPTION, --trainer.OPTION, as below"""


def _usage(method: Method, verb: str) -> str:
    return _USAGE.format(verb=verb, method=method.name, configs=", ".join(configs(method.package)) or "none")


def run_method(method: Method, verb: str, arguments: list[str]) -> int:
    """Do what `tenfold VERB M ARGUMENTS` says; the exit status: 0, 143 after SIGTERM, 130 after Ctrl-C.

    Raises:
        UserError: arguments, configs, data or a checkpoint with which it cannot be done; nothing is left.
        NonFiniteError: training came to a loss or gradient that is infinite or NaN.
    """
    options = RunOptions.parse(method, verb, arguments)
    if options.checkpoint and not options.checkpoint.is_dir():  # a folder is a sharded one
        load_checkpoint(options.checkpoint)  # so that a damaged one is found before anything starts
    _calm_down()
    if not {"-h", "--help"}.isdisjoint(arguments):
        print_options(method, options.rest, _usage(method, verb))
        return 0
    cli = _MethodCLI(method, verb, options)
    return cli.fit() if verb == "fit" else cli.evaluate(verb)


class _MethodCLI(LightningCLI):
    """One parser, for one verb: trainer, model and data, the latter two of any class the config names."""

    def __init__(self, method: Method, verb: str, options: RunOptions) -> None:
        self.method, self.options, self.keeps = method, options, verb == "fit"
        self.last = LastCheckpoint(options.folder / "checkpoints")
        with self._user_errors():
            super().__init__(
                method.module,
                method.datamodule,
                save_config_callback=RunRecord if self.keeps else None,
                save_config_kwargs={
                    "folder": options.folder,
                    "method": method.name,
                    "package": method.package,
                    "arguments": options.given,
                },
                trainer_defaults={"enable_model_summary": False},
                seed_everything_default=0,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                args=options.rest,
                run=False,
                parser_kwargs={
                    "prog": f"tenfold {verb} {method.name}",
                    "usage": _usage(method, verb),
                    "description": None,
                    "exit_on_error": False,
                    "allow_abbrev": False,
                },
            )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Always seeded, so that two runs of one config are one run."""
        parser.add_argument(
            "--seed_everything", type=NonNegativeInt, default=0, help="Of weights, dropout and augmentation."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Without LightningCLI's warning about arguments that do not come from `sys.argv`."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Find devices that are not there: on a CPU Lightning would start any number of processes."""
        _check_devices(self.config.trainer.accelerator, self.config.trainer.devices)
        if self.keeps and self.options.checkpoint:
            check_options(self._plain(), self.options.checkpoint)

    def _plain(self) -> dict[str, Any]:
        """The config as it is written to a file."""
        return yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))

    def instantiate_trainer(self) -> Trainer:
        """The Trainer of the config, with our parts."""
        given = self.config_init.trainer
        plugins = given.plugins or []
        ours: dict[str, Any] = {
            "plugins": [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()],
            "default_root_dir": str(self.options.folder),
            "logger": given.logger,
        }
        terminal, callbacks = sys.stderr.isatty(), []
        if not terminal:
            ours["enable_progress_bar"] = False
        if given.enable_progress_bar is not False:
            kind = StepBar if terminal else StepLines
            evaluation = [RichProgressBar(console_kwargs={"stderr": True})] if terminal else []
            callbacks = [kind()] if self.keeps else evaluation
        self.keeps &= not given.fast_dev_run
        if not self.keeps:
            ours["logger"] = given.logger or False
            ours["enable_checkpointing"] = False
        elif given.logger is not False:
            others = given.logger if isinstance(given.logger, list) else [given.logger]
            mine = [logger for logger in others if isinstance(logger, Logger) and not isinstance(logger, RunLogger)]
            ours["logger"] = [RunLogger(self.options.folder), *mine]
        if self.keeps:
            callbacks += [StepCount(), CurrentSettings(), NonFiniteGuard(), RandomState(), self.last]
            if ours["logger"]:
                callbacks.append(LearningRateMonitor(logging_interval="step"))
        return self._instantiate_trainer({**given, **ours}, callbacks)

    def instantiate_classes(self) -> None:
        """With the tokenizer that is the run's, or that of the folder to begin with, where none is asked for."""
        super().instantiate_classes()
        run = self.options.checkpoint.parent.parent if self.options.checkpoint else None
        begin = self.model.hparams.get("init_from")
        folder = run or (Path(begin) if begin else None)
        if folder and (folder / TOKENIZER).is_file() and getattr(self.datamodule, "tokenizer_path", "") is None:
            self.datamodule.tokenizer_path = str(folder / TOKENIZER)

    def fit(self) -> int:
        """Train, and say where the results are, or how to go on."""
        folder, again = self.options.folder, f"tenfold fit {self.method.name} --resume {self.options.folder}"
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        if self.trainer.world_size > 1:
            os.environ["TENFOLD_RUN_FOLDER"] = str(folder)  # for the processes that Lightning starts
        try:
            with self._user_errors():
                self.trainer.fit(self.model, self.datamodule, ckpt_path=self.options.checkpoint, weights_only=True)
        except SIGTERMException:
            _say(f"stopped at step {self.trainer.global_step}; to go on: {again}")
            return 130 if self.last.signal == signal.SIGINT else 143
        except SystemExit as exit:
            if not isinstance(exit.__context__, KeyboardInterrupt):
                raise
            saved = f"what {self.last.path} holds is kept; to go on: {again}"
            _say(f"stopped at once; {saved if self.last.path.exists() else 'nothing was saved'}")
            return 130
        finally:
            if new and not self.last.began and self.trainer.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # another run has come into one
                    for path in new[1:]:
                        path.rmdir()
        if self.options.checkpoint and not self.last.began:
            limits = {name: getattr(self.trainer, name) for name in ("max_steps", "max_epochs")}
            told = " and ".join(f"trainer.{name} {value}" for name, value in limits.items() if value not in (None, -1))
            _say(f"step {self.trainer.global_step}: finished already, by {told}; with more it goes on")
            return 0
        values = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        _say("  ".join([f"step {self.trainer.global_step}", *(f"{k} {v:.4g}" for k, v in values.items())]))
        return 0

    def evaluate(self, verb: str) -> int:
        """Validate, test or predict with the checkpoint; predictions go to a file in the run's folder."""
        checkpoint = self.options.checkpoint
        if checkpoint is None:
            raise UserError(f"ckpt_path: {verb} needs a checkpoint; --ckpt_path last is the latest run's")
        if verb == "predict" and not is_overridden("predict_step", self.model):
            raise UserError(f"predict: {type(self.model).__name__} has nothing to predict; it can be validated")
        if verb == "predict" and self.trainer.world_size > 1:
            raise UserError(f"trainer.devices: predict takes one, got {self.trainer.world_size}")
        with self._user_errors():
            results = getattr(self.trainer, verb)(
                self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True
            )
        if verb == "predict" and self.trainer.is_global_zero:
            _say(f"predictions: {self._write(results)}")
        return 0

    def _write(self, results: list[Any]) -> Path:
        """The predictions, as JSON lines where the data can say what they mean, else as tensors."""
        lines = getattr(self.datamodule, "predictions", None)
        path = self.options.folder / ("predictions.jsonl" if lines else "predictions.pt")
        with write_whole(path) as temporary:
            if lines is None:
                torch.save(results, temporary)
            else:
                with temporary.open("w", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines(results))
        return path

    @contextmanager
    def _user_errors(self):
        """Turn what is wrong with arguments, configs and data into a UserError, until training begins."""
        try:
            yield
        except ArgumentError as error:
            raise UserError(self._explain(str(error))) from error
        except MisconfigurationException as error:
            raise UserError(self._trainer(str(error))) from error
        except (ValueError, TypeError, OSError) as error:
            if self.last.began:
                raise
            raise UserError(self._trainer(one_line(str(error), self._accepted))) from error
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            what = differences(self._plain(), self.options.checkpoint) or " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint {self.options.checkpoint}: not this model's: {what}") from error

    def _explain(self, message: str) -> str:
        names = ", ".join(configs(self.method.package)) or "none shipped"
        if missing := message.partition("arguments are required: ")[2]:
            return f"config: {missing} not given; --config takes a name ({names}) or a YAML file"
        if "given class_path 'lightning." in message:  # jsonargparse's guess where none is given
            return "model.class_path, data.class_path: not given; a config says which classes to use"
        return one_line(message, self._accepted)

    def _trainer(self, message: str) -> str:
        """Trainer's own errors have the argument somewhere, in backquotes."""
        message = " ".join(message.split())
        for name in re.findall(r"`(\w+)", message):
            if name in inspect.signature(Trainer).parameters:
                return f"trainer.{name}: {message.removeprefix(f'`{name}` ')}"
        return message

    def _accepted(self, where: str) -> Iterable[str]:
        """The options of a class, of a group of the parser, or at the top."""
        module, _, name = where.rpartition(".")
        if module:
            return _constructor_options(getattr(import_module(module), name))
        keys = vars(self.parser.get_defaults().as_flat())
        if where:
            return [key.removeprefix(f"{where}.") for key in keys if key.startswith(f"{where}.")]
        return ["config", "resume", "ckpt_path", "model", "data", *keys]


def _constructor_options(cls: type) -> list[str]:
    """The keywords a class takes, those that it passes on to its bases as `**others` included."""
    names: list[str] = []
    for base in inspect.getmro(cls):
        parameters = inspect.signature(base.__init__).parameters.values() if "__init__" in vars(base) else ()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if parameters and all(p.kind != p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in dict.fromkeys(names) if name != "self"]


def _check_devices(accelerator: Any, devices: Any) -> None:
    gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and not gpus and not torch.backends.mps.is_available():
        raise UserError(f"trainer.accelerator: {accelerator!r}, but this machine has no GPU; use cpu or auto")
    if accelerator not in ("auto", "cpu", "gpu", "cuda") or not str(devices).isdecimal():
        return
    on_cpu = accelerator == "cpu" or not gpus
    available, what = (os.cpu_count() or 1, "CPU cores") if on_cpu else (gpus, "GPUs")
    if not 0 < int(devices) <= available:
        raise UserError(f"trainer.devices: {devices}, but this machine has {available} {what}")


def _calm_down() -> None:
    """Without Lightning's notes on devices and its hints on tuning."""
    if os.environ.get("TENFOLD_DEBUG"):
        return
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
