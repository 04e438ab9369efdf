"""The Triton kernels of `latent_attention` as they ship, compiled ahead of time for chips that are not here."""

import os

import pytest
import torch

from tenfold.kernels import pack_latents
from tenfold.kernels.testing import compile_launch, latent_inputs, recorded_launches, shared_limit

kernels = pytest.importorskip("tenfold.kernels.latent.triton")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

HALF, FULL = torch.bfloat16, torch.float32
CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
FORMATS = {  # of the latents, and of the rotary keys where those have another
    "4": ({"bits": 4},),
    "8": ({"bits": 8},),
    "asymmetric 4": ({"bits": 4, "code": "asymmetric"},),
    "asymmetric 8": ({"bits": 8, "code": "asymmetric"},),
    "FP4 and FP8": ({"bits": 4, "code": "float"}, {"bits": 8, "code": "float"}),
    "4 without scales": ({"bits": 4, "scale_dtype": None}, {"bits": 4}),
    "FP8 without scales": ({"bits": 8, "code": "float", "scale_dtype": None}, {"bits": 8, "code": "float"}),
}
# Chip, dtype of the queries, format of the cache, queries, and whether a mask hides keys.
CASES = [
    *((chip, HALF, "4", 1, False) for chip in (*CHIPS, "sm_86")),
    *((chip, HALF, "4", 64, True) for chip in CHIPS),
    *((chip, HALF, "8", 1, True) for chip in CHIPS),
    *((chip, HALF, "FP4 and FP8", 1, False) for chip in CHIPS),
    ("sm_80", HALF, "asymmetric 8", 1, False),  # the combinations that spilled with larger tiles
    ("gfx942", HALF, "asymmetric 4", 1, False),
    ("sm_100", HALF, "asymmetric 4", 64, True),
    ("sm_100", HALF, "4 without scales", 64, True),
    ("sm_90", HALF, "4 without scales", 1, False),
    ("gfx942", HALF, "FP8 without scales", 64, True),
    ("sm_90", HALF, None, 1, False),
    ("sm_90", torch.float16, None, 64, False),
    ("sm_90", FULL, "4", 1, False),
    ("gfx942", FULL, "4", 1, False),
]


def launches(chip, dtype, format, queries, masked):
    """The two launches of a call at the paper's sizes, as that chip would get them."""
    tensors = latent_inputs(1, 16, queries, 4096, 512, rope=64, dtype=dtype)
    cache = [tensors["latent"], tensors["rope"]]
    if format is not None:
        first, second = FORMATS[format][0], FORMATS[format][-1]
        cache = [pack_latents(cache[0], **first), pack_latents(cache[1], **second)]
    mask = torch.ones(1, 16, queries, 4096, dtype=torch.bool) if masked else None
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as recorded:
        patch.setattr(kernels, "architecture", lambda x: chip)
        patch.setattr(torch.version, "hip", "6.4" if chip.startswith("gfx") else None)
        kernels.forward(tensors["query_latent"], tensors["query_rope"], *cache, mask, True, 0.1)
    assert [launch.kernel.__name__ for launch in recorded] == ["_split_kernel", "_merge_kernel"]
    return recorded


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_what_the_compilers_make_of_the_kernel(case):
    chip, dtype, _, _, masked = case
    compiled = compile_launch(launches(*case)[0], target=chip)
    assert compiled.spilled == 0, compiled
    assert compiled.shared <= shared_limit(chip), compiled
    # NVIDIA's tensor cores do not take full float32.
    assert (compiled.tensor_core > 0) == (dtype != FULL or chip == "gfx942"), compiled
    assert max(compiled.loads) == 16, compiled  # codes and queries
    if not masked:  # the narrowest are of scales, half-precision numbers; those of a mask are bytes
        assert min(compiled.loads) >= 2, compiled


@pytest.mark.parametrize("chip", CHIPS)
def test_the_merge_compiles(chip):
    compiled = compile_launch(launches(chip, HALF, "4", 1, False)[1], target=chip)
    assert compiled.spilled == 0
    assert max(compiled.loads) == 16


@pytest.mark.parametrize(("switch", "products"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_follows_torchs_switch(switch, products):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(switch)
    try:
        split, _ = launches("sm_90", FULL, "4", 1, False)
    finally:
        torch.set_float32_matmul_precision(before)
    assert split.kwargs["PRECISION"] == products
    compiled = compile_launch(split, target="sm_90")
    assert compiled.spilled == 0
    assert (compiled.tensor_core > 0) == (switch != "highest")
