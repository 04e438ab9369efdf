"""Take two steps with the precision, clipping and strategy of every paper config: `paper_steps.py TEXT`.

The models are tiny and the process is alone; what is tried is that Lightning takes these settings together.
"""

import sys
from importlib.metadata import entry_points

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from tenfold.core.data.text import TextDataModule
from tenfold.core.methods import configs

SIZES = {"vocab_size": 300, "layers": 4, "dim": 32, "heads": 2, "ffn": 32, "max_length": 32, "warmup_steps": 1}
SMALL = {
    "block_size": 16,
    "head_dim": 16,
    "latent_dim": 16,
    "rope_dim": 8,
    "group_size": None,
    "shard_size": None,
    "kv_heads": None,
}


class Losses(Callback):
    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(float(outputs["loss"]))


def module(settings: dict) -> LightningModule:
    package, _, name = settings["class_path"].rpartition(".")
    kind = getattr(__import__(package, fromlist=[name]), name)
    arguments = settings["init_args"]
    return kind(**arguments | SIZES | {k: v for k, v in SMALL.items() if k in arguments})


def strategy(settings: str | dict) -> str | ModelParallelStrategy:
    if isinstance(settings, str):
        return settings
    assert settings["class_path"].endswith(".ModelParallelStrategy"), settings
    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)


def main(text: str) -> None:
    for point in sorted(entry_points(group="tenfold.methods"), key=lambda point: point.name):
        for name, path in configs(point.load().package).items():
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not name.startswith("paper") or "vocab_size" not in settings["model"]["init_args"]:
                continue
            options, losses = settings["trainer"], Losses()
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=2,
                precision=options["precision"],
                gradient_clip_val=options["gradient_clip_val"],
                strategy=strategy(options["strategy"]),
                limit_val_batches=0,
                logger=False,
                callbacks=[losses],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            data = TextDataModule(text, length=32, batch_size=4, vocab_size=300, val_fraction=0.1)
            trainer.fit(module(settings["model"]), datamodule=data)
            assert len(losses.found) == 2
            assert torch.tensor(losses.found).isfinite().all()
            print(point.name, name, type(trainer.strategy).__name__, *losses.found, flush=True)
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
