"""The quantization kernels as they ship, compiled ahead of time for chips that are not here."""

import os

import pytest
import torch

from tenfold.kernels import FloatFormat
from tenfold.kernels.testing import compile_launch, recorded_launches, shared_limit

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")


def elementwise(scale, axis, rounding, output, dtype, name="e4m3"):
    """The launch that quantizes a matrix."""
    from tenfold.kernels.quant import triton as kernels
    from tenfold.kernels.quant.scales import split

    groups = split(torch.zeros(512, 1024, dtype=dtype), scale, 128, axis)
    options = {"scale_rounding": "exact" if scale else None, "output": output}
    options["dtype"] = torch.uint8 if output == "code" else dtype
    with recorded_launches() as recorded:
        kernels.quantize(groups, None, torch.tensor(0), FloatFormat.parse(name), 480.0, rounding, **options)
    (launch,) = recorded
    return launch


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("scale", "axis", "rounding", "output", "dtype"),
    [
        ("block", 1, "even", "number", torch.bfloat16),
        ("block", 1, "even", "number", torch.float32),
        ("block", 0, "even", "number", torch.bfloat16),
        ("axis", 1, "away", "number", torch.float32),
        ("tensor", 1, "even", "number", torch.float32),
        (None, 1, "stochastic", "number", torch.bfloat16),
        ("block", 1, "even", "code", torch.bfloat16),
    ],
)
def test_quantizing_compiles_with_wide_loads(chip, scale, axis, rounding, output, dtype):
    compiled = compile_launch(elementwise(scale, axis, rounding, output, dtype), target=chip)
    assert compiled.spilled == 0
    assert compiled.shared <= shared_limit(chip)
    assert compiled.loads[16] > 0


def product(monkeypatch, chip, dtype, rows, a_format, b_format, **options):
    """The launch that multiplies."""
    from tenfold.kernels.quant import triton_matmul as kernels

    monkeypatch.setattr(kernels, "architecture", lambda x: chip)
    a, b = torch.zeros(rows, 1024, dtype=dtype), torch.zeros(2048, 1024, dtype=dtype)
    full = {"a_scale": "block", "b_scale": "block", "block_size": 128, "rounding": "even", "scale_rounding": "exact"}
    formats = [f and FloatFormat.parse(f) for f in (a_format, b_format)]
    with recorded_launches() as recorded:
        kernels.matmul(a, b, *formats, **full | options)
    assert recorded[-1].kernel.__name__ == "_matmul_kernel"
    return recorded[-1]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("dtype", "rows", "a_format", "b_format", "options"),
    [
        (torch.bfloat16, 16, None, "e2m1", {}),  # a few tokens: the weight is quantized as it is loaded
        (torch.bfloat16, 64, "e4m3", "e4m3", {}),
        (torch.bfloat16, 256, "e4m3", "e4m3", {"block_size": 32}),
        (torch.bfloat16, 256, None, "e2m1", {}),
        (torch.bfloat16, 256, None, "e2m1", {"b_scale": "axis"}),
        (torch.bfloat16, 4096, "e4m3", "e4m3", {}),  # many: both are quantized before
        (torch.bfloat16, 4096, "e4m3fn", "e2m1", {}),  # float8 where there is any
        (torch.bfloat16, 64, "e4m3fn", "e5m2ocp", {"a_scale": "axis", "b_scale": "axis"}),
        (torch.float16, 256, "e5m2ocp", None, {"a_scale": "tensor"}),
        (torch.float32, 256, "e3m8", "e3m8", {}),
        (torch.float32, 256, None, "e3m2", {"block_size": 64}),
    ],
)
def test_products_compile_to_tensor_core_code(monkeypatch, chip, dtype, rows, a_format, b_format, options):
    launch = product(monkeypatch, chip, dtype, rows, a_format, b_format, **options)
    compiled = compile_launch(launch, target=chip)
    assert compiled.spilled == 0, compiled
    assert compiled.shared <= shared_limit(chip), compiled
    full = dtype == torch.float32 and a_format is None  # NVIDIA's tensor cores do not take full float32
    assert compiled.tensor_core > 0 or (full and not chip.startswith("gfx")), compiled
    assert compiled.loads[16] > 0


def test_float8_is_multiplied_where_the_chip_has_it(monkeypatch):
    from tenfold.kernels.quant.triton_matmul import dot_dtypes

    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2

    def kinds(a, b, chip="sm_90", dtype=torch.bfloat16):
        return dot_dtypes(dtype, FloatFormat.parse(a), FloatFormat.parse(b), chip)

    for small in ("e4m3fn", "e2m1", "e3m2", "e2m3", "e1m3", "e4m2", "e0m4"):
        assert kinds(small, "e4m3fn") == (e4m3, e4m3)
    assert kinds("e5m2ocp", "e2m1") == (e5m2, e4m3)
    assert kinds("e5m1b17", "e2m1") == (torch.bfloat16, torch.bfloat16)
    assert kinds("e4m3", "e4m3fn") == (torch.bfloat16, torch.bfloat16)  # 480
    assert kinds("e4m3fn", "e4m3fn", "sm_80") == (torch.bfloat16, torch.bfloat16)
    assert kinds("e4m3fn", "e4m3fn", "gfx942") == (torch.bfloat16, torch.bfloat16)
    assert kinds("e3m8", "e2m1") is None
    assert kinds("e3m8", "e2m1", dtype=torch.float16) == (torch.float16, torch.float16)
    assert kinds("e7m2", "e2m1") is None
    launch = product(monkeypatch, "sm_90", torch.bfloat16, 4096, "e4m3fn", "e2m1")
    assert [t.dtype for t in launch.args[:4:3]] == [e4m3, e4m3]
