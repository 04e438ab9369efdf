"""`route_tokens` on the CPU against a router that goes token by token, the paper's figure, and statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import route_tokens, use_backend
from tenfold.kernels.moe import reference
from tenfold.kernels.testing import check_op, peak_memory, poisoned_scratch, routing_logits, with_margin

INTEGERS = ("expert", "slot", "load", "recycled", "dropped", "row", "offsets")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def route(logits, top_k=1, capacity=None, *, seed=0, **options):
    return route_tokens(logits, top_k, capacity, generator=seeded(seed), **options)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def hashed(x):
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def shuffled(n, seed):
    """Swap-or-not as the textbook has it: whole rounds over a list."""
    items = list(range(n))
    for r in range(24 if n > 1 else 0):
        key, salt = hashed(seed ^ hashed(2 * r)) % n, hashed(seed ^ hashed(2 * r + 1))
        items = [
            (key - i) % n if hashed(max(i, (key - i) % n) ^ salt) >= 2**31 else i for i in items
        ]  # fmt: skip
    return items


def route_one_by_one(logits, top_k, capacity, recycle, seed):
    """What `route_tokens` promises, as loops over tokens: expert, slot, load, recycled, dropped."""
    logits = logits.double().tolist()
    T, E = len(logits), len(logits[0]) if logits else 0
    capacity = T if capacity is None else capacity
    members = [[] for _ in range(E)]  # of each expert, its (token, j), in the order of their places
    overflow = []
    for j in range(top_k):
        for t, row in enumerate(logits):
            e = sorted(range(E), key=lambda e: (-row[e], e))[j]
            (members[e] if len(members[e]) < capacity else overflow).append((t, j))
    recycled, dropped = set(), set()
    holes = []  # places given to a token that has the expert already
    if recycle and overflow:
        free = [e for e in range(E) for _ in range(capacity - len(members[e]))]
        new = {}
        for e, taker in zip(free, shuffled(len(free), seed), strict=True):
            if taker < len(overflow):
                new[overflow[taker]] = e
                members[e].append(overflow[taker])
        for entry in overflow:
            t, e = entry[0], new[entry]
            mates = [other for other in members[e] if other[0] == t and other != entry]
            if any(other not in new or other in recycled for other in mates):
                dropped.add(entry)
                holes.append(e)
            else:
                recycled.add(entry)
    else:
        dropped = set(overflow)
    expert, slot = torch.full((2, T, top_k), -1)
    for e, entries in enumerate(members):
        for place, (t, j) in enumerate(entries):
            if (t, j) not in dropped:
                expert[t, j], slot[t, j] = e, place

    def flags(entries):
        return torch.tensor([[(t, j) in entries for j in range(top_k)] for t in range(T)]).view(T, top_k)

    load = torch.tensor([len(m) - holes.count(e) for e, m in enumerate(members)])
    return expert, slot, load, flags(recycled), flags(dropped)


@st.composite
def cases(draw):
    T, E = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(E, 3)))
    recycle = draw(st.booleans())
    least = -(-T * top_k // E) if recycle else 1
    capacity = draw(st.one_of(st.none(), st.just(least), st.integers(least, T + 2)))
    logits = routing_logits(
        *(T, E),
        skew=draw(st.sampled_from([0.0, 2.0, 20.0])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])),
        seed=draw(st.integers(0, 99)),
    )
    if draw(st.booleans()):  # many ties
        logits = logits.round()
    return {"logits": logits, "top_k": top_k, "capacity": capacity, "recycle": recycle, "seed": draw(st.integers(0, 9))}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_it_routes_like_a_router_that_goes_token_by_token(case):
    routing = route(**case)
    logits, top_k, capacity, recycle = (case[n] for n in ("logits", "top_k", "capacity", "recycle"))
    seed = int(torch.randint(2**32, (1,), generator=seeded(case["seed"])))
    expected = route_one_by_one(logits, top_k, capacity, recycle, seed)
    for ours, truth in zip((routing[0], routing[2], *routing[3:6]), expected, strict=True):
        assert ours.equal(truth)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases())
def test_what_holds_for_any_logits(case):
    routing = route(**case)
    logits, top_k, capacity, recycle = (case[n] for n in ("logits", "top_k", "capacity", "recycle"))
    T, E = logits.shape
    choice = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    used = ~routing.dropped

    assert routing.load.equal(routing.expert[used].bincount(minlength=E))
    assert int(routing.load.sum()) == int(used.sum())
    kept = used & ~routing.recycled
    assert routing.expert[kept].equal(choice[kept])
    assert not (routing.expert == choice)[routing.recycled].any()  # none comes back to the expert that had no room
    assert routing.row.flatten().sort().values.equal(torch.arange(T * top_k))
    assert routing.row[used].equal(routing.offsets[routing.expert[used]] + routing.slot[used])
    assert used.any(1).all() or not recycle
    for experts, which in zip(routing.expert, used, strict=True):
        assert len(experts[which].unique()) == int(which.sum())  # never twice at the same

    if capacity is not None:
        assert int(routing.load.max()) <= capacity
    if capacity is None or capacity >= T:
        assert all(getattr(routing, n).equal(getattr(route(logits, top_k), n)) for n in INTEGERS)
        assert not routing.recycled.any()
        assert used.all()
    if top_k == 1 and recycle:
        assert used.all()
        if capacity is not None and E * capacity == T:
            assert routing.load.eq(capacity).all()

    p = logits.softmax(1, dtype=torch.float32).gather(1, routing.expert.clamp(min=0)).masked_fill(~used, 0.0)
    if top_k > 1:
        p = (p / p.sum(1, keepdim=True)).nan_to_num(0.0)  # all dropped, without recycling
    torch.testing.assert_close(routing.weight, p)


def test_figure_two_of_the_paper(backend):
    # Capacity 2: A, C and D choose expert 1, B expert 4. D overflows.
    logits = torch.zeros(4, 4)
    logits[[0, 1, 2, 3], [0, 3, 0, 0]] = 1.0
    seen = set()
    for seed in range(40):
        routing = route(logits, capacity=2, seed=seed)
        assert routing.recycled.squeeze(1).tolist() == [False, False, False, True]
        assert routing.expert[:3, 0].tolist() == [0, 3, 0]
        seen.add(int(routing.expert[3]))
    assert seen == {1, 2, 3}
    dropping = route(logits, capacity=2, recycle=False)
    assert dropping.dropped.squeeze(1).tolist() == [False, False, False, True]
    assert dropping.expert[3] == -1
    assert dropping.weight[3] == 0


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_destinations_go_by_the_free_places():
    # Rooms 0, 1, 3, 6, 10 after the first-comers, and one token too many at the first expert.
    choice = [0] * 11 + [1] * 9 + [2] * 7 + [3] * 4
    logits = torch.nn.functional.one_hot(torch.tensor(choice), 5).float()
    assert route(logits, capacity=10, recycle=False).load.tolist() == [10, 9, 7, 4, 0]
    experts = torch.tensor([int(route(logits, capacity=10, seed=seed).expert[10]) for seed in range(800)])
    counts = experts.bincount(minlength=5)
    assert counts[0] == 0
    expected = 800 * torch.tensor([1, 3, 6, 10]) / 20
    assert chi_square(counts[1:], expected) < 16.27  # of 3 degrees of freedom, exceeded once in 1000


def test_the_draw_is_without_replacement():
    # Two tokens too many, rooms 2 and 2: both go to the same expert with probability 1/3, not 1/2.
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 0, 1, 2, 0]), 4).float()[:, :3]
    logits[6] = torch.tensor([1.0, 0.0, 0.0])
    same = 0
    for seed in range(600):
        routing = route(logits, capacity=3, seed=seed)
        moved = routing.expert[routing.recycled]
        assert len(moved) == 2
        same += int(moved[0] == moved[1])
    assert abs(same - 200) < 4 * math.sqrt(600 / 3 * 2 / 3)


@pytest.mark.parametrize(("n", "critical"), [(3, 20.5), (4, 49.7)])
def test_every_shuffle_is_equally_likely(n, critical):
    seeds = torch.arange(n * 4000)[:, None]
    orders = reference.shuffle(n, seeds)
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == math.factorial(n)
    assert chi_square(counts, len(seeds) / math.factorial(n)) < critical  # exceeded once in 1000


@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_a_shuffle_is_a_permutation_and_spreads(n):
    order = reference.shuffle(n, 12345)
    assert order.sort().values.equal(torch.arange(n))
    assert order.tolist() == shuffled(n, 12345)
    if n == 1000:
        distance = (order - torch.arange(n)).abs().double().mean()
        assert abs(float(distance) - n / 3) < 30  # of a uniform one: n/3, give or take 0.24·√n


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "fraction"),
    [
        (1024, 16, 1.0, 0.04822),
        (1024, 16, 1.25, 0.00108),
        (256, 8, 1.0, 0.0658),
        (4096, 16, 1.0, 0.0241),
        (2048, 64, 1.0, 0.0698),
    ],
)
def test_how_many_are_dropped_when_all_choices_are_equally_likely(tokens, experts, factor, fraction):
    capacity = int(factor * tokens / experts)
    log_p, log_q = math.log(1 / experts), math.log1p(-1 / experts)
    exact = (
        experts
        / tokens
        * sum(
            (n - capacity)
            * math.exp(
                math.lgamma(tokens + 1)
                - math.lgamma(n + 1)
                - math.lgamma(tokens - n + 1)
                + n * log_p
                + (tokens - n) * log_q
            )
            for n in range(capacity + 1, tokens + 1)
        )
    )
    assert exact == pytest.approx(fraction, rel=0.01)

    runs = []
    for seed in range(20):
        logits = torch.rand(tokens, experts, generator=seeded(seed))
        dropping, recycling = route(logits, capacity=capacity, recycle=False), route(logits, capacity=capacity)
        assert recycling.recycled.equal(dropping.dropped)
        runs.append(dropping.dropped.double().mean())
    runs = torch.stack(runs)
    assert abs(runs.mean() - exact) < 4 * runs.std() / math.sqrt(len(runs)) + 1e-9


def test_the_balance_loss(backend):
    even = torch.eye(4).repeat(3, 1) * 1e-6
    torch.testing.assert_close(route(even).balance_loss, torch.tensor(1.0))
    one = torch.tensor([[100.0, 0, 0, 0]]).repeat(8, 1)
    torch.testing.assert_close(route(one).balance_loss, torch.tensor(4.0))
    torch.testing.assert_close(route(even, 2).balance_loss, torch.tensor(2.0))
    logits = routing_logits(50, 6, skew=2.0)
    p, choice = logits.softmax(1), logits.argmax(1)
    expected = 6 * (p.mean(0) * torch.nn.functional.one_hot(choice, 6).float().mean(0)).sum()
    for options in ({}, {"capacity": 9}, {"capacity": 9, "recycle": False}):
        torch.testing.assert_close(route(logits, **options).balance_loss, expected)


def weight_and_balance(logits, **options):
    routing = route(logits, **options)
    return torch.cat([routing.weight.flatten(), routing.balance_loss[None]])


def reference_weight_and_balance(logits, **options):
    with use_backend("reference"):
        return weight_and_balance(logits, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"capacity": 5},
        {"capacity": 5, "recycle": False},
        {"top_k": 2, "capacity": 10},
        {"top_k": 2, "capacity": 4, "recycle": False},
    ],
)
@pytest.mark.parametrize("skew", [0.0, 30.0])
def test_weights_and_gradients_are_within_the_budget(dtype, options, skew):
    logits = routing_logits(40, 8, skew=skew, dtype=dtype)
    check_op(weight_and_balance, reference_weight_and_balance, {"logits": logits}, grads=("logits",), **options)


@pytest.mark.parametrize("options", [{}, {"capacity": 2}, {"top_k": 2, "capacity": 4}, {"top_k": 3, "capacity": 1}])
def test_gradcheck(backend, options):
    logits = routing_logits(7, 4, skew=1.0, dtype=torch.float64).requires_grad_()
    options = options if options.get("capacity") != 1 else options | {"recycle": False}

    def differentiable(logits):
        routing = route(logits, **options)
        return routing.weight, routing.balance_loss

    assert torch.autograd.gradcheck(differentiable, logits)


def test_the_gradient_of_a_recycled_token_reaches_the_router_through_its_new_expert(backend):
    logits = routing_logits(12, 4, skew=5.0).requires_grad_()
    routing = route(logits, capacity=3)
    moved = int(routing.recycled.nonzero()[0, 0])
    new = int(routing.expert[moved])
    (grad,) = torch.autograd.grad(routing.weight[moved, 0], logits)
    p = logits.detach().softmax(1)[moved]
    expected = torch.zeros(12, 4)
    expected[moved] = p[new] * (torch.nn.functional.one_hot(torch.tensor(new), 4) - p)
    torch.testing.assert_close(grad, expected)


def test_the_same_generator_gives_the_same_routing_and_another_gives_another(backend):
    logits = routing_logits(60, 8, skew=3.0)
    first, again, other = (route(logits, capacity=8, seed=seed) for seed in (1, 1, 2))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first.expert.equal(other.expert)
    torch.manual_seed(3)
    default = route_tokens(logits, capacity=8)
    torch.manual_seed(3)
    assert route_tokens(logits, capacity=8).expert.equal(default.expert)


@pytest.mark.parametrize("options", [{}, {"capacity": 9, "recycle": False}])
def test_nothing_is_drawn_where_nothing_can_be_moved(options):
    generator = seeded()
    before = generator.get_state()
    route_tokens(routing_logits(20, 4), generator=generator, **options)
    assert generator.get_state().equal(before)


def test_dropless_tokens_do_not_depend_on_the_batch(backend):
    logits = routing_logits(30, 6)
    for options in ({}, {"top_k": 2}):
        together, alone = route(logits, **options), route(logits[10:15], **options)
        assert together.expert[10:15].equal(alone.expert)
        assert together.weight[10:15].equal(alone.weight)


def test_a_kept_token_does_not_depend_on_later_ones():
    logits = routing_logits(40, 4, skew=3.0)
    kept = ~route(logits, capacity=10).recycled
    for T in (5, 17, 39):
        assert (~route(logits[:T], capacity=10).recycled).equal(kept[:T])


def test_no_tokens(backend):
    routing = route(torch.zeros(0, 4), 2, 3)
    assert routing.expert.shape == routing.weight.shape == (0, 2)
    assert routing.load.tolist() == [0] * 4
    assert routing.balance_loss == 0


def test_scratch_and_margins_are_never_read():
    for layout in ("contiguous", "transposed", "sliced"):
        logits = routing_logits(40, 6, skew=2.0, layout=layout)
        with poisoned_scratch():
            guarded = route(with_margin(logits), 2, 15)
        assert all(a.equal(b) for a, b in zip(guarded, route(logits, 2, 15), strict=True))


def test_memory_grows_by_tokens_and_experts_not_by_places():
    def peak(T):
        logits = torch.rand(T, 32, generator=seeded())
        return peak_memory(lambda: route(logits, capacity=T // 32 + 40))

    small, large = peak(4096), peak(8192)
    assert large < 2.2 * small
    assert large < 8192 * 32 * 60  # bytes; tokens × experts × places would be 77 MB as bools


@pytest.mark.parametrize("options", [(1, 40, True), (1, 6, True), (2, 11, True), (2, 6, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 40])
def test_it_is_a_torch_op(options, dtype, tokens):
    logits = routing_logits(tokens, 8, skew=2.0, dtype=dtype, layout="transposed").requires_grad_()
    top_k, capacity, recycle = options
    seed = torch.tensor([7]) if recycle else None
    torch.library.opcheck(torch.ops.tenfold.route_tokens, (logits, seed, top_k, capacity, recycle, "cpu"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(6, 4, dtype=torch.int64)}, TypeError, "logits: dtype torch.int64 is not supported"),
        ({"logits": torch.zeros(6)}, ValueError, r"logits: expected \(tokens, experts\), got shape \(6,\)"),
        ({"logits": torch.zeros(6, 0)}, ValueError, r"logits: expected .* got shape \(6, 0\)"),
        ({"top_k": 5}, ValueError, "top_k: must be from 1 to the number of experts, 4, got 5"),
        ({"top_k": 0}, ValueError, "top_k: .* got 0"),
        ({"capacity": 0}, ValueError, "capacity: must be at least 1, or None for no limit, got 0"),
        ({"capacity": 1}, ValueError, "capacity: 4 experts with room for 1 each .* 6 tokens × top_k 1; .* at least 2"),
        ({"top_k": 2, "capacity": 2}, ValueError, "capacity: .* at least 3"),
        ({"logits": torch.eye(6, 4).log() + torch.nan}, ValueError, "logits: 6 of 6 tokens, the first at 0, have no"),
        ({"logits": 1 / (torch.arange(24.0).view(6, 4) - 13)}, ValueError, "logits: 1 of 6 tokens, the first at 3"),
        ({"logits": torch.full((6, 4), -torch.inf)}, ValueError, "logits: 6 of 6 tokens"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(backend, change, error, message):
    with pytest.raises(error, match=message):
        route_tokens(**{"logits": torch.zeros(6, 4)} | change)


def test_minus_infinity_rules_an_expert_out(backend):
    logits = routing_logits(30, 5)
    logits[:, 2] = -torch.inf
    routing = route(logits, 2)
    assert (routing.expert != 2).all()
    assert routing.weight.isfinite().all()
