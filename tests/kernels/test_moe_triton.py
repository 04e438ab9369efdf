"""The mixture-of-experts ops on the triton backend: real kernels on a GPU, else interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import (
    Routing,
    expert_swiglu,
    grouped_matmul,
    grouped_swiglu,
    permute_tokens,
    route_tokens,
    unpermute_tokens,
    use_backend,
)
from tenfold.kernels.testing import (
    check_op,
    grouped_inputs,
    poisoned_scratch,
    routing_logits,
    swiglu_inputs,
    with_margin,
)

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = ("expert", "slot", "load", "recycled", "dropped", "row", "offsets")


def on(backend, f):
    def call(**arguments):
        with use_backend(backend):
            return f(**arguments)

    return call


def route(logits, top_k=1, capacity=None, *, recycle=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return route_tokens(logits, top_k, capacity, recycle=recycle, generator=generator)


def on_both(logits, *arguments, **options):
    with use_backend("triton"):
        ours = route(logits, *arguments, **options)
    with use_backend("reference"):
        return ours, route(logits.cpu(), *arguments, **options)


def compare(logits, *arguments, **options):
    ours, truth = on_both(logits, *arguments, **options)
    for name in INTEGERS:
        assert getattr(ours, name).cpu().equal(getattr(truth, name)), name
    torch.testing.assert_close(ours.weight.cpu(), truth.weight)
    torch.testing.assert_close(ours.balance_loss.cpu(), truth.balance_loss)


@pytest.mark.parametrize(
    ("tokens", "experts", "options"),
    [
        (200, 16, {}),
        (200, 16, {"capacity": 13}),
        (200, 16, {"capacity": 13, "recycle": False}),
        (130, 5, {"capacity": 26}),  # room for all and no more
        (150, 13, {"top_k": 3, "capacity": 37}),
        (150, 13, {"top_k": 2, "capacity": 20, "recycle": False}),
        (70, 3, {"top_k": 3}),
        (1, 1, {}),
        (0, 4, {"top_k": 2, "capacity": 3}),
    ],
)
def test_routing_is_the_references_to_the_last_integer(device, tokens, experts, options):
    compare(routing_logits(tokens, experts, skew=3.0, device=device), **options)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_routing(device, data):
    T, E = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 20))
    top_k = data.draw(st.integers(1, min(E, 3)))
    recycle = data.draw(st.booleans())
    least = -(-T * top_k // E) if recycle else 1
    logits = routing_logits(
        *(T, E),
        skew=data.draw(st.sampled_from([0.0, 20.0])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16])),
        layout=data.draw(st.sampled_from(["contiguous", "transposed", "expanded"])),
        device=device,
        seed=data.draw(st.integers(0, 99)),
    )
    if data.draw(st.booleans()):  # many ties
        logits = logits.round()
    capacity = data.draw(st.one_of(st.none(), st.integers(least, T + 2)))
    compare(logits, top_k, capacity, recycle=recycle, seed=data.draw(st.integers(0, 9)))


def test_several_spans_of_tokens(device, monkeypatch):
    from tenfold.kernels.moe import triton_routing

    monkeypatch.setattr(triton_routing, "SPANS", 3)
    compare(routing_logits(500, 6, skew=2.0, device=device), 2, 180)


def weight_and_balance(logits, **options):
    routing = route(logits, **options)
    return torch.cat([routing.weight.flatten(), routing.balance_loss[None]])


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("options", [{"capacity": 9}, {"top_k": 2, "capacity": 18}], ids=str)
def test_weights_and_gradients_of_routing_are_within_the_budget(device, dtype, options):
    logits = routing_logits(70, 8, skew=3.0, dtype=dtype, device=device)
    ours, truth = on("triton", weight_and_balance), on("reference", weight_and_balance)
    check_op(ours, truth, {"logits": logits}, grads=("logits",), **options)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_without_a_softmax_is_routed_and_shows(device, bad):
    logits = routing_logits(70, 6, device=device)
    logits[5] = bad
    with use_backend("triton"):
        routing = route(logits, capacity=20)
    assert routing.weight[:, 0].isnan().nonzero().tolist() == [[5]]
    assert routing.balance_loss.isnan()
    assert routing.row.flatten().sort().values.equal(torch.arange(70, device=device))
    assert int(routing.load.sum()) == 70


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("sizes", "dim", "out"),
    [
        ((70, 0, 130, 1), 72, 40),
        ((0, 64, 128, 0), 64, 128),  # whole tiles
        ((0, 0), 3, 5),
        ((1,), 1, 1),
    ],
)
def test_products_and_gradients_are_within_the_budget(device, dtype, linear, sizes, dim, out):
    tensors = grouped_inputs(sizes, dim, out, rest=9, linear=linear, dtype=dtype, device=device)
    check_op(on("triton", grouped_matmul), on("reference", grouped_matmul), tensors, grads=("x", "weight"))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_groups(device, data):
    tensors = grouped_inputs(
        data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=7)),
        data.draw(st.integers(1, 90)),
        data.draw(st.integers(1, 90)),
        rest=data.draw(st.sampled_from([0, 1, 70])),
        linear=data.draw(st.booleans()),
        layout=data.draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])),
        device=device,
        seed=data.draw(st.integers(0, 99)),
    )
    check_op(on("triton", grouped_matmul), on("reference", grouped_matmul), tensors, grads=("x", "weight"))


def test_wrong_offsets_stay_inside_and_int32_is_taken(device):
    tensors = grouped_inputs((5, 6, 7), 8, 4, device=device)
    x, weight = with_margin(tensors["x"]), with_margin(tensors["weight"])
    offsets = torch.tensor([-3, 9, 5, 10**6], dtype=torch.int32, device=device)
    with use_backend("triton"):
        out = grouped_matmul(x, weight, offsets)
        right = grouped_matmul(x, weight, tensors["offsets"].int())
    assert out.isfinite().all()
    torch.testing.assert_close(out[:5], tensors["x"][:5] @ tensors["weight"][0])
    torch.testing.assert_close(right[5:11], tensors["x"][5:11] @ tensors["weight"][1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_of_no_group_take_no_part_whatever_they_hold(device, bad):
    tensors = grouped_inputs((5, 0, 9), 8, 6, rest=4, device=device)
    tensors["x"][14:] = bad
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    with use_backend("triton"):
        out = grouped_matmul(x, weight, tensors["offsets"])
        grad = torch.ones_like(out)
        grad[14:] = bad
        dx, dweight = torch.autograd.grad(out, (x, weight), grad)
    assert out[14:].eq(0).all()
    assert dx[14:].eq(0).all()
    assert dx.isfinite().all()
    assert dweight.isfinite().all()
    assert dweight[1].eq(0).all()


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(
    "sizes",
    [
        ((70, 0, 130, 1), 72, 40, 24),
        ((0, 64, 128, 0), 64, 128, 64),  # whole tiles
        ((0, 0), 3, 5, 2),
        ((1,), 1, 1, 1),
    ],
    ids=str,
)
def test_feed_forwards_and_gradients_are_within_the_budget(device, dtype, layout, sizes):
    tensors = swiglu_inputs(*sizes, rest=9, layout=layout, dtype=dtype, device=device)
    check_op(on("triton", grouped_swiglu), on("reference", grouped_swiglu), tensors, grads=("x", "gate_up", "down"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_feed_forwards_leave_out_rows_of_no_group_and_never_read_scratch_or_margins(device, bad):
    tensors = swiglu_inputs((5, 0, 9), 8, 6, 7, rest=4, device=device)
    tensors["x"][14:] = bad
    grad = torch.ones(18, 7, device=device)
    grad[14:] = bad

    def everything(tensors):
        leaves = [tensors[name].detach().requires_grad_() for name in ("x", "gate_up", "down")]
        with use_backend("triton"):
            out = grouped_swiglu(*leaves, tensors["offsets"])
            return out.detach(), *torch.autograd.grad(out, leaves, grad)

    plain = everything(tensors)
    with poisoned_scratch():
        guarded = everything({name: with_margin(t) for name, t in tensors.items()})
    assert all(a.equal(b) for a, b in zip(plain, guarded, strict=True))
    out, dx, dgate_up, ddown = plain
    assert out[14:].eq(0).all()
    assert dx[14:].eq(0).all()
    assert all(x.isfinite().all() for x in plain)
    assert dgate_up[1].eq(0).all()
    assert ddown[1].eq(0).all()


CASES = [{}, {"top_k": 2, "capacity": 15}, {"top_k": 2, "capacity": 8, "recycle": False}]


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("dim", [24, 1100])
def test_permuting_and_back_is_within_the_budget(device, dtype, options, dim):
    with use_backend("reference"):
        routing = Routing(*(t.to(device) for t in route(routing_logits(30, 4, skew=2.0), **options)))
    T, k = routing.row.shape
    x = grouped_inputs((T,), dim, dtype=dtype, device=device, layout="sliced")["x"]
    y = grouped_inputs((T * k,), dim, dtype=dtype, device=device, seed=1)["x"]

    def permute(x):
        return permute_tokens(x, routing)[0]

    def unpermute(y, weight):
        return unpermute_tokens(y, routing._replace(weight=weight))

    check_op(on("triton", permute), on("reference", permute), {"x": x}, grads=("x",))
    tensors = {"y": y, "weight": routing.weight}
    check_op(on("triton", unpermute), on("reference", unpermute), tensors, grads=("y", "weight"))


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_experts_are_within_the_budget(device, dtype, options):
    with use_backend("reference"):
        routing = Routing(*(t.to(device) for t in route(routing_logits(30, 4, skew=2.0), **options)))
    tensors = swiglu_inputs((30, 0, 0, 0), 24, 40, 24, dtype=dtype, device=device)
    del tensors["offsets"]

    def experts(**tensors):
        return expert_swiglu(**tensors, routing=routing)

    check_op(on("triton", experts), on("reference", experts), tensors)


def layer(x, logits, up, down, **options):
    routing = route(logits, **options)
    rows, offsets = permute_tokens(x, routing)
    y = grouped_matmul(torch.tanh(grouped_matmul(rows, up, offsets)), down, offsets)
    return unpermute_tokens(y, routing)


def layer_inputs(device):
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(4, 12, 12, generator=generator).to(device) / 3 for _ in range(2))
    x = torch.randn(30, 12, generator=generator).to(device)
    return {"x": x, "logits": routing_logits(30, 4, skew=2.0, device=device), "up": up, "down": down}


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_layer_never_reads_scratch_or_margins(device, options):
    tensors = layer_inputs(device)

    def everything(tensors):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        with use_backend("triton"):
            out = layer(**leaves, **options)
            return out.detach(), *torch.autograd.grad(out.square().sum(), list(leaves.values()))

    plain = everything(tensors)
    with poisoned_scratch():
        guarded = everything({name: with_margin(t) for name, t in tensors.items()})
    for a, b in zip(plain, guarded, strict=True):
        assert a.equal(b)


def test_float64_is_refused(device):
    with use_backend("triton"):
        with pytest.raises(TypeError, match="logits: float64 is not supported by the triton backend"):
            route(routing_logits(3, 4, dtype=torch.float64, device=device))
        with pytest.raises(TypeError, match="x: float64 is not supported by the triton backend"):
            grouped_matmul(**grouped_inputs((3,), dtype=torch.float64, device=device))


def test_they_are_torch_ops(device):
    tensors = layer_inputs(device)
    logits, x, up = (tensors[name].requires_grad_() for name in ("logits", "x", "up"))
    seed = torch.tensor([7])
    torch.library.opcheck(torch.ops.tenfold.route_tokens, (logits, seed, 2, 20, True, "triton"))
    with use_backend("triton"):
        routing = route(logits)
    torch.library.opcheck(torch.ops.tenfold.permute_tokens, (x, routing.row, "triton"))
    weight = routing.weight.detach().requires_grad_()
    arguments = (x, weight, routing.row, routing.dropped, "triton")
    torch.library.opcheck(torch.ops.tenfold.unpermute_tokens, arguments)
    torch.library.opcheck(torch.ops.tenfold.grouped_matmul, (x, up, routing.offsets, "triton"))
    feed_forward = (x, up, torch.randn(4, 5, 6, device=device, requires_grad=True), routing.offsets, True, "triton")
    torch.library.opcheck(torch.ops.tenfold.grouped_swiglu, feed_forward)
    up = torch.randn(4, 6, 12, device=device)
    parts = (routing.weight.detach(), routing.row, routing.dropped, routing.offsets, "triton")
    torch.library.opcheck(
        torch.ops.tenfold.expert_swiglu, (x.detach(), up, torch.randn(4, 5, 3, device=device), *parts)
    )
