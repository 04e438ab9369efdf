"""`expert_swiglu` and the compiled feed-forward behind it, against the definition in float64, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tenfold.kernels import expert_swiglu, grouped_swiglu, native, route_tokens, use_backend
from tenfold.kernels.moe import compiled
from tenfold.kernels.testing import (
    check_op,
    peak_memory,
    poisoned_scratch,
    routing_logits,
    swiglu_inputs,
    with_margin,
)

needs_native = pytest.mark.skipif(
    native.load(compiled.SOURCE) is None, reason="needs AVX-512 and GCC: elsewhere the libraries are all there is"
)
LEAVES = ("x", "gate_up", "down")
OPTIONS = {
    "dropless": {},
    "recycled": {"capacity": 6},
    "dropped": {"capacity": 6, "recycle": False},
    "two": {"top_k": 2},
    "two recycled": {"top_k": 2, "capacity": 11},
    "three dropped": {"top_k": 3, "capacity": 10, "recycle": False},
}


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "libraries"])
def way(request, monkeypatch):
    if request.param == "libraries":
        monkeypatch.setattr(native, "load", lambda source: None)
    return request.param


def inputs(T=30, E=6, dim=16, inner=32, out=48, **options):
    sizes = swiglu_inputs((T, *[0] * (E - 1)), dim, inner, out, **options)
    return {name: sizes[name] for name in LEAVES} | {"logits": routing_logits(T, E, skew=4.0)}


def route(logits, **options):
    return route_tokens(logits, **options, generator=torch.Generator().manual_seed(0))


def layer(x, gate_up, down, logits, **options):
    return expert_swiglu(x, gate_up, down, route(logits, **options))


def by_token(x, gate_up, down, logits, **options):
    """The definition, a token and an expert at a time."""
    routing = route(logits, **options)
    outputs = []
    for t in range(len(x)):
        total = x.new_zeros(down.shape[1])
        for e, weight in zip(routing.expert[t].tolist(), routing.weight[t], strict=True):
            if e >= 0:
                gate, up = F.linear(x[t], gate_up[e]).chunk(2)
                total = total + weight * F.linear(gate / (1 + torch.exp(-gate)) * up, down[e])
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_what_it_is_token_by_token(options):
    check_op(layer, by_token, inputs(), **options)
    check_op(layer, by_token, inputs(), grads=(*LEAVES, "logits"), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    tensors = inputs(dtype=dtype)
    check_op(layer, by_token, tensors, top_k=2)


@needs_native
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_compiled_feed_forwards_of_any_groups(data):
    def reference(**tensors):
        with use_backend("reference"):
            return grouped_swiglu(**tensors)

    sizes = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 13, 95, 96, 97, 200]), min_size=1, max_size=4))
    dims = (data.draw(st.sampled_from([16, 48, 512, 528, 1040])) for _ in range(3))
    tensors = swiglu_inputs(sizes, *dims, rest=data.draw(st.integers(0, 5)), seed=data.draw(st.integers(0, 99)))
    assert compiled.suits(*(tensors[name] for name in LEAVES))
    check_op(grouped_swiglu, reference, tensors, grads=LEAVES)


def test_the_sizes_are_the_sources():
    source = compiled.SOURCE.read_text("utf-8")
    assert f"TILE = {compiled.TILE}," in source
    assert f"CHUNK = {compiled.CHUNK} }}" in source


@needs_native
def test_threads_change_no_bit_of_a_gradient():
    tensors = swiglu_inputs((100, 0, 7, 250), 144, 272, 80, rest=3)

    def gradients():
        leaves = [tensors[name].detach().requires_grad_() for name in LEAVES]
        return torch.autograd.grad(grouped_swiglu(*leaves, tensors["offsets"]).square().sum(), leaves)

    expected, threads = gradients(), torch.get_num_threads()
    try:
        for count in (1, 2, 5, 2, 5):
            torch.set_num_threads(count)
            assert all(a.equal(b) for a, b in zip(gradients(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_what_the_activation_was_applied_to_is_kept():
    tensors = swiglu_inputs((100, 0, 7), 48, 32, 16, rest=3)
    out, hidden = compiled.grouped_swiglu(**tensors, keep=True)
    assert out.equal(compiled.grouped_swiglu(**tensors, keep=False)[0])
    x, gate_up = tensors["x"].double(), tensors["gate_up"].double()
    expected = torch.cat([x[:100] @ gate_up[0].T, x[100:107] @ gate_up[2].T, x.new_zeros(3, 64)])
    torch.testing.assert_close(hidden.double(), expected, rtol=0, atol=1e-5)
    assert hidden[107:].eq(0).all()


@needs_native
def test_what_a_token_gets_depends_on_no_other_token_nor_on_the_threads():
    tensors = inputs(T=130, E=2, dim=528, inner=48)
    logits = tensors.pop("logits")
    routing = route(logits)
    whole = expert_swiglu(**tensors, routing=routing)
    x = tensors.pop("x")
    for some in (slice(0, 1), slice(40, 47), slice(0, 100)):
        assert expert_swiglu(x[some], **tensors, routing=route(logits[some])).equal(whole[some])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert expert_swiglu(x, **tensors, routing=routing).equal(whole)
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize(
    "gate",
    [*(0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 87.0, -87.0, 88.5, -88.5, -103.0, 1e4, -1e4, 3e38, -3e38),
     *(torch.inf, -torch.inf, torch.nan)],
)  # fmt: skip
def test_the_activation_everywhere(gate):
    x = torch.zeros(1, 16)
    x[0, 0] = gate
    gate_up = torch.zeros(1, 32, 16)
    gate_up[0, :16, 0], gate_up[0, 16:, 1] = 1, 1
    x[0, 1] = 1
    out, _ = compiled.grouped_swiglu(x, gate_up, torch.eye(16)[None], torch.tensor([0, 1]), keep=False)
    if not torch.isfinite(torch.tensor(gate)):  # 0·inf in the sums beside it: all is NaN, as in torch
        assert out.isnan().all()
        return
    truth = F.silu(torch.tensor(gate, dtype=torch.float64))
    # From about -88.7 on e^-gate is infinite, and the activation 0, as torch's: it is -2.6e-37 there, and shrinks.
    torch.testing.assert_close(out.double(), truth.expand(1, 16), rtol=3e-7, atol=2e-36)


@needs_native
def test_silu_is_exact_to_some_units_in_the_last_place():
    gate = torch.linspace(-30, 30, 16 * 4096).view(-1, 16)
    x = torch.cat([gate, torch.ones_like(gate)], 1)
    out, _ = compiled.grouped_swiglu(x, torch.eye(32)[None], torch.eye(16)[None], torch.tensor([0, len(x)]), keep=False)
    truth = F.silu(gate.double())
    assert ((out - truth).abs() / truth.abs().clamp(min=1e-30)).max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.usefixtures("way")
def test_what_is_dropped_or_after_the_groups_is_not_read():
    tensors = inputs()
    routing = route(tensors.pop("logits"), capacity=4, recycle=False)
    lost = routing.dropped[:, 0]
    assert lost.any()
    tensors["x"][lost] = torch.nan
    out = expert_swiglu(**tensors, routing=routing)
    assert out[lost].eq(0).all()
    assert out[~lost].isfinite().all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scratch_and_margins_are_never_read(options):
    tensors = inputs()
    routing = route(tensors.pop("logits"), **options)
    plain = expert_swiglu(**tensors, routing=routing)
    with poisoned_scratch():
        guarded = {name: with_margin(t) for name, t in tensors.items()}
        out = expert_swiglu(**guarded, routing=type(routing)(*map(with_margin, routing)))
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_layout(layout):
    check_op(layer, by_token, inputs(layout=layout), top_k=2)


@pytest.mark.usefixtures("way")
def test_no_tokens():
    tensors = inputs()
    tensors = tensors | {name: tensors[name][:0] for name in ("x", "logits")}
    assert layer(**tensors).shape == (0, 48)


@needs_native
def test_tokens_are_not_copied():
    def peak(T):
        tensors = inputs(T=T, dim=64, inner=64, out=16)
        routing = route(tensors.pop("logits"))
        return peak_memory(lambda: expert_swiglu(**tensors, routing=routing))

    grown = peak(4096) - peak(2048)
    assert 2048 * 16 * 4 <= grown < 2048 * (16 * 4 + 64)  # bytes: the result, and a few integers a token


@pytest.mark.usefixtures("way")
def test_autocast_computes_as_the_same_inputs_in_half_precision():
    tensors = inputs()
    routing = route(tensors.pop("logits"))
    with torch.autocast("cpu", torch.bfloat16):
        out = expert_swiglu(**tensors, routing=routing)
    assert out.equal(expert_swiglu(**{name: t.bfloat16() for name, t in tensors.items()}, routing=routing))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["dropless", "two recycled"])
def test_it_is_a_torch_op(name):
    tensors = inputs()
    routing = route(tensors.pop("logits"), **OPTIONS[name])
    rest = (routing.weight, routing.row, routing.dropped, routing.offsets, "cpu")
    torch.library.opcheck(torch.ops.tenfold.expert_swiglu, (*tensors.values(), *rest))


@pytest.mark.parametrize("grad", [False, True])
def test_it_compiles_whole(grad):
    tensors = inputs()
    logits = tensors.pop("logits")
    leaves = [t.requires_grad_(grad) for t in tensors.values()]

    def run(*leaves):
        return expert_swiglu(*leaves, route_tokens(logits)).square().sum()

    ours, theirs = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), run(*leaves)
    torch.testing.assert_close(ours, theirs)
    if grad:
        torch.testing.assert_close(*(torch.autograd.grad(y, leaves) for y in (ours, theirs)))


def test_shapes_on_the_meta_device():
    tensors = {name: t.to("meta") for name, t in inputs().items()}
    assert layer(**tensors).shape == (30, 48)


GOOD = {"x": torch.zeros(30, 16), "gate_up": torch.zeros(6, 64, 16), "down": torch.zeros(6, 48, 32)}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(29, 16)}, ValueError, r"x: expected \(30, dim\) to go with a routing of 30 tokens to 1"),
        ({"x": torch.zeros(30, 15)}, ValueError, r"gate_up: expected \(experts, 2·inner, 15\) to go with x"),
        ({"x": torch.zeros(30, 16).int()}, TypeError, "x: dtype torch.int32 is not supported"),
        ({"down": torch.zeros(6, 48, 32).half()}, TypeError, "down: dtype torch.float16 differs from x's"),
        ({"down": torch.zeros(6, 48, 31)}, ValueError, r"down: expected \(6, dim, 32\) to go with gate_up"),
        ({"gate_up": torch.zeros(5, 64, 16), "down": torch.zeros(5, 48, 32)}, ValueError,
         r"routing: expected offsets of shape \(6,\) to go with gate_up, got \(7,\)"),
        ({"offsets": torch.tensor([[0, 5, 9, 30, 30, 30, 30]]).t()}, ValueError,
         r"offsets of shape \(7,\) .* \(7, 1\)"),
        ({"weight": torch.zeros(30, 1, device="meta")}, ValueError, "x: is on cpu, the routing's weight on meta"),
        ({"dropped": torch.zeros(30, 1, device="meta").bool()}, ValueError, "the routing's dropped on meta"),
        ({"offsets": torch.tensor([0, 5, 4, 30, 30, 30, 30])}, ValueError, "offsets: must not fall, got 5 and then 4"),
        ({"offsets": torch.tensor([0, 5, 9, 30, 30, 30, 31])}, ValueError, "offsets: the last is 31"),
        ({"weight": torch.zeros(30, 2)}, ValueError, r"routing: expected weight of shape \(30, 1\), got \(30, 2\)"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    routing = route_tokens(routing_logits(30, 6))
    fields = {name: value for name, value in change.items() if name in routing._fields}
    tensors = {name: value for name, value in (GOOD | change).items() if name not in fields}
    with pytest.raises(error, match=message):
        expert_swiglu(**tensors, routing=routing._replace(**fields))


@needs_native
@pytest.mark.parametrize("bad", [-1, 30, 1 << 40])
def test_rows_that_are_no_permutation_corrupt_nothing(bad):
    routing = route_tokens(routing_logits(30, 6))
    row = routing.row.clone()
    row[3] = bad
    with pytest.raises((IndexError, RuntimeError), match="index"):
        expert_swiglu(**GOOD, routing=routing._replace(row=row))
    row[3] = row[4]  # two tokens in one row, and none in another
    expert_swiglu(**GOOD, routing=routing._replace(row=row))
