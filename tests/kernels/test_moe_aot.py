"""The mixture-of-experts kernels at the tile sizes they ship, compiled for chips that are not here."""

import os

import pytest
import torch

from tenfold.kernels.testing import compile_launch, recorded_launches, shared_limit

kernels = pytest.importorskip("tenfold.kernels.moe.triton")
routing = pytest.importorskip("tenfold.kernels.moe.triton_routing")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

HALF, FULL = torch.bfloat16, torch.float32
CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
PRODUCTS = [
    *((chip, HALF, "highest", 128) for chip in (*CHIPS, "sm_86", "sm_120")),
    *((chip, FULL, "highest", 128) for chip in CHIPS),
    ("sm_90", FULL, "high", 128),
    *((chip, HALF, "highest", 16) for chip in CHIPS),  # a token or two for each expert
    *((chip, FULL, "medium", 64) for chip in CHIPS[:3]),
    ("sm_120", FULL, "highest", 128),
]


def product_launches(chip, dtype, precision, rows):
    """The launches of a product and its backward, as that chip would get them: of small groups the first alone."""
    E, K, N = 16, 512, 1024
    x, grad = torch.zeros(E * rows, K, dtype=dtype), torch.zeros(E * rows, N, dtype=dtype)
    weight = torch.zeros(E, N, K, dtype=dtype).transpose(1, 2)
    offsets = torch.zeros(E + 1, dtype=torch.int64)
    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as recorded:
        patch.setattr(kernels, "architecture", lambda x: chip)
        patch.setattr(torch.version, "hip", "6.4" if chip.startswith("gfx") else None)
        torch.set_float32_matmul_precision(precision)
        kernels.grouped_matmul(x, weight, offsets)
        if rows == 128:
            kernels.grouped_matmul_backward(grad, x, weight, offsets, [True, True])
    torch.set_float32_matmul_precision(before)
    names = [launch.kernel.__name__ for launch in recorded]
    assert names == ["_matmul_kernel", "_matmul_kernel", "_dweight_kernel"][: len(names)]
    return recorded


def feed_forward_launches(chip, dtype, precision, rows):
    """The launches of a feed-forward and its backward, in the transformers' layout; of small groups the forward's."""
    E, K, inner = 16, 512, 1024
    x, grad = torch.zeros(E * rows, K, dtype=dtype), torch.zeros(E * rows, K, dtype=dtype)
    gate_up, down = torch.zeros(E, 2 * inner, K, dtype=dtype), torch.zeros(E, K, inner, dtype=dtype)
    offsets = torch.zeros(E + 1, dtype=torch.int64)
    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as recorded:
        patch.setattr(kernels, "architecture", lambda x: chip)
        patch.setattr(torch.version, "hip", "6.4" if chip.startswith("gfx") else None)
        torch.set_float32_matmul_precision(precision)
        _, hidden = kernels.grouped_swiglu(x, gate_up, down, offsets, rows == 128)
        if rows == 128:
            kernels.grouped_swiglu_backward(grad, x, gate_up, down, offsets, hidden, [True, True, True])
    torch.set_float32_matmul_precision(before)
    names = [launch.kernel.__name__ for launch in recorded]
    backward = ["_matmul_kernel", "_swiglu_backward_kernel", "_matmul_kernel", "_dweight_kernel", "_dweight_kernel"]
    assert names == ["_matmul_kernel", "_matmul_kernel", *backward][: len(names)]
    return recorded[:1] + [launch for launch in recorded if launch.kernel.__name__ == "_swiglu_backward_kernel"]


def routing_launches(tokens, experts, top_k):
    logits = torch.zeros(tokens, experts)
    with recorded_launches() as recorded:
        outputs = routing.route_tokens(logits, top_k, tokens * top_k // experts, True, torch.zeros(1).long())
        assert len(recorded) == 3  # as promised
        routing.route_tokens_backward(outputs[0], outputs[1], logits, outputs[2], outputs[0], outputs[-1])
    return recorded


def permutation_launches(dtype):
    y, row, weight = torch.zeros(512, 1024, dtype=dtype), torch.zeros(256, 2).long(), torch.zeros(256, 2)
    with recorded_launches() as recorded:
        kernels.permute(y[:256], row)
        kernels.permute_backward(y, row)
        kernels.unpermute(y, weight, row, row > 0)
        kernels.unpermute_backward(y[:256], y, weight, row, row > 0)
    return recorded


OTHERS = {
    **{(chip, "route 128 experts"): lambda: routing_launches(32768, 128, 8) for chip in CHIPS},
    ("sm_90", "route 16 experts"): lambda: routing_launches(1024, 16, 1),
    **{(chip, "permute"): lambda: permutation_launches(HALF) for chip in ("sm_90", "gfx942")},
}


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_grouped_products(case):
    chip, dtype, precision, _ = case
    for launch in product_launches(*case):
        compiled = compile_launch(launch, target=chip)
        assert compiled.spilled == 0, compiled
        assert compiled.shared <= shared_limit(chip), compiled
        assert (compiled.tensor_core > 0) == (dtype == HALF or precision != "highest" or chip == "gfx942"), compiled
        assert compiled.loads[16] > 0, compiled
        assert min(compiled.loads) >= 8, compiled  # the offsets; all else is wider


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_feed_forwards(case):
    chip, dtype, precision, _ = case
    for launch in feed_forward_launches(*case):
        compiled = compile_launch(launch, target=chip)
        assert compiled.spilled == 0, compiled
        assert compiled.shared <= shared_limit(chip), compiled
        if "gfx" not in chip:
            assert compiled.loads[16] > 0, compiled
        if launch.kernel.__name__ == "_matmul_kernel":
            assert (compiled.tensor_core > 0) == (dtype == HALF or precision != "highest" or chip == "gfx942"), compiled


@pytest.mark.parametrize("case", OTHERS, ids="-".join)
def test_routing_and_permutation(case):
    for launch in OTHERS[case]():
        compiled = compile_launch(launch, target=case[0])
        assert compiled.spilled == 0, compiled
        assert compiled.shared <= shared_limit(case[0]), compiled
        if "gfx" not in case[0]:
            assert compiled.loads[16] > 0, compiled
