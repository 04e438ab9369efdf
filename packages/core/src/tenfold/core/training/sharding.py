"""A model spread over processes (FSDP2) that no process ever holds whole: sharded on the meta device, then filled."""

import warnings

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel


def sharding_mesh(processes: DeviceMesh, shard_size: int | None) -> DeviceMesh:
    """The mesh for `fully_shard`: all processes, or groups of `shard_size` that hold copies of each other (HSDP).

    Raises:
        ValueError: tensor parallelism, or groups that do not come out even.
    """
    if processes["tensor_parallel"].size() > 1:
        raise ValueError("trainer.strategy.tensor_parallel_size: must be 1, layers are sharded over data_parallel_size")
    mesh = processes["data_parallel"]
    if shard_size is None:
        return mesh
    if not 1 <= shard_size <= mesh.size() or mesh.size() % shard_size:
        raise ValueError(f"shard_size: {shard_size} does not divide the {mesh.size()} processes")
    return init_device_mesh(
        mesh.device_type, (mesh.size() // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
    )


def shard(root: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
    """Shard each layer by itself, and with `root` what is in none of them.

    Of the experts, which are stacked in one tensor, a process keeps whole ones where they come out even, and else an
    equal share of each: sixteen experts on 256 processes would leave most of them without any.
    """
    # Of what we return, such as keys for the next layer. Nothing is written into in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    size = mesh.size(-1)

    def placement(parameter: nn.Parameter) -> Shard:
        by_rows = parameter.ndim == 3 and parameter.shape[0] % size and parameter.shape[1] % size == 0
        return Shard(1 if by_rows else 0)

    for layer in layers:
        for module in _of_another_dtype(layer):  # what is gathered together has one dtype
            fully_shard(module, mesh=mesh)
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(root, mesh=mesh, shard_placement_fn=placement)


def _of_another_dtype(layer: nn.Module) -> list[nn.Module]:
    """The largest modules of `layer` without a weight of its first weight's dtype, such as a router in float32."""
    dtype = next(layer.parameters()).dtype
    found: list[nn.Module] = []
    for module in layer.modules():  # parents before children
        dtypes = {p.dtype for p in module.parameters()}
        if dtypes and dtype not in dtypes and all(module not in parent.modules() for parent in found):
            found.append(module)
    return found


@torch.no_grad()
def fill(root: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, *, device: torch.device, seed: int) -> None:
    """Give the shards memory, and their initial weights by the model's own rule, which must not depend on the shape.

    Shards differ from each other, copies of a shard do not. The global random states are left as they were.

    Args:
        root: what was sharded, on the meta device.
        model: in it, whose `_init_weights` says what a weight begins as; buffers, such as rotary frequencies, too.
        mesh: over which it was sharded.
        device: of this process.
        seed: the same in all processes.
    """
    root.to_empty(device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        own = np.random.default_rng([seed, mesh.get_local_rank(mesh.ndim - 1)])
        torch.manual_seed(int(own.integers(2**63)))
        for module in model.modules():
            parameters = dict(module.named_parameters(recurse=False))
            # A random op on a DTensor draws alike in all processes on a CPU: let the rule see plain, local tensors.
            module._parameters.update({n: nn.Parameter(_local(p)) for n, p in parameters.items()})
            try:
                model._init_weights(module)
            finally:
                module._parameters.update(parameters)


def _local(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
