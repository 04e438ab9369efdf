"""The experts' feed-forward on the CPU, against the definition in float64 and a module per expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tenfold.kernels import grouped_swiglu, use_backend
from tenfold.kernels.moe import cpu
from tenfold.kernels.testing import check_op, peak_memory, poisoned_scratch, swiglu_inputs, with_margin

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "sliced", "expanded"]
LEAVES = ("x", "gate_up", "down")


def reference(**tensors):
    with use_backend("reference"):
        return grouped_swiglu(**tensors)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch):
    """Both ways to multiply, whatever the size."""
    monkeypatch.setattr(cpu, "LARGE", 0 if request.param == "onednn" else 1 << 60)


def with_gradients(tensors, grad=None):
    leaves = {name: tensors[name].detach().requires_grad_() for name in LEAVES}
    out = grouped_swiglu(**leaves, offsets=tensors["offsets"])
    grad = torch.ones_like(out) if grad is None else grad
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(5, 0, 17, 1), (0, 0), (40,), (0, 16, 0, 33)], ids=str)
@pytest.mark.parametrize("rest", [0, 7])
def test_results_and_gradients_are_within_the_budget(dtype, sizes, rest):
    tensors = swiglu_inputs(sizes, 24, 20, 16, rest=rest, dtype=dtype)
    check_op(grouped_swiglu, reference, tensors, grads=LEAVES)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_groups(data):
    tensors = swiglu_inputs(
        data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6)),
        # Of an activation that nearly cancels, a single number would stand alone against its own rounding.
        *(data.draw(st.integers(8, 30)) for _ in range(3)),
        rest=data.draw(st.integers(0, 20)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        seed=data.draw(st.integers(0, 99)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "LARGE", data.draw(st.sampled_from([0, 1 << 60])))
        check_op(grouped_swiglu, reference, tensors, grads=LEAVES)


def test_it_is_two_linear_layers_and_their_product_for_each_group(backend):
    tensors = swiglu_inputs((4, 0, 9), 8, 6, 5, dtype=torch.float64)
    out, dx, dgate_up, ddown = with_gradients(tensors)
    x, gate_up, down = (tensors[name].requires_grad_() for name in LEAVES)
    expected = []
    for e, rows in enumerate((slice(0, 4), slice(4, 4), slice(4, 13))):
        gate, up = F.linear(x[rows], gate_up[e, :6]), F.linear(x[rows], gate_up[e, 6:])
        expected.append(F.linear(gate / (1 + torch.exp(-gate)) * up, down[e]))
    expected = torch.cat(expected)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(expected.sum(), (x, gate_up, down))
    torch.testing.assert_close((dx, dgate_up, ddown), grads)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_of_no_group_take_no_part_whatever_they_hold(backend, bad):
    tensors = swiglu_inputs((5, 0, 9), 8, 6, 7, rest=4)
    tensors["x"][14:] = bad
    grad = torch.ones(18, 7)
    grad[14:] = bad
    out, dx, *dweights = with_gradients(tensors, grad)
    assert out[14:].eq(0).all()
    assert dx[14:].eq(0).all()
    assert all(x.isfinite().all() for x in (out, dx, *dweights))
    assert all(dweight[1].eq(0).all() for dweight in dweights)


@pytest.mark.usefixtures("library")
def test_a_group_is_not_touched_by_its_neighbours():
    tensors = swiglu_inputs((5, 7, 9), 8, 6, 7)
    tensors["x"][:5] = torch.nan
    out, dx, *dweights = with_gradients(tensors)
    assert out[5:].isfinite().all()
    assert dx[5:].isfinite().all()
    assert all(dweight[1:].isfinite().all() for dweight in dweights)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scratch_and_margins_are_never_read(layout):
    tensors = swiglu_inputs((5, 0, 17, 1), rest=3, layout=layout)
    plain = with_gradients(tensors)
    with poisoned_scratch():
        guarded = with_gradients({name: with_margin(t) for name, t in tensors.items()})
    torch.testing.assert_close(guarded, plain, rtol=1e-6, atol=1e-6)  # oneDNN's kernel goes by the alignment


@pytest.mark.parametrize("needed", LEAVES)
def test_gradients_of_one(needed):
    tensors = swiglu_inputs((5, 0, 17, 1), rest=2)
    tensors[needed].requires_grad_()
    (grad,) = torch.autograd.grad(grouped_swiglu(**tensors).sum(), tensors[needed])
    (truth,) = torch.autograd.grad(reference(**tensors).sum(), tensors[needed])
    torch.testing.assert_close(grad, truth)


def test_gradcheck(backend):
    tensors = swiglu_inputs((2, 0, 3), 3, 2, 4, rest=1, dtype=torch.float64)
    leaves = [tensors[name].requires_grad_() for name in LEAVES]
    assert torch.autograd.gradcheck(lambda *x: grouped_swiglu(*x, tensors["offsets"]), leaves)


def test_autocast_computes_as_the_same_inputs_in_half_precision(backend):
    tensors = swiglu_inputs()
    leaves = [tensors[name].requires_grad_() for name in LEAVES]
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_swiglu(*leaves, tensors["offsets"])
    assert out.equal(grouped_swiglu(*(t.bfloat16() for t in leaves), tensors["offsets"]))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))


def test_without_gradients_no_row_has_its_inner_numbers_in_memory():
    def peak(rows):
        tensors = swiglu_inputs((rows // 16,) * 16, 16, 256, 16)
        return peak_memory(lambda: grouped_swiglu(**tensors))

    small, large = peak(4096), peak(8192)
    assert large - small < 4096 * 4 * 256 // 2  # bytes: of 2·256 numbers a row, those of a group; here a sixteenth
    assert large > small


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_torch_op(dtype, keep):
    for sizes, layout in (((3, 0, 5), "contiguous"), ((0, 0), "contiguous"), ((4, 2), "sliced")):
        tensors = swiglu_inputs(sizes, 6, 4, 5, rest=1, dtype=dtype, layout=layout)
        leaves = [tensors[name].requires_grad_(keep) for name in LEAVES]
        torch.library.opcheck(torch.ops.tenfold.grouped_swiglu, (*leaves, tensors["offsets"], keep, "cpu"))


@pytest.mark.parametrize("grad", [False, True])
def test_it_compiles_whole(grad):
    tensors = swiglu_inputs()
    leaves = [tensors[name].requires_grad_(grad) for name in LEAVES]
    compiled = torch.compile(lambda *x: grouped_swiglu(*x).square().sum(), fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(*leaves, tensors["offsets"]), grouped_swiglu(*leaves, tensors["offsets"]).square().sum()
    torch.testing.assert_close(ours, theirs)
    if grad:
        torch.testing.assert_close(*(torch.autograd.grad(y, leaves) for y in (ours, theirs)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(10, 4, dtype=torch.int64)}, TypeError, "x: dtype torch.int64 is not supported"),
        ({"down": torch.zeros(3, 5, 6).half()}, TypeError, "down: dtype torch.float16 differs from x's"),
        ({"offsets": torch.zeros(4)}, TypeError, "offsets: expected int64 or int32, got torch.float32"),
        ({"gate_up": torch.zeros(3, 12, 4, device="meta")}, ValueError, "gate_up: is on meta, x on cpu"),
        ({"x": torch.zeros(10)}, ValueError, r"x: expected \(rows, dim\), got shape \(10,\)"),
        ({"gate_up": torch.zeros(12, 4)}, ValueError, r"gate_up: expected \(experts, 2·inner, 4\) .* shape \(12, 4\)"),
        ({"gate_up": torch.zeros(3, 11, 4)}, ValueError, r"gate_up: expected .* got shape \(3, 11, 4\)"),
        ({"gate_up": torch.zeros(3, 12, 5)}, ValueError, r"gate_up: expected .* got shape \(3, 12, 5\)"),
        ({"down": torch.zeros(3, 5, 12)}, ValueError, r"down: expected \(3, dim, 6\) .* got shape \(3, 5, 12\)"),
        ({"down": torch.zeros(2, 5, 6)}, ValueError, r"down: expected \(3, dim, 6\) .* got shape \(2, 5, 6\)"),
        ({"offsets": torch.tensor([0, 5, 10])}, ValueError, r"offsets: expected \(4,\) to go with gate_up"),
        ({"offsets": torch.tensor([0, 6, 5, 10])}, ValueError, "offsets: must not fall, got 6 and then 5, at .* 2"),
        ({"offsets": torch.tensor([0, 6, 7, 11])}, ValueError, "offsets: the last is 11, but x has 10 rows"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(backend, change, error, message):
    good = {
        "x": torch.zeros(10, 4),
        "gate_up": torch.zeros(3, 12, 4),
        "down": torch.zeros(3, 5, 6),
        "offsets": torch.tensor([0, 6, 6, 10]),
    }
    with pytest.raises(error, match=message):
        grouped_swiglu(**good | change)


def test_shapes_on_the_meta_device():
    tensors = {name: x.to("meta") for name, x in swiglu_inputs((5, 0, 17), 24, 20, 16).items()}
    out, *gradients = with_gradients(tensors)
    assert out.shape == (22, len(tensors["down"][0]))
    assert [x.shape for x in gradients] == [tensors[name].shape for name in LEAVES]


def test_functional_derivatives_are_the_references():
    tensors = swiglu_inputs((5, 0, 17), 24, 20, 16, dtype=torch.float64)
    x = tensors.pop("x")
    found = torch.func.grad(lambda x: reference(x=x, **tensors).sum())(x)
    torch.testing.assert_close(found, with_gradients(tensors | {"x": x})[1])
