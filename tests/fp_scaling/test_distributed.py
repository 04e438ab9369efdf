"""Two processes, with DDP and with fully sharded weights, get the gradients of one."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tenfold.fp_scaling import QuantRecipe, quantize_linears_


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    return quantize_linears_(model, QuantRecipe("e2m1", block_size=16))


def inputs():
    torch.manual_seed(1)
    return torch.randn(32, 32)


def process(rank, folder, wrap):
    """One of the two: this file is its own script."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = network()
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh)
    model(inputs()[16 * rank : 16 * rank + 16]).square().mean().backward()  # a whole block of tokens on each
    gradients = [p.grad.full_tensor() if wrap == "fsdp" else p.grad for p in model.parameters()]
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_two_processes_are_one(wrap, tmp_path):
    pair = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path), wrap]) for rank in range(2)]
    assert [one.wait(timeout=120) for one in pair] == [0, 0]
    model = network()
    model(inputs()).square().mean().backward()
    gradients = torch.load(tmp_path / "gradients.pt")
    for ours, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, atol=1e-6, rtol=1e-5)


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2], sys.argv[3])
