"""Permutation and grouped products on the CPU, and the layer that they make, against loops over the experts."""

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tenfold.kernels import grouped_matmul, permute_tokens, route_tokens, unpermute_tokens, use_backend
from tenfold.kernels.moe import cpu
from tenfold.kernels.testing import (
    check_op,
    grouped_inputs,
    peak_memory,
    poisoned_scratch,
    routing_logits,
    with_margin,
)

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "sliced", "expanded"]
SIZES = [(5, 0, 17, 1), (0, 0), (40,), (0, 16, 0, 33), (1, 1, 1)]


def route(*arguments, **options):
    return route_tokens(*arguments, **options, generator=torch.Generator().manual_seed(0))


def routings():
    logits = routing_logits(30, 6, skew=4.0)
    return {
        "dropless": route(logits),
        "recycled": route(logits, capacity=6),
        "dropped": route(logits, capacity=6, recycle=False),
        "two": route(logits, 2),
        "two recycled": route(logits, 2, 11),
        "three dropped": route(logits, 3, 10, recycle=False),
        "none": route(logits[:0], 2),
    }


ROUTINGS = routings()


def on_reference(f):
    def call(**arguments):
        with use_backend("reference"):
            return f(**arguments)

    return call


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch):
    """Both ways to multiply, whatever the size; oneDNN's with a row count that its rounding changes."""
    monkeypatch.setattr(cpu, "LARGE", 0 if request.param == "onednn" else 1 << 60)


# grouped_matmul


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rest", [0, 7])
@pytest.mark.parametrize("linear", [False, True])
def test_products_and_gradients_are_within_the_budget(dtype, sizes, rest, linear):
    tensors = grouped_inputs(sizes, 24, 16, rest=rest, linear=linear, dtype=dtype)
    check_op(grouped_matmul, on_reference(grouped_matmul), tensors, grads=("x", "weight"))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_groups(data):
    tensors = grouped_inputs(
        data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8)),
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 40)),
        rest=data.draw(st.integers(0, 20)),
        linear=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(HALF_AND_FULL)),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        seed=data.draw(st.integers(0, 99)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "LARGE", data.draw(st.sampled_from([0, 1 << 60])))
        check_op(grouped_matmul, on_reference(grouped_matmul), tensors, grads=("x", "weight"))


def test_it_is_torchs_own_grouped_mm(backend):
    tensors = grouped_inputs((8, 0, 24, 16), 32, 48)
    x, weight, offsets = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_(), tensors["offsets"]
    ours = grouped_matmul(x, weight, offsets)
    theirs = F.grouped_mm(x, weight, offs=offsets[1:].int())
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_of_no_group_take_no_part_whatever_they_hold(backend, bad):
    tensors = grouped_inputs((5, 0, 9), 8, 6, rest=4)
    tensors["x"][14:] = bad
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    out = grouped_matmul(x, weight, tensors["offsets"])
    assert out[14:].eq(0).all()
    grad = torch.ones_like(out)
    grad[14:] = bad
    dx, dweight = torch.autograd.grad(out, (x, weight), grad)
    assert dx[14:].eq(0).all()
    assert dx.isfinite().all()
    assert dweight.isfinite().all()
    assert dweight[1].eq(0).all()


@pytest.mark.usefixtures("library")
def test_a_group_is_not_touched_by_its_neighbours():
    tensors = grouped_inputs((5, 7, 9), 8, 6)
    tensors["x"][:5] = torch.nan
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    out = grouped_matmul(x, weight, tensors["offsets"])
    assert out[5:].isfinite().all()
    dx, dweight = torch.autograd.grad(out.sum(), (x, weight))
    assert dx.isfinite().all()
    assert dweight[1:].isfinite().all()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("linear", [False, True])
def test_products_never_read_scratch_or_margins(layout, linear):
    tensors = grouped_inputs((5, 0, 17, 1), 24, 16, rest=3, linear=linear, layout=layout)

    def everything(x, weight, offsets):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = grouped_matmul(x, weight, offsets)
        return out.detach(), *torch.autograd.grad(out, (x, weight), torch.ones_like(out))

    plain = everything(**tensors)
    with poisoned_scratch():
        guarded = everything(**{name: with_margin(t) for name, t in tensors.items()})
    for a, b in zip(plain, guarded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # oneDNN's kernel goes by the alignment


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_gradients_of_one(needed):
    tensors = grouped_inputs((5, 0, 17, 1), rest=2)
    tensors[needed].requires_grad_()
    out = grouped_matmul(**tensors)
    (grad,) = torch.autograd.grad(out.sum(), tensors[needed])
    (truth,) = torch.autograd.grad(on_reference(grouped_matmul)(**tensors).sum(), tensors[needed])
    torch.testing.assert_close(grad, truth)


def test_gradcheck(backend):
    tensors = grouped_inputs((2, 0, 3), 3, 4, rest=1, dtype=torch.float64)
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, tensors["offsets"]), (x, weight))


def test_autocast_computes_as_the_same_inputs_in_half_precision(backend):
    tensors = grouped_inputs((5, 0, 17, 1))
    x, weight, offsets = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_(), tensors["offsets"]
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_matmul(x, weight, offsets)
    assert out.equal(grouped_matmul(x.bfloat16(), weight.bfloat16(), offsets))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (x, weight)))


# permute_tokens, unpermute_tokens


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_permuting_and_back_is_within_the_budget(name, dtype, layout):
    routing = ROUTINGS[name]
    T, k = routing.row.shape
    x = grouped_inputs((T,), 24, dtype=dtype, layout=layout)["x"]
    y = grouped_inputs((T * k,), 24, dtype=dtype, layout=layout, seed=1)["x"]

    def permute(x):
        return permute_tokens(x, routing)[0]

    def unpermute(y, weight):
        return unpermute_tokens(y, routing._replace(weight=weight))

    check_op(permute, on_reference(permute), {"x": x}, grads=("x",))
    tensors = {"y": y, "weight": routing.weight}
    check_op(unpermute, on_reference(unpermute), tensors, grads=("y", "weight"))


@pytest.mark.parametrize("name", ROUTINGS)
def test_rows_are_grouped_by_expert_and_come_back(backend, name):
    routing = ROUTINGS[name]
    T, k = routing.row.shape
    x = torch.arange(T * 3.0).view(T, 3)
    rows, offsets = permute_tokens(x, routing)
    assert rows.shape == (T * k, 3)
    for e in range(6):
        tokens = ((routing.expert == e).any(1)).nonzero().squeeze(1)
        here = rows[offsets[e] : offsets[e + 1], 0].div(3).long()
        assert set(tokens.tolist()) <= set(here.tolist())
        assert len(tokens) == routing.load[e]
    ones = routing._replace(weight=(~routing.dropped).float())
    torch.testing.assert_close(unpermute_tokens(rows, ones), x * (~routing.dropped).sum(1, keepdim=True))


@pytest.mark.parametrize("name", ["dropped", "two recycled", "three dropped"])
def test_rows_of_dropped_tokens_are_not_read_and_get_no_gradient(backend, name):
    routing = ROUTINGS[name]
    lost = routing.row[routing.dropped]
    assert len(lost)
    y = torch.randn(routing.row.numel(), 5)
    y[lost] = torch.nan
    y.requires_grad_()
    weight = routing.weight.detach().requires_grad_()
    out = unpermute_tokens(y, routing._replace(weight=weight))
    assert out.isfinite().all()
    dy, dweight = torch.autograd.grad(out.sum(), (y, weight))
    assert dy[lost].eq(0).all()
    assert dweight[routing.dropped].eq(0).all()
    assert dweight.isfinite().all()


def test_permuting_never_reads_scratch_or_margins():
    for routing in ROUTINGS.values():
        T, k = routing.row.shape
        x, y = torch.randn(T, 7), torch.randn(T * k, 7)

        def everything(x, y, routing):
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            weight = routing.weight.detach().requires_grad_()
            rows, _ = permute_tokens(x, routing)
            out = unpermute_tokens(y, routing._replace(weight=weight))
            grads = torch.autograd.grad(rows.square().sum() + out.square().sum(), (x, y, weight))
            return rows.detach(), out.detach(), *grads

        plain = everything(x, y, routing)
        with poisoned_scratch():
            guarded = everything(with_margin(x), with_margin(y), type(routing)(*map(with_margin, routing)))
        assert all(a.equal(b) for a, b in zip(plain, guarded, strict=True))


# The layer


def swiglu(x, logits, up, down, **options):
    """A layer of SwiGLU experts by our ops."""
    routing = route(logits, **options)
    rows, offsets = permute_tokens(x, routing)
    gate, value = grouped_matmul(rows, up, offsets).chunk(2, -1)
    return unpermute_tokens(grouped_matmul(F.silu(gate) * value, down, offsets), routing)


def swiglu_by_token(x, logits, up, down, **options):
    """The same, a token and an expert at a time."""
    routing = route(logits, **options)
    outputs = []
    for t in range(len(x)):
        total = x.new_zeros(down.shape[2])
        for e, weight in zip(routing.expert[t].tolist(), routing.weight[t], strict=True):
            if e >= 0:
                gate, value = (x[t] @ up[e]).chunk(2)
                total = total + weight * ((F.silu(gate) * value) @ down[e])
        outputs.append(total)
    return torch.stack(outputs)


def layer_inputs(T=30, E=6):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (T, 12), "up": (E, 12, 16), "down": (E, 8, 12)}
    tensors = {name: torch.randn(shape, generator=generator) / 3 for name, shape in shapes.items()}
    return {"x": tensors["x"], "logits": routing_logits(T, E, skew=3.0), "up": tensors["up"], "down": tensors["down"]}


@pytest.mark.parametrize(
    "options",
    [{}, {"capacity": 5}, {"capacity": 6, "recycle": False}, {"top_k": 2}, {"top_k": 2, "capacity": 10}],
    ids=str,
)
def test_a_layer_is_what_it_is_token_by_token(options):
    check_op(swiglu, swiglu_by_token, layer_inputs(), grads=("x", "logits", "up", "down"), **options)


def loss(x, logits, up, down, **options):
    routing = route_tokens(logits * 2, **options)
    rows, offsets = permute_tokens(x * 2, routing)
    y = grouped_matmul(torch.tanh(grouped_matmul(rows, up, offsets))[:, :8], down, offsets)
    return unpermute_tokens(y, routing).square().sum() + routing.balance_loss


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "capacity": 20}], ids=str)
def test_a_layer_compiles_whole_and_for_any_length(options):
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (30, 45):
        leaves = [t.requires_grad_() for t in layer_inputs(T).values()]
        found, plain = [], []
        for f, results in ((compiled, found), (loss, plain)):
            torch.manual_seed(0)
            value = f(*leaves, **options)
            results += [value, *torch.autograd.grad(value, leaves)]
        torch.testing.assert_close(found, plain)


@torch.no_grad()
def test_inductor_compiles_a_layer():
    torch.compiler.reset()
    tensors = layer_inputs()
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(**tensors), loss(**tensors))


def test_checkpointing_draws_the_same_again():
    leaves = [t.requires_grad_() for t in layer_inputs().values()]
    options = {"capacity": 5}
    grads = []
    for f in (loss, lambda *x, **o: torch.utils.checkpoint.checkpoint(loss, *x, use_reentrant=False, **o)):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(f(*leaves, **options), leaves))
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


def test_a_layer_never_holds_tokens_times_experts_times_places():
    def peak(T):
        inputs = layer_inputs(T, 32)
        return peak_memory(lambda: swiglu(**inputs, capacity=T // 32 + 30))

    small, large = peak(2048), peak(4096)
    assert large < 2.3 * small
    assert large < 4096 * (32 * 60 + 12 * 40)  # bytes


# Ops of torch, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grads", [(), ("x",), ("x", "weight")])
@pytest.mark.parametrize("linear", [False, True])
def test_grouped_matmul_is_a_torch_op(dtype, grads, linear):
    for sizes, layout in (((3, 0, 5), "contiguous"), ((0, 0), "contiguous"), ((4, 2), "sliced")):
        tensors = grouped_inputs(sizes, 6, 5, rest=1, linear=linear, dtype=dtype, layout=layout)
        x, weight = (tensors[n].requires_grad_(n in grads) for n in ("x", "weight"))
        torch.library.opcheck(torch.ops.tenfold.grouped_matmul, (x, weight, tensors["offsets"], "cpu"))


@pytest.mark.parametrize("name", ["dropless", "two recycled", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permutation_is_a_torch_op(name, dtype):
    routing = ROUTINGS[name]
    T, k = routing.row.shape
    x = torch.randn(T, 6).to(dtype).requires_grad_()
    y = torch.randn(6, T * k).to(dtype).t().requires_grad_()
    weight = routing.weight.detach().requires_grad_()
    torch.library.opcheck(torch.ops.tenfold.permute_tokens, (x, routing.row, "cpu"))
    arguments = (y, weight, routing.row, routing.dropped, "cpu")
    torch.library.opcheck(torch.ops.tenfold.unpermute_tokens, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(10, 4, dtype=torch.int64)}, TypeError, "x: dtype torch.int64 is not supported"),
        ({"weight": torch.zeros(3, 4, 5).half()}, TypeError, "weight: dtype torch.float16 differs from x's"),
        ({"offsets": torch.zeros(4)}, TypeError, "offsets: expected int64 or int32, got torch.float32"),
        ({"weight": torch.zeros(3, 4, 5, device="meta")}, ValueError, "weight: is on meta, x on cpu"),
        ({"x": torch.zeros(10)}, ValueError, r"x: expected \(rows, dim\), got shape \(10,\)"),
        ({"weight": torch.zeros(3, 5, 4)}, ValueError, r"weight: expected \(experts, 4, dim\) .* shape \(3, 5, 4\)"),
        ({"weight": torch.zeros(0, 4, 5)}, ValueError, r"weight: expected .* got shape \(0, 4, 5\)"),
        ({"offsets": torch.tensor([0, 5, 10])}, ValueError, r"offsets: expected \(4,\) .* got shape \(3,\)"),
        ({"offsets": torch.tensor([1, 2, 5, 10])}, ValueError, "offsets: must begin with 0, got 1"),
        ({"offsets": torch.tensor([0, 6, 5, 10])}, ValueError, "offsets: must not fall, got 6 and then 5, at .* 2"),
        ({"offsets": torch.tensor([0, 6, 7, 11])}, ValueError, "offsets: the last is 11, but x has 10 rows"),
    ],
)  # fmt: skip
def test_errors_of_products_name_the_argument(backend, change, error, message):
    good = {"x": torch.zeros(10, 4), "weight": torch.zeros(3, 4, 5), "offsets": torch.tensor([0, 6, 6, 10])}
    with pytest.raises(error, match=message):
        grouped_matmul(**good | change)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(30, 4, dtype=torch.int64), TypeError, "dtype torch.int64 is not supported"),
        (torch.zeros(29, 4), ValueError, r"expected \(\d+, dim\) .* routing of 30 tokens to 2, got shape \(29, 4\)"),
        (torch.zeros(30), ValueError, r"expected .* got shape \(30,\)"),
        (torch.zeros(30, 4, device="meta"), ValueError, "is on meta, the routing's row on cpu"),
    ],
)
def test_errors_of_permutation_name_the_argument(x, error, message):
    with pytest.raises(error, match=f"x: {message}"):
        permute_tokens(x, ROUTINGS["two"])
    y = x.repeat(2, *[1] * (x.dim() - 1)) if len(x) == 30 and x.device.type != "meta" else x
    y = torch.zeros(60, 4, device="meta") if x.device.type == "meta" else y
    with pytest.raises(error, match="y: " + message.replace("30,", "60,")):
        unpermute_tokens(y, ROUTINGS["two"])


def test_weights_of_another_shape_are_refused():
    routing = ROUTINGS["two"]
    with pytest.raises(ValueError, match=r"routing: expected weight of shape \(30, 2\), got \(30, 1\)"):
        unpermute_tokens(torch.zeros(60, 4), routing._replace(weight=routing.weight[:, :1]))


@pytest.mark.parametrize("capacity", [None, 6])
def test_shapes_on_the_meta_device(capacity):
    tokens, router, weight = (torch.randn(s, device="meta", requires_grad=True) for s in ((30, 4), (4, 6), (6, 4, 5)))
    routing = route_tokens(tokens @ router, 1, capacity)
    rows, offsets = permute_tokens(tokens, routing)
    out = unpermute_tokens(grouped_matmul(rows, weight, offsets), routing)
    assert (out.shape, out.device.type) == ((30, 5), "meta")
    (out.sum() + routing.balance_loss).backward()
    assert [x.grad.shape for x in (tokens, router, weight)] == [(30, 4), (4, 6), (6, 4, 5)]
