"""Trainings for test_sharded.py, alone or as one of two processes: `sharded.py WHAT FOLDER TEXT`."""

import sys
from pathlib import Path

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tenfold.core.data.text import TextDataModule
from tenfold.core.training import LastCheckpoint, RandomState
from tenfold.hunyuan_moe import HunyuanLarge

SIZES = {"vocab_size": 300, "layers": 2, "dim": 16, "heads": 2, "ffn": 8, "max_length": 32, "warmup_steps": 1}
OPTIONS = {
    # What couples tokens, capacities and the balance loss, is each process's own; without them two are one.
    "one": {"experts": 4, "routing": "dropless", "balance": 0.0, "lr": 1e-2, "init_std": 0.2},
    # Three experts are no even share for two processes: each gets a half of each.
    "odd": {"experts": 3, "routing": "dropless", "balance": 0.0, "lr": 1e-2, "init_std": 0.2},
    "copies": {"experts": 3, "routing": "dropless", "balance": 0.0, "lr": 1e-2, "init_std": 0.2, "shard_size": 1},
    "begin": {"experts": 4, "init_std": 0.2},
    "straight": {"experts": 4, "routing": "recycle", "lr": 1e-2, "init_std": 0.2},
}


class Largest(TorchDispatchMode):
    """Finds the most elements of any tensor that is not on the meta device."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) is torch.Tensor and x.device.type != "meta":
                self.elements = max(self.elements, x.numel(), x.untyped_storage().nbytes() // x.element_size())
        return out


class Watched(HunyuanLarge):
    """Notes what building it took."""

    def configure_model(self):
        if self.lm is None:
            self.random = torch.get_rng_state()
            with Largest() as largest:
                super().configure_model()
            self.largest = largest.elements
            assert torch.equal(self.random, torch.get_rng_state())


class First(Callback):
    """Keeps what training begins with."""

    def on_fit_start(self, trainer, pl_module):
        lm = pl_module.lm
        self.found = {
            "local": {name: p.detach().to_local().clone() for name, p in lm.named_parameters()},
            "weights": {name: p.detach().full_tensor().clone() for name, p in lm.named_parameters()},
            "tied": lm.lm_head.weight is lm.model.embed_tokens.weight,
            "frequencies": lm.model.rotary_emb.inv_freq.clone(),
            "largest": pl_module.largest,
        }


def train(what, text, *, devices=1, steps=3, weights=None, callbacks=(), resume=None):
    """A module after `steps` updates, from `weights` or `resume` if given."""
    seed_everything(0, verbose=False)
    sharded = devices > 1
    kind = Watched if what == "begin" else HunyuanLarge
    module = kind(**SIZES, **OPTIONS[what], init_from=weights and str(weights))
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1) if sharded else "auto",
        max_steps=steps,
        gradient_clip_val=0.05,  # the gradients are larger
        limit_val_batches=0,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TextDataModule(text, length=32, batch_size=8 // devices, vocab_size=300, val_fraction=0.1)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module


def whole(module):
    return {name: p.full_tensor().detach() for name, p in module.lm.named_parameters()}


def main(what, folder, text):
    """As one of two processes; rank 0 saves."""
    found = {}
    if what == "first":
        for name in ("one", "odd", "copies"):
            module = train(name, text, devices=2, weights=folder / f"{OPTIONS[name]['experts']}")
            experts = module.lm.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
            found[name] = whole(module), tuple(experts.to_local().shape)
        first = First()
        module = train("begin", text, devices=2, steps=1, callbacks=[first])
        torch.save(first.found, folder / f"begin{module.global_rank}.pt")
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        last = LastCheckpoint(folder / "last", minutes=0)
        module = train("straight", text, devices=2, steps=4, callbacks=[RandomState(), saving, last])
        found["straight"] = whole(module)
    else:
        module = train("straight", text, devices=2, steps=4, callbacks=[RandomState()], resume=folder / "step=2.ckpt")
        found["resumed"] = whole(module)
    if module.global_rank == 0:
        torch.save(found, folder / f"{what}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
