"""Which backend runs, and what a call sees of autocast."""

import os
import threading

import pytest
import torch

from tenfold.kernels import backend, cog_attention, use_backend
from tenfold.kernels.backend import autocast, choose_backend

CPU = torch.zeros(1)


class Elsewhere:
    """Stands for a tensor on a device that this machine lacks."""

    def __init__(self, device):
        self.device = torch.device(device)


def test_the_device_decides():
    assert choose_backend(CPU) == "cpu"
    assert choose_backend(Elsewhere("cuda:1")) == "triton"
    assert choose_backend(Elsewhere("mps")) == "reference"
    assert choose_backend(Elsewhere("xpu")) == "reference"


def test_blocks_nest_and_end():
    with use_backend("reference"):
        assert choose_backend(CPU) == choose_backend(Elsewhere("cuda")) == "reference"
        with use_backend("cpu"):
            assert choose_backend(CPU) == "cpu"
        assert choose_backend(CPU) == "reference"
    assert choose_backend(CPU) == "cpu"


def test_an_exception_ends_the_block():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose_backend(CPU) == "cpu"


def test_other_threads_are_left_alone():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose_backend(CPU)))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


@pytest.mark.parametrize("name", ["cuda", "", None])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"name: unknown backend .* accepted: reference, cpu, triton"):
        use_backend(name).__enter__()


def test_a_backend_that_cannot_run_raises(monkeypatch):
    query = torch.zeros(1, 1, 2, 4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="'triton' was asked for, but the tensors are on cpu"):
            cog_attention(query, query, query)
        assert choose_backend(Elsewhere("cuda")) == "triton"
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was asked for, .* are on cuda:0"):
        choose_backend(Elsewhere("cuda:0"))


def test_the_interpreter_takes_cpu_tensors(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    with use_backend("triton"):
        assert choose_backend(CPU) == "triton"
    assert choose_backend(CPU) == "cpu"


def test_the_triton_backend_refuses_float64(monkeypatch):
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    query = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    with (
        use_backend("triton"),
        pytest.raises(TypeError, match="query: float64 is not supported by the triton"),
    ):
        cog_attention(query, query, query)


def test_the_named_backend_is_what_runs(monkeypatch):
    from tenfold.kernels.cog import cpu, reference

    ran = []
    for module, function in ((cpu, "forward"), (reference, "cog_attention")):
        original = getattr(module, function)

        def noted(*args, original=original, module=module, **kwargs):
            ran.append(module.__name__.rpartition(".")[2])
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, noted)
    query = torch.ones(1, 1, 2, 4)
    cog_attention(query, query, query)
    with use_backend("reference"):
        cog_attention(query, query, query)
    assert ran == ["cpu", "reference"]


def test_a_compiled_function_follows_the_block():
    found = []

    def capture(graph, inputs):
        found.append(any("tenfold" in str(node.target) for node in graph.graph.nodes))
        return graph

    attention = torch.compile(cog_attention, backend=capture, fullgraph=True)
    query = torch.randn(1, 2, 3, 4)
    expected = cog_attention(query, query, query)
    torch.testing.assert_close(attention(query, query, query), expected)
    with use_backend("reference"):
        torch.testing.assert_close(attention(query, query, query), expected)
    torch.testing.assert_close(attention(query, query, query), expected)
    assert found == [True, False]


def test_autocast_leaves_float64_integers_and_other_devices():
    tensors = torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    assert all(a is b for a, b in zip(autocast(*tensors), tensors, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert [x.dtype for x in autocast(*tensors)] == [torch.bfloat16, torch.float64, torch.int64]
    with torch.autocast("cuda", torch.float16, enabled=torch.cuda.is_available()):
        assert autocast(tensors[0])[0] is tensors[0]
