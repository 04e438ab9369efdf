"""The claims: each computed from its measurements, which are made up here, with the criterion that is in the file."""

import pytest

from tenfold.clla.formats import Format
from tenfold.clla.method import METHOD
from tenfold.clla.reproduction import claims
from tenfold.clla.reproduction.decoding import CONTENDERS
from tenfold.clla.reproduction.experiments import ARMS, SIZES, normal_snr
from tenfold.core.claims import Run

LOSS = {"MHA": 3.0, "CLLA": 3.01, "CLLA-quant": 3.02, "CLLA of three layers": 3.2}
SLOPES = dict(zip(CONTENDERS, (1e-6, 5e-6, 3e-6), strict=True))  # seconds per token of context


class MadeUp:
    """A Run whose measurements are plain functions of their settings: no training."""

    budget, seeds = "quick", (0, 1, 2)
    tune = Run.tune

    def __init__(self):
        self.asked, self.planned = [], 0

    def plan(self, n):
        self.planned += n

    def measure(self, key, function, /, **settings):
        self.asked.append(key)
        return getattr(self, function.__name__)(**settings)

    def language_model(self, *, size, arm, steps, lr, seed):
        best = 8e-3 if arm == "MHA" else 3.2e-2  # the latter lies outside the plan's rates
        result = {
            "bits_per_byte": LOSS[arm] + 0.001 * (seed % 3) + abs(lr - best),
            "parameters": 400_000,
            "ffn": 172,
            "cache_bytes": 100.0,
            "cache_bytes_rounded": 25.0,
        }
        if arm != "MHA":
            result["latent_snr"] = [21.0, 22.0, 23.0]
        return result if arm == "CLLA-quant" else result | {"bits_per_byte_rounded": result["bits_per_byte"] + 0.04}

    def associative_recall(self, *, arm, pairs, steps, lr, seed):
        wrong = {"MHA": 2.0, "CLLA": 2.1, "CLLA-quant": 2.5}[arm] + 0.01 * (seed % 3) + 100 * abs(lr - 8e-3)
        result = {"wrong": wrong, "cache_bytes": 100.0}
        return result if arm == "CLLA-quant" else result | {"wrong_rounded": wrong + 1}

    def cache_storage(self, *, tokens, seed):
        return {"share": 1.9, "without_slack": 1.82, "mha_bytes": 8192.0}

    def decoding(self, *, contexts, layers, rounds, seed):
        seconds = {name: [0.01 + 0.001 * seed + s * c for c in contexts] for name, s in SLOPES.items()}
        names = [f"{k} {w} {x}" for k in ("MHA", "CLLA") for w in ("cpu", "h100") for x in ("bytes", "flops")]
        return {"seconds": seconds, "floors": dict.fromkeys(names, 1e-9)}


@pytest.fixture(scope="module")
def found():
    return {claim.name: claim for function in METHOD.claims for claim in function(MadeUp())}


@pytest.mark.parametrize(
    ("name", "mean", "verdict"),
    [
        ("lossless", 100 * 0.01 / 3.001, "holds"),
        ("lossless-in-4-bits", 100 * 0.02 / 3.001, "holds"),
        ("rounding-costs-nothing", 100 * 0.01 / 3.011, "holds"),
        ("trained-in-beats-rounded-after", 3.02 - 3.05, "holds"),
        ("three-layers-are-worse", 0.19, "holds"),
        ("recall", 0.5, "holds"),
        ("cache-under-2-percent", 1.9, "holds"),
        ("latents-round-like-normal-vectors", 22 - normal_snr(Format(1, 16, 4)), "holds"),
        ("decode-slope", 1e9 * (5e-6 - 2 * 1e-6), "holds"),
        ("decode-faster", sum((t + 5e-6 * 8192) / (t + 1e-6 * 8192) for t in (0.01, 0.011, 0.012)) / 3, "holds"),
    ],
)
def test_values_and_verdicts(found, name, mean, verdict):
    claim = found[name]
    assert claim.interval.mean == pytest.approx(mean, rel=1e-6)
    assert claim.verdict == verdict
    assert claim.interval.n == 3


def test_every_claim_says_where_it_comes_from(found):
    assert len(found) == 10
    for claim in found.values():
        assert claim.paper
        assert claim.baseline
        assert "paper reports" not in claim.statement + claim.paper + claim.notes
    table = {row["arm"]: row for row in found["lossless"].table}
    assert list(table) == list(claims.MAIN)
    assert "CLLA-quant" in found["lossless"].figure
    assert "Ratio of the mean slopes: 5.0; " in found["decode-slope"].notes


def test_each_arm_is_tuned_until_its_best_rate_is_inside_the_grid():
    run = MadeUp()
    claims.ladder_loss(run)
    tried = len(claims.PLAN["quick"][2]) + len((4e-3,)) + 3 * len((3.2e-2, 6.4e-2))
    assert len(set(run.asked)) == run.planned == 4 * 3 + 3 * len(claims.PLAN["quick"][2]) + tried


def test_the_plans_are_of_things_that_exist():
    for size, steps, rates, arms in claims.PLAN.values():
        assert size in SIZES
        assert steps > 0
        assert len(rates) > 1
        assert set(claims.MAIN) <= set(arms) <= set(ARMS)
