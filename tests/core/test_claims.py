import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tenfold.core.claims import Claim, Criterion, Interval, above, below, t_interval, within

FINITE = st.floats(-1e6, 1e6).map(lambda x: round(x, 6))


def claim(values=(1.0, 2.0, 3.0), criterion=None, **changes):
    fields = {
        "name": "toy",
        "statement": "Less is more.",
        "paper": "-1 (Table 2)",
        "criterion": criterion or below(0),
        "values": values,
        "unit": "bits",
        "baseline": "nothing",
    }
    return Claim(**{**fields, **changes})


@given(st.lists(FINITE, min_size=2, max_size=20).filter(lambda v: len(set(v)) > 1))
def test_interval_is_scipys(values):
    ours = t_interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert ours.low == pytest.approx(low, rel=1e-9, abs=1e-9)
    assert ours.high == pytest.approx(high, rel=1e-9, abs=1e-9)
    assert ours.n == len(values)


def test_interval_by_hand():
    # s = 1, t(0.975, 2) = 4.302653: 2 ± 4.302653 / √3
    interval = t_interval([1, 2, 3])
    assert (interval.mean, interval.n) == (2, 3)
    assert interval.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert interval.high == pytest.approx(2 + 2.484138, abs=1e-6)


def test_equal_values_give_a_point_and_one_seed_gives_everything():
    assert t_interval([0.1] * 5) == Interval(pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 5)
    assert t_interval([7.0]) == Interval(7.0, -math.inf, math.inf, 1)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, math.nan], [math.inf, 1.0]])
def test_interval_refuses(values):
    with pytest.raises(ValueError, match="values"):
        t_interval(values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([-0.0282, -0.0296, -0.0289], "-0.0289 [-0.0306, -0.0272]"),
        ([2.25], "2.25 (one seed)"),
        ([3, 3, 3], "3 [3, 3]"),
        ([120_000, 121_000, 119_000], "120,000 [117,516, 122,484]"),
        ([1e-9, 2e-9, 3e-9], "2e-09 [-4.841e-10, 4.484e-09]"),
    ],
)
def test_interval_is_written_to_two_digits_of_its_half_width(values, text):
    assert str(t_interval(values)) == text


@pytest.mark.parametrize(
    ("criterion", "low", "high", "verdict"),
    [
        (below(0), -2, -1, "holds"),
        (below(0), 1, 2, "does not hold"),
        (below(0), -1, 1, "undecided"),
        (below(0), -1, 0, "undecided"),
        (below(0), 0, 1, "does not hold"),
        (below(0), 0, 0, "does not hold"),
        (above(1), 1.5, 2, "holds"),
        (above(1), 0, 1, "does not hold"),
        (above(1), 1, 2, "undecided"),
        (above(1), 0, 2, "undecided"),
        (within(-1, 1), -1, 1, "holds"),
        (within(-1, 1), 0, 0, "holds"),
        (within(-1, 1), -2, 0, "undecided"),
        (within(-1, 1), -2, 2, "undecided"),
        (within(-1, 1), -3, -1, "undecided"),
        (within(-1, 1), -3, -1.5, "does not hold"),
        (within(-1, 1), 2, 3, "does not hold"),
        (below(0), -math.inf, math.inf, "undecided"),
        (above(0), -math.inf, math.inf, "undecided"),
        (within(-1, 1), -math.inf, math.inf, "undecided"),
    ],
)
def test_verdict(criterion, low, high, verdict):
    measured = claim(criterion=criterion)
    measured.interval = Interval((low + high) / 2, low, high, 3)
    assert measured.verdict == verdict
    assert measured.holds == (verdict == "holds")


@given(st.lists(FINITE, min_size=1, max_size=6), FINITE, st.floats(0.001, 1e3))
def test_verdicts_agree_with_points_of_the_interval(values, bound, width):
    interval = t_interval(values)
    points = [interval.mean] if interval.n > 1 else [-1e300, 1e300]
    points += [x for x in (interval.low, interval.high) if math.isfinite(x)]
    for criterion, inside in (
        (below(bound), lambda x: x < bound),
        (above(bound), lambda x: x > bound),
        (within(bound, bound + width), lambda x: bound <= x <= bound + width),
    ):
        verdict = claim(values, criterion).verdict
        if verdict == "holds":
            assert all(map(inside, points))
        elif verdict == "does not hold":
            assert not any(map(inside, points))


def test_criterion_sentences():
    assert str(below(0)) == "interval entirely below 0"
    assert str(above(1.5)) == "interval entirely above 1.5"
    assert str(within(-0.1, 0.1)) == "interval entirely within -0.1 to 0.1"


@pytest.mark.parametrize(
    "make",
    [
        lambda: below(math.nan),
        lambda: below(-math.inf),
        lambda: above(math.inf),
        lambda: within(1, 1),
        lambda: within(2, 1),
        lambda: within(-math.inf, 1),
        lambda: Criterion(-math.inf, math.inf),
    ],
)
def test_criterion_refuses(make):
    with pytest.raises(ValueError, match="criterion"):
        make()


@pytest.mark.parametrize("criterion", [below(0.5), above(-1), within(-2, 3)])
@pytest.mark.parametrize("values", [[0.25], [1.0, -2.0, 0.5]])
def test_json_round_trip(criterion, values):
    rows = [
        {"model": "a", "loss": torch.tensor(2.5), "n": 3},
        {"model": "b", "loss": t_interval([1, 2]), "n": 4},
    ]
    before = claim(values, criterion, table=rows, notes="n", caption="c", figure="<svg></svg>")
    data = json.loads(json.dumps(before.to_json(), allow_nan=False))
    assert Claim.from_json(data) == before
    assert data["mean"] == pytest.approx(sum(values) / len(values))
    assert (data["interval"] is None) == (len(values) == 1)
    assert data["table"][0] == {"model": "a", "loss": 2.5, "n": 3}


def test_a_verdict_edited_into_the_file_is_not_believed():
    data = claim([5.0, 6.0, 5.5]).to_json() | {"verdict": "holds", "mean": -3.0, "interval": [-4, -2]}
    assert Claim.from_json(data).verdict == "does not hold"


def test_a_damaged_claim_is_named():
    data = claim().to_json()
    del data["unit"], data["paper"]
    with pytest.raises(ValueError, match=r"'toy': missing paper, unit"):
        Claim.from_json(data)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"values": [1.0, math.nan]}, "finite"),
        ({"values": []}, "at least one"),
        ({"values": ["much"]}, "much"),
        ({"table": [{"a": 1}, {"b": 1}]}, "columns"),
        ({"table": [{"a": math.inf}]}, "finite"),
        ({"table": [{"a": [1]}]}, "list"),
    ],
)
def test_bad_content_names_the_claim(changes, what):
    with pytest.raises((ValueError, TypeError), match=rf"'toy'.*{what}"):
        claim(**changes)


@pytest.mark.parametrize("name", ["", "a b", "../up", "a/b", '"'])
def test_bad_names(name):
    with pytest.raises(ValueError, match="name"):
        claim(name=name)
