"""Two processes that shard the model and the data: they begin, train, stop and go on as one does."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.utilities.seed import isolate_rng
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import tenfold.hunyuan_moe
from tenfold.core.training.sharding import fill, shard, sharding_mesh
from tenfold.hunyuan_moe import HunyuanLarge

CONFIGS = Path(tenfold.hunyuan_moe.__file__).parent / "configs"

SCRIPT = Path(__file__).with_name("sharded.py")


def two_processes(what, folder, text):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    common["TENFOLD_CACHE"] = str(folder / "cache")
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), what, str(folder), text],
            env=os.environ | common | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return torch.load(folder / f"{what}.pt")


def test_routers_of_a_half_precision_model(tmp_path):
    """They are in float32, the layers around them are not."""
    module = HunyuanLarge(vocab_size=30, layers=2, dim=16, heads=2, ffn=8, experts=4)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        module.configure_model()
        module.bfloat16()
        shard(module, module.lm.model.layers, mesh)
        module(torch.arange(9)[None]).mean().backward()
        gate = module.lm.model.layers[0].mlp.gate.wg.weight
        assert gate.dtype == gate.grad.dtype == torch.float32
        assert gate.grad.full_tensor().abs().max() > 0
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path, monkeypatch):
    """One test for all that they do: their start takes longer than their work."""
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "numbers.txt"
    text.write_text("\n\n".join(" ".join(str(i * j % 97) for j in range(60)) for i in range(60)))
    script = runpy.run_path(str(SCRIPT))
    with isolate_rng():
        torch.manual_seed(3)
        for name in ("one", "odd"):
            options = script["OPTIONS"][name]
            module = HunyuanLarge(**script["SIZES"], **options)
            module.configure_model()
            module.lm.save_pretrained(tmp_path / str(options["experts"]))
            module = script["train"](name, str(text), weights=tmp_path / str(options["experts"]))
            torch.save({n: p.detach() for n, p in module.lm.named_parameters()}, tmp_path / f"{name}.pt")
        whole = HunyuanLarge(**script["SIZES"], **script["OPTIONS"]["begin"])
        whole.configure_model()
    first = two_processes("first", tmp_path, str(text))
    check_that_two_are_one(first, tmp_path)
    check_that_no_process_ever_held_the_model(whole.lm, tmp_path)
    check_that_the_last_checkpoint_is_whole(tmp_path / "last")
    resumed = two_processes("resumed", tmp_path, str(text))["resumed"]
    # the places of recycled tokens included, which are random, and each process's own
    assert all(torch.equal(resumed[name], weight) for name, weight in first["straight"].items())


def check_that_two_are_one(first, folder):
    """From weights in a folder; whole experts each, halves of an odd number of them, copies of all."""
    for name, same, experts in (
        ("one", "one", (2, 16, 16)),
        ("odd", "odd", (3, 8, 16)),
        ("copies", "odd", (3, 16, 16)),
    ):
        two, shape = first[name]
        assert shape == experts
        one = torch.load(folder / f"{same}.pt")
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
        assert all(w.std() > 1e-4 for name, w in one.items() if "norm" in name)  # they began as ones


def check_that_no_process_ever_held_the_model(whole, folder):
    """Only shards got memory, and those began as the whole model's weights do."""
    mine, others = (torch.load(folder / f"begin{rank}.pt") for rank in range(2))
    expected = dict(whole.named_parameters())
    assert mine["weights"].keys() == expected.keys()
    largest = max(p.numel() for p in expected.values())
    assert max(mine["largest"], others["largest"]) <= largest // 2 + 16
    for name, weight in mine["weights"].items():
        assert weight.shape == expected[name].shape
        if "norm" in name:
            assert (weight == 1).all(), name
        else:
            assert weight.std() == pytest.approx(0.2, rel=4.5 / (2 * weight.numel()) ** 0.5), name  # standard errors
            assert not torch.equal(mine["local"][name], others["local"][name]), name
        assert torch.equal(weight, others["weights"][name])
    assert mine["tied"]
    torch.testing.assert_close(mine["frequencies"], whole.model.rotary_emb.inv_freq)


def check_that_the_last_checkpoint_is_whole(folder):
    """It was written after each update, beside the one before."""
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt" / "meta.pt", weights_only=True)["global_step"] == 4


@pytest.fixture
def processes_of_the_paper():
    """Process 3 of the 2048 that the paper's config asks for, the others imagined."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=2048)
    yield init_device_mesh("cpu", (2048, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


def test_every_process_of_the_papers_run_has_a_fair_share(processes_of_the_paper):
    """Weights, gradients and Adam's two moments in float32 are 24 GB of an accelerator."""
    settings = yaml.safe_load((CONFIGS / "paper.yaml").read_text())
    with torch.device("meta"):
        module = HunyuanLarge(**settings["model"]["init_args"])
        module.configure_model()
    shard(module, module.lm.base_model.layers, sharding_mesh(processes_of_the_paper, module.hparams.shard_size))
    held = sum(p.to_local().numel() for p in module.lm.parameters())
    assert held == pytest.approx(388_698_128_640 / 256, rel=0.01)
    assert 16 * held < 25e9


def test_copies_begin_alike():
    """Of four imagined processes, 0 and 2 hold the first half of the rows, 1 and 3 the second."""
    found, before = [], torch.get_rng_state()
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            with torch.device("meta"):
                module = HunyuanLarge(vocab_size=64, layers=2, dim=16, heads=2, ffn=8, experts=4)
                module.configure_model()
            processes = init_device_mesh("cpu", (4, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
            mesh = sharding_mesh(processes, 2)
            shard(module, module.lm.base_model.layers, mesh)
            fill(module, module.lm, mesh, device=torch.device("cpu"), seed=5)
            found.append({name: p.to_local().clone() for name, p in module.lm.named_parameters()})
        finally:
            dist.destroy_process_group()
    for name in found[0]:
        assert torch.equal(found[0][name], found[2][name]), name
        assert torch.equal(found[1][name], found[3][name]), name
        assert torch.equal(found[0][name], found[1][name]) == ("norm" in name), name
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_sharded(processes_of_the_paper):
    with pytest.raises(ValueError, match="shard_size: 3 does not divide the 2048 processes"):
        sharding_mesh(processes_of_the_paper, 3)
    tensor_parallel = init_device_mesh("cpu", (1024, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    with pytest.raises(ValueError, match="tensor_parallel_size: must be 1"):
        sharding_mesh(tensor_parallel, None)
