"""The claims, on made-up losses that follow the law: every criterion, table and figure, without a training."""

import pytest

from tenfold.core.claims import Run
from tenfold.fp_scaling import ScalingLaw
from tenfold.fp_scaling.pilot import TOKENS_PER_STEP, shape, train, twins
from tenfold.fp_scaling.reproduction import claims

LAW = ScalingLaw(
    n=40.0, alpha=0.24, d=700.0, beta=0.5, epsilon=1.9, gamma=1600.0, delta=1.6, nu=1.4
)  # losses and gaps of the size of small models'


def follows_the_law(*, model, steps, lr, seed, fmt=None, targets=("P2", "P4", "P6"), scale="block", block_size=32):
    sizes = shape(model)
    N = sizes["layers"] * (4 * sizes["dim"] ** 2 + 3 * sizes["dim"] * sizes["ffn"])
    at = {"params": N, "tokens": steps * TOKENS_PER_STEP}
    loss = LAW.base_loss(**at) + 0.01 * seed + 0.1 * (lr > 1e-2)
    if fmt:
        E, M = int(fmt[1]), int(fmt[3])
        cost = sum({"P1": 2, "P3": 3, "P5": 4}.get(p, 1 / 3) for p in targets)
        B = block_size if scale == "block" else 1024
        loss += cost * LAW.penalty(**at, exponent_bits=E, mantissa_bits=M, block_size=B) * (1 + 0.1 * seed)
        loss += 0.1 * steps if scale == "tensor" else 0
    return {"loss": loss, "params": N, "tokens": at["tokens"]}


def no_difference(*, formats, model, steps, lr, seed):
    return {"different": 0, "weights": 100, "losses": [3.0, 3.0]}


def diverged(**settings):
    return {"loss": None, "params": 1, "tokens": 1}


FUNCTIONS = (
    claims.exponent_or_mantissa,
    claims.targets,
    claims.block_size,
    claims.data_and_parameters,
    claims.law_on_held_out_runs,
    claims.more_data_hurts,
    claims.one_exponent_bit_is_none,
)


@pytest.mark.parametrize("budget", ["quick", "default"])
def test_claims_of_losses_that_follow_the_law(budget, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "train", follows_the_law)
    monkeypatch.setattr(claims, "twins", no_difference)
    run = Run("tenfold.fp_scaling", tmp_path, budget=budget, seeds=range(2))
    found = {claim.name: claim for function in FUNCTIONS for claim in function(run)}
    expected = {
        "e1m1-over-e2m0",
        "targets-cheap",
        "targets-p5",
        "targets-all-three",
        "block-size",
        "gap-grows-with-data",
        "gap-shrinks-with-parameters",
        "more-data-hurts",
        "e1m6-is-e0m7",
    }
    if budget == "default":
        expected |= {"e2m1-over-e1m2", "e2m1-over-e3m0", "law-beats-precision-law", "law-beats-chinchilla"}
    assert found.keys() == expected
    for name, claim in found.items():
        if name != "targets-all-three":
            assert claim.holds, (name, claim.interval)
        assert len(claim.values) == 2
    assert found["block-size"].figure.startswith("<svg")
    if budget == "default":  # the law itself made the losses
        [ours, *_] = found["law-beats-precision-law"].table
        assert float(ours["held-out error, nats"].split()[0]) < 1e-3
        assert "delta 1.6 [1.6, 1.6]" in found["law-beats-precision-law"].notes
    assert "exponents 0.5" in found["gap-grows-with-data"].notes


def test_a_run_that_diverged_is_an_error_and_no_score(tmp_path, monkeypatch):
    def only_float32(**settings):
        return (diverged if settings.get("fmt") else follows_the_law)(**settings)

    monkeypatch.setattr(claims, "_runs", lambda run, model, steps, q: [only_float32(model=model, **SMALL, **q)] * 3)
    with pytest.raises(RuntimeError, match=r"a training of 2x32 with .*'e1m1', 'block_size': 2. diverged"):
        claims.block_size(Run("tenfold.fp_scaling", tmp_path, budget="quick"))


SMALL = {"steps": 2, "lr": 1e-3, "seed": 0}


def test_a_training():
    plain = train(model="1x32", **SMALL)
    assert plain == train(model="1x32", **SMALL)
    quantized = train(model="1x32", **SMALL, fmt="e1m1")
    assert plain["params"] == quantized["params"] == 4 * 32**2 + 3 * 32 * 96
    assert plain["tokens"] == 2 * TOKENS_PER_STEP
    assert 0 < abs(plain["loss"] - quantized["loss"]) < 0.1
    assert train(model="1x32", steps=3, lr=1e30, seed=0)["loss"] is None


def test_twins():
    assert twins(formats=["e1m6", "e0m7"], model="1x32", **SMALL)["different"] == 0
    result = twins(formats=["e1m6", "e1m5"], model="1x32", **SMALL)
    assert 0 < result["different"] <= result["weights"]
    assert result["weights"] == 13_312 + 2 * 512 * 32 + 3 * 32
