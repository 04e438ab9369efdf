"""Train for three updates, as one process or as one of several, and return the weights.

`sharded.py FILE DEVICES TEXT` saves them; Lightning starts the other processes by running it again.
"""

import sys

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy

from tenfold.core.data.text import TextDataModule
from tenfold.hunyuan_moe import HunyuanLarge

SIZES = {"vocab_size": 300, "layers": 2, "dim": 16, "heads": 2, "ffn": 8, "experts": 4, "max_length": 32}


def train(devices, text):
    seed_everything(0, verbose=False)
    # What couples tokens, capacities and the balance loss, is each process's own; without them two are one.
    module = HunyuanLarge(**SIZES, routing="dropless", balance=0.0, lr=1e-2, warmup_steps=1, init_std=0.2)
    data = TextDataModule(text, length=32, batch_size=8 // devices, vocab_size=300, val_fraction=0.1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1) if devices > 1 else "auto",
        max_steps=3,
        gradient_clip_val=0.05,  # the gradients are larger
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    weights = dict(module.lm.named_parameters())
    if devices > 1:
        experts = weights["model.layers.0.mlp.experts.gate_up_proj"]
        assert experts.to_local().shape == (4 // devices, 16, 16), experts.to_local().shape
        weights = {name: p.full_tensor() for name, p in weights.items()}
    return {name: p.detach() for name, p in weights.items()}, trainer.global_rank


if __name__ == "__main__":
    file, devices, text = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    weights, rank = train(devices, text)
    if rank == 0:
        torch.save(weights, file)
