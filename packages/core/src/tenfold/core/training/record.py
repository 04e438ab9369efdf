"""What a run's folder says of the run: its config, its tokenizer, and on what it was trained."""

import json
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import SaveConfigCallback

from ..environment import environment, required
from ..files import write_whole

RECORD, CONFIG, TOKENIZER, LAST = "run.json", "config.yaml", "tokenizer.json", Path("checkpoints", "last.ckpt")


class RunRecord(SaveConfigCallback):
    """Writes `config.yaml`, `tokenizer.json` and `run.json` when training begins, after a checkpoint was loaded.

    `run.json` has an entry under `starts` for every time that training began or went on: when, at which step, by which
    arguments, and the environment, with the commit and the versions of what the method requires.

    Args:
        folder: of the run.
        method: its name.
        package: the method's import name.
        arguments: of the command.
        others: the parser and the config, as LightningCLI gives them.
    """

    def __init__(
        self, *others: Any, folder: Path, method: str, package: str, arguments: list[str], **named: Any
    ) -> None:
        super().__init__(*others, save_to_log_dir=False, **named)
        self.folder, self.method, self.package, self.arguments = folder, method, package, arguments

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Nothing yet: what is asked for may be refused."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the files, in the first process."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")
            print(f"run folder: {self.folder}", flush=True)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write the files."""
        with write_whole(self.folder / CONFIG) as temporary:
            self.parser.save(self.config, temporary, skip_none=False, overwrite=True, format="yaml")
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save(self.folder / TOKENIZER)
        ours = ["tenfold-kernels", "tenfold-core", self.package.replace(".", "-").replace("_", "-")]
        start = {"step": trainer.global_step, "arguments": self.arguments}
        start |= environment([*ours, *sorted(required(self.package))])
        record = read_record(self.folder) or {"method": self.method, "starts": []}
        record["starts"].append(start)
        with write_whole(self.folder / RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says; None where there is none, or a damaged one, which is written anew."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record["starts"], list) and isinstance(record["method"], str) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
