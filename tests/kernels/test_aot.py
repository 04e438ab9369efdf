"""The kernels at the tile sizes they ship, compiled for chips that are not here: resources, not speed."""

import os

import pytest
import torch

from tenfold.kernels.testing import compile_ahead, compile_launch, recorded_launches, shared_limit

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
cog = pytest.importorskip("tenfold.kernels.cog.triton")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

HALF, FULL = torch.bfloat16, torch.float32
CASES = [
    *((chip, HALF, dim, "causal") for chip in ("sm_80", "sm_90", "sm_100", "gfx942") for dim in (64, 128, 256)),
    *(("sm_86", HALF, dim, "causal") for dim in (128, 256)),
    *((chip, HALF, 128, "mask") for chip in ("sm_80", "sm_90", "gfx942")),
    ("sm_90", HALF, 256, "mask"),
    *(("sm_90", FULL, dim, "causal") for dim in (64, 128, 256)),
    ("gfx942", FULL, 128, "causal"),
]


def launches(chip, dtype, dim, hiding):
    """The launches of a forward and a backward, as that chip would get them."""
    x = torch.zeros(1, 2, 256, dim, dtype=dtype)
    mask = torch.ones(1, 2, 256, 256, dtype=torch.bool) if hiding == "mask" else None
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as recorded:
        patch.setattr(cog, "architecture", lambda x: chip)
        patch.setattr(torch.version, "hip", "6.4" if chip.startswith("gfx") else None)
        out, lse = cog.forward(x, x, x, mask, True, 0.1)
        cog.backward(x, x, x, x, out, lse, mask, True, 0.1)
    assert [launch.kernel.__name__ for launch in recorded] == [
        "_forward_kernel",
        "_dq_kernel",
        "_dkdv_kernel",
    ]
    return recorded


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_cog_attention(case):
    chip, dtype, _, hiding = case
    for launch in launches(*case):
        compiled = compile_launch(launch, target=chip)
        assert compiled.spilled == 0, compiled
        assert compiled.shared <= shared_limit(chip), compiled
        assert launch.kwargs["enable_fp_fusion"]  # by default, Triton 3.10 would leave multiply-adds apart
        # NVIDIA's tensor cores do not take full float32.
        assert (compiled.tensor_core > 0) == (dtype == HALF or chip == "gfx942"), compiled
        assert max(compiled.loads) == 16, compiled
        if hiding == "causal":  # narrower ones than of a row's L and D are of a mask's bytes
            assert min(compiled.loads) >= 4, compiled


@pytest.mark.parametrize(("switch", "products"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_follows_torchs_switch(switch, products):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(switch)
    try:
        recorded = launches("sm_90", FULL, 128, "causal")
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(launch.kwargs["PRECISION"] == products for launch in recorded)
    if switch == "high":
        compiled = [compile_launch(launch, target="sm_90") for launch in recorded]
        assert all(c.tensor_core > 0 and c.spilled == 0 for c in compiled), compiled


@triton.jit
def double(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


SIGNATURE = {"out_ptr": "*fp32", "x_ptr": "*fp32", "n": "i32"}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_hints_decide_the_width_of_loads(target):
    # 1024 elements on 4 warps of 32 (AMD: 64) threads: 32 (16) bytes a thread.
    plain = compile_ahead(double, SIGNATURE, {"BLOCK": 1024}, target=target)
    hinted = compile_ahead(double, SIGNATURE, {"BLOCK": 1024}, target=target, divisible=SIGNATURE)
    threads = 256 if target == "gfx942" else 128
    assert plain.loads == {4: 1024 // threads}
    assert hinted.loads == {16: 1024 // threads // 4}
    assert hinted.tensor_core == hinted.spilled == 0
    assert hinted.registers > 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="target: unknown 'h100'; accepted: sm_80"):
        compile_ahead(double, SIGNATURE, {"BLOCK": 64}, target="h100")
    with pytest.raises(ValueError, match="double: has no arguments m; it has out_ptr"):
        compile_ahead(double, SIGNATURE | {"m": "i32"}, {"BLOCK": 64}, target="sm_90")
    with pytest.raises(ValueError, match="double: neither signature nor constexprs has BLOCK"):
        compile_ahead(double, SIGNATURE, {}, target="sm_90")
    with pytest.raises(TypeError, match=r"under @triton\.jit alone, got function"):
        compile_ahead(lambda x: x, {}, {}, target="sm_90")
