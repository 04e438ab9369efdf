"""The Triton kernels of `linear_logprob` as they ship, compiled ahead of time for chips that are not here."""

import os

import pytest
import torch

from tenfold.kernels.testing import compile_launch, recorded_launches, shared_limit

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")


def launches(monkeypatch, chip, dtype, precision, *, bias=False, dim=512):
    """The forward's two launches and the backward's one, as a call on that chip would make them."""
    from tenfold.kernels.logprob import triton as kernels

    monkeypatch.setattr(kernels, "architecture", lambda x: chip)
    monkeypatch.setattr(kernels, "_precision", lambda: precision)
    monkeypatch.setattr(kernels, "_multiply", lambda a, b, out: None)  # cuBLAS's part: a CPU has no mixed product
    hidden, weight = torch.zeros(300, dim, dtype=dtype), torch.zeros(1000, dim, dtype=dtype)
    target, offset = torch.zeros(300, dtype=torch.int64), torch.zeros(1000, dtype=dtype) if bias else None
    with recorded_launches() as recorded:
        kernels.forward(hidden, weight, target, offset, -100)
        kernels.backward(torch.zeros(300), hidden, weight, target, offset, -100, [False, False, False])
    assert len(recorded) == 3
    return recorded


@pytest.mark.parametrize(
    ("chip", "dtype", "precision"),
    [(chip, torch.bfloat16, "ieee") for chip in (*CHIPS, "sm_86", "sm_120")]
    + [("sm_90", torch.float16, "ieee")]
    + [(chip, torch.float32, "ieee") for chip in CHIPS]
    + [(chip, torch.float32, p) for chip in (*CHIPS[:3], "sm_120") for p in ("tf32", "tf32x3")],
)
def test_the_forward_compiles_into_what_the_chip_is_fast_at(monkeypatch, chip, dtype, precision):
    kernel, *_ = launches(monkeypatch, chip, dtype, precision)
    compiled = compile_launch(kernel, target=chip)
    assert compiled.spilled == 0
    assert compiled.shared <= shared_limit(chip)
    if dtype != torch.float32 or precision != "ieee" or chip.startswith("gfx"):
        assert compiled.tensor_core > 0
    assert compiled.loads[16] > 0
    assert min(compiled.loads) >= 8  # the targets; all else is wider


@pytest.mark.parametrize("chip", CHIPS)
def test_an_odd_depth_and_a_bias_compile_too(monkeypatch, chip):
    kernel, *_ = launches(monkeypatch, chip, torch.bfloat16, "ieee", bias=True, dim=72)
    compiled = compile_launch(kernel, target=chip)
    assert compiled.spilled == 0
    assert compiled.tensor_core > 0
    assert compiled.loads[16] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chip", CHIPS)
def test_the_other_kernels_compile(monkeypatch, chip, dtype):
    _, merge, backward = launches(monkeypatch, chip, dtype, "ieee", bias=True)
    for kernel in (merge, backward):
        compiled = compile_launch(kernel, target=chip)
        assert compiled.spilled == 0
        assert compiled.shared <= shared_limit(chip)
    assert compiled.loads[16] > 0
