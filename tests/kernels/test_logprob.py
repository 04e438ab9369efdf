"""`linear_logprob` on the CPU against its float64 definition, torch's cross entropy, and toys by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tenfold.kernels import linear_logprob, use_backend
from tenfold.kernels.logprob import cpu
from tenfold.kernels.testing import check_op, logprob_inputs, peak_memory, poisoned_scratch, with_margin

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
GRADS = ("hidden", "weight", "bias")


def reference(**arguments):
    with use_backend("reference"):
        return linear_logprob(**arguments)


def check(tensors, **options):
    check_op(linear_logprob, reference, tensors, grads=[n for n in GRADS if n in tensors], **options)


def output_and_gradients(f, tensors, **options):
    names = [n for n in GRADS if n in tensors]
    leaves = {name: x.detach().requires_grad_(name in names) for name, x in tensors.items()}
    out = f(**leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, [leaves[name] for name in names], grad)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles each way at the sizes of a test."""
    monkeypatch.setattr(cpu, "ROWS", 8)
    monkeypatch.setattr(cpu, "TILE", 256)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocab", "dim"),
    [
        (37, 101, 16),  # one tile
        (1100, 1100, 8),  # two rows of tiles, two columns, none of the last ones full
        (1024, 2048, 8),  # whole tiles
        (1, 997, 24),
        (37, 1, 16),  # one token: certain
        (1, 1, 1),
        (0, 5, 4),
    ],
)
def test_output_and_gradients_are_within_the_budget(dtype, bias, rows, vocab, dim):
    check(logprob_inputs(rows, vocab, dim, bias=bias, ignored=0.3, dtype=dtype))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes_in_any_tiles(data):
    rows, vocab, dim = (data.draw(st.integers(low, 70)) for low in (0, 1, 1))
    tensors = logprob_inputs(
        *(rows, vocab, dim),
        bias=data.draw(st.booleans()),
        ignored=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        ignore_index=(ignore_index := data.draw(st.sampled_from([-100, 0, 10**6]))),
        dtype=data.draw(st.sampled_from(HALF_AND_FULL)),
        layout=data.draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])),
        seed=data.draw(st.integers(0, 99)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "ROWS", data.draw(st.integers(1, 80)))
        patch.setattr(cpu, "TILE", data.draw(st.integers(1, 2000)))
        check(tensors, ignore_index=ignore_index)


def test_it_is_minus_the_cross_entropy(backend):
    tensors = logprob_inputs(50, 301, 16, bias=True, ignored=0.2)

    def cross_entropy(hidden, weight, target, bias):
        return -F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none")

    ours, theirs = (output_and_gradients(f, tensors) for f in (linear_logprob, cross_entropy))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_worked_by_hand(backend):
    # Row 0 makes all 3 tokens equally likely; row 1 has scores 0, log 2, log 5: probabilities 1/8, 2/8, 5/8.
    hidden = torch.tensor([[0.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], requires_grad=True)
    logp = linear_logprob(hidden, weight, torch.tensor([1, 2]))
    torch.testing.assert_close(logp, torch.tensor([-math.log(3), math.log(5 / 8)]))
    dhidden, dweight = torch.autograd.grad(logp.sum(), (hidden, weight))
    torch.testing.assert_close(dweight, torch.tensor([[-1 / 8], [-2 / 8], [3 / 8]]))
    expected = [2 * math.log(2) / 3 - math.log(5) / 3, 3 / 8 * math.log(5) - 2 / 8 * math.log(2)]
    torch.testing.assert_close(dhidden, torch.tensor(expected)[:, None])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.usefixtures("small_tiles")
def test_ignored_rows_take_no_part_whatever_they_hold(backend, bad):
    tensors = logprob_inputs(30, 70, 8, bias=True)
    ignored = torch.arange(30) % 3 == 0
    kept = tensors | {name: tensors[name][~ignored] for name in ("hidden", "target")}
    poisoned = tensors | {
        "hidden": tensors["hidden"].masked_fill(ignored[:, None], bad),
        "target": tensors["target"].masked_fill(ignored, -7),
    }
    leaves = {name: x.detach().requires_grad_(name in GRADS) for name, x in poisoned.items()}
    logp = linear_logprob(**leaves, ignore_index=-7)
    dhidden, dweight, dbias = torch.autograd.grad(logp.sum(), [leaves[n] for n in GRADS])
    assert logp[ignored].eq(0).all()
    assert dhidden[ignored].eq(0).all()

    leaves = {name: x.detach().requires_grad_(name in GRADS) for name, x in kept.items()}
    expected = linear_logprob(**leaves)
    torch.testing.assert_close(logp[~ignored], expected)
    grads = torch.autograd.grad(expected.sum(), [leaves[n] for n in GRADS])
    for ours, truth in zip((dhidden[~ignored], dweight, dbias), grads, strict=True):
        torch.testing.assert_close(ours, truth)


def test_all_rows_ignored(backend):
    tensors = logprob_inputs(9, 20, 4, bias=True, ignored=1.0)
    assert all(x.eq(0).all() for x in output_and_gradients(linear_logprob, tensors))


def test_the_ignored_index_may_be_a_token(backend):
    tensors = logprob_inputs(40, 4, 8)
    logp = linear_logprob(**tensors, ignore_index=2)
    ignored = tensors["target"] == 2
    assert 0 < ignored.sum() < 40
    assert logp[ignored].eq(0).all()
    torch.testing.assert_close(logp[~ignored], linear_logprob(**tensors)[~ignored])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores(dtype):
    tensors = logprob_inputs(40, 150, 16, bias=True, dtype=dtype)
    tensors["weight"] = tensors["weight"] * 1e4
    check(tensors)


@pytest.mark.usefixtures("small_tiles")
def test_a_bias_of_minus_infinity_rules_tokens_out(backend):
    tensors = logprob_inputs(20, 100, 8, bias=True)
    allowed = torch.arange(100) >= 70  # the first tiles of the vocabulary hold nothing else
    tensors["target"] = 70 + tensors["target"] % 30
    tensors["bias"][~allowed] = -torch.inf
    ours = output_and_gradients(linear_logprob, tensors)
    few = tensors | {
        "weight": tensors["weight"][allowed],
        "bias": tensors["bias"][allowed],
        "target": tensors["target"] - 70,
    }
    logp, dhidden, dweight, dbias = output_and_gradients(linear_logprob, few)
    expected = logp, dhidden, F.pad(dweight, (0, 0, 70, 0)), F.pad(dbias, (70, 0))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    tensors["target"][3] = 5
    assert linear_logprob(**tensors)[3] == -torch.inf


def test_leading_dimensions(backend):
    tensors = logprob_inputs(24, 50, 8)
    flat = linear_logprob(**tensors)
    for shape in ((2, 12), (2, 3, 4), (24,)):
        shaped = tensors | {
            "hidden": tensors["hidden"].view(*shape, 8),
            "target": tensors["target"].view(shape),
        }
        assert linear_logprob(**shaped).equal(flat.view(shape))
    one = linear_logprob(tensors["hidden"][5], tensors["weight"], tensors["target"][5])
    torch.testing.assert_close(one, flat[5])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
@pytest.mark.usefixtures("small_tiles")
def test_scratch_and_margins_are_never_read(layout):
    tensors = logprob_inputs(30, 70, 8, bias=True, ignored=0.3, layout=layout)
    plain = output_and_gradients(linear_logprob, tensors)
    with poisoned_scratch():
        guarded = output_and_gradients(linear_logprob, {name: with_margin(x) for name, x in tensors.items()})
    for a, b in zip(plain, guarded, strict=True):
        assert a.equal(b)


def test_result_is_float32_and_gradients_keep_the_dtype(backend):
    tensors = logprob_inputs(5, 20, 8, bias=True, dtype=torch.bfloat16)
    logp, *grads = output_and_gradients(linear_logprob, tensors)
    assert logp.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in grads)


def test_autocast_computes_as_the_same_inputs_in_half_precision(backend):
    tensors = logprob_inputs(20, 50, 8, bias=True)
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        logp, *grads = output_and_gradients(linear_logprob, tensors)
    assert logp.dtype == torch.float32
    assert logp.equal(linear_logprob(**half))
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("needed", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
@pytest.mark.usefixtures("small_tiles")
def test_gradients_of_some(needed):
    tensors = logprob_inputs(30, 70, 8, bias=True, ignored=0.2)
    everything = dict(zip(GRADS, output_and_gradients(linear_logprob, tensors)[1:], strict=True))
    leaves = {name: x.detach().requires_grad_(name in needed) for name, x in tensors.items()}
    logp = linear_logprob(**leaves)
    logp.backward(torch.randn(30, generator=torch.Generator().manual_seed(1)))
    for name in GRADS:
        assert leaves[name].grad is None if name not in needed else leaves[name].grad.equal(everything[name])


def test_gradcheck(backend):
    tensors = logprob_inputs(5, 7, 3, bias=True, ignored=0.3, dtype=torch.float64)
    hidden, weight, bias = (tensors[name].requires_grad_() for name in GRADS)
    target = tensors["target"]
    assert torch.autograd.gradcheck(lambda h, w, b: linear_logprob(h, w, target, bias=b), (hidden, weight, bias))


@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grads", [(), ("hidden",), GRADS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_torch_op(rows, bias, grads, dtype):
    tensors = logprob_inputs(rows, 13, 4, bias=bias, dtype=dtype, layout="transposed")
    hidden, weight, offset = (
        tensors[name].requires_grad_(name in grads) if name in tensors else None for name in GRADS
    )
    arguments = (hidden, weight, tensors["target"], offset, -100, "cpu")
    torch.library.opcheck(torch.ops.tenfold.linear_logprob, arguments)


def test_it_compiles_whole():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def loss(hidden, weight, target, bias):
        return -linear_logprob(hidden * 2, weight, target, bias=bias).mean()

    for rows in (12, 30):
        tensors = logprob_inputs(rows, 40, 8, bias=True, ignored=0.3)
        leaves = [tensors[name].requires_grad_() for name in GRADS]
        compiled = loss(**tensors)
        plain = -reference(**tensors | {"hidden": tensors["hidden"] * 2}).mean()
        torch.testing.assert_close(compiled, plain)
        for a, b in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_memory_grows_by_rows_not_by_scores():
    def peak(rows, vocab, frozen=False):
        tensors = logprob_inputs(rows, vocab, 16)
        hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_(not frozen)
        return peak_memory(lambda: linear_logprob(hidden, weight, tensors["target"]).sum().backward())

    small, large = peak(2048, 4096), peak(8192, 4096)
    assert large < 4 * cpu.TILE * 4  # of the 134 MB that the scores would need
    assert large - small < 6144 * (4 * 16 + 20) * 4  # a few hidden states and numbers per row
    wide, wider = peak(1024, 8192), peak(1024, 16384)
    assert wider - wide < 8192 * 16 * 4 * 1.5  # the gradient of weight
    assert peak(1024, 16384, frozen=True) < wider - 16384 * 16 * 4 * 0.9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden": torch.zeros(6, 4, dtype=torch.int64)},
            TypeError,
            "hidden: dtype torch.int64 is not supported",
        ),
        (
            {"weight": torch.zeros(9, 4).half()},
            TypeError,
            "weight: dtype torch.float16 differs from hidden's",
        ),
        ({"bias": torch.zeros(9).double()}, TypeError, "bias: dtype torch.float64 differs from hidden's"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got None"),
        ({"target": torch.zeros(6, dtype=torch.int32)}, TypeError, "target: expected int64, got torch.int32"),
        ({"weight": torch.zeros(9, 4, device="meta")}, ValueError, "weight: is on meta, hidden on cpu"),
        ({"hidden": torch.zeros(6, 0)}, ValueError, r"hidden: expected .* got shape \(6, 0\)"),
        (
            {"weight": torch.zeros(9, 5)},
            ValueError,
            r"weight: expected \(vocabulary, 4\) .* got shape \(9, 5\)",
        ),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"weight: expected .* got shape \(0, 4\)"),
        (
            {"target": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            r"target: expected \(6,\) .* got shape \(5,\)",
        ),
        ({"bias": torch.zeros(8)}, ValueError, r"bias: expected \(9,\) .* got shape \(8,\)"),
        (
            {"target": torch.tensor([0, 1, 8, 9, 2, 3])},
            ValueError,
            "target: 9, at position 3 of 6, .* 0 to 8",
        ),
        (
            {"target": torch.tensor([0, 1, 8, -100, -1, 3])},
            ValueError,
            "target: -1, at position 4 .* ignore_index",
        ),
    ],
)
def test_errors_name_the_argument(backend, change, error, message):
    good = {
        "hidden": torch.zeros(6, 4),
        "weight": torch.zeros(9, 4),
        "target": torch.zeros(6, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        linear_logprob(**good | change)
