"""The law with the paper's constants, against every number that the paper prints or that follows from it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from tenfold.fp_scaling import ScalingLaw

LAW = ScalingLaw.paper()
SIZES = {
    "41M": 40_894_464,
    "85M": 84_934_656,
    "154M": 154_140_672,
    "679M": 679_477_248,
    "1.2B": 1_233_125_376,
}
TOKENS = np.array([10_485_760_000, 20_971_520_000, 52_428_800_000, 104_857_600_000])
COLUMNS = {"base": None, "E1M1-32": (1, 1, 32), "E1M1-channel": (1, 1, "channel"), "E2M1-32": (2, 1, 32)}
LOSSES = {
    "41M": "3.4607 3.3213 3.1992 3.1384 3.5463 3.4437 3.3956 3.4193 3.6859 3.6434 3.7160 3.8776 3.4775 3.3453 3.2376 "
    "3.1934",
    "85M": "3.2873 3.1479 3.0258 2.9650 3.3593 3.2508 3.1910 3.2013 3.4767 3.4188 3.4604 3.5867 3.3014 3.1681 3.0581 "
    "3.0113",
    "154M": "3.1665 3.0271 2.9050 2.8442 3.2290 3.1165 3.0484 3.0494 3.3310 3.2623 3.2824 3.3841 3.1788 3.0446 2.9331 "
    "2.8844",
    "679M": "2.9305 2.7911 2.6689 2.6082 2.9745 2.8540 2.7699 2.7526 3.0462 2.9566 2.9346 2.9881 2.9391 2.8034 2.6887 "
    "2.6364",
    "1.2B": "2.8566 2.7172 2.5951 2.5344 2.8948 2.7719 2.6828 2.6597 2.9572 2.8610 2.8258 2.8643 2.8641 2.7279 2.6123 "
    "2.5589",
}
LAYOUTS = "e0m0 e1m0 e1m1 e2m1 e2m2 e3m2 e3m3 e4m3 e4m4 e5m4 e5m5 e6m5 e6m6 e7m6 e7m7 e8m7"  # figure 5


@pytest.mark.parametrize("size", LOSSES)
def test_predicted_losses(size):
    predicted = []
    for column in COLUMNS.values():
        if column is None:
            predicted += [LAW.base_loss(params=SIZES[size], tokens=TOKENS)]
        else:
            E, M, B = column
            options = {"exponent_bits": E, "mantissa_bits": M, "block_size": B}
            predicted += [LAW.loss(params=SIZES[size], tokens=TOKENS, **options)]
    np.testing.assert_allclose(np.concatenate(predicted), np.array(LOSSES[size].split(), float), atol=5.1e-5)


@pytest.mark.parametrize(
    ("exponent", "mantissa", "expected"),
    [(1, 2, "2.8718 2.7390 2.6300 2.5843"), (4, 3, "2.8568 2.7175 2.5955 2.5349")],
)
def test_the_papers_held_out_model(exponent, mantissa, expected):
    losses = LAW.loss(
        params=SIZES["1.2B"], tokens=TOKENS, exponent_bits=exponent, mantissa_bits=mantissa, block_size=512
    )
    np.testing.assert_allclose(losses, np.array(expected.split(), float), atol=5.1e-5)


@pytest.mark.parametrize(("bits", "layout"), list(enumerate(LAYOUTS.split(), 1)))
def test_the_best_split_is_that_of_figure_5(bits, layout):
    split = LAW.best_split(bits)
    assert split.name == layout
    assert split.exponent_exact + split.mantissa_exact == pytest.approx(bits - 1)
    if bits >= 3:  # below, the nearest whole number is not the best one
        assert split.exponent_bits == round(split.exponent_exact)


@pytest.mark.parametrize(
    ("exponent", "mantissa", "printed", "value"),
    [(8, 7, 1730e12, 1.730e15), (4, 3, 27e12, 2.733e13), (2, 1, 0.4e12, 3.928e11)],
)
def test_critical_data_of_a_billion_parameters(exponent, mantissa, printed, value):
    format = {"exponent_bits": exponent, "mantissa_bits": mantissa, "block_size": 128}
    critical = LAW.critical_tokens(params=1e9, **format)
    assert critical == pytest.approx(value, rel=3e-4)
    assert critical == pytest.approx(printed, rel=0.02)

    # ∂L/∂D = -βd/D^(β+1) + β·penalty/D
    slope = LAW.penalty(params=1e9, tokens=critical, **format) / (LAW.d / critical**LAW.beta) - 1
    assert abs(slope) < 1e-9
    at = LAW.loss(params=1e9, tokens=critical, **format)
    assert (
        LAW.loss(params=1e9, tokens=critical / 2, **format) > at < LAW.loss(params=1e9, tokens=2 * critical, **format)
    )


@pytest.mark.parametrize(
    ("mantissa", "tokens", "loss"), [(4, 1.52e13, 2.811), (5, 2.70e13, 2.805), (6, 4.36e13, 2.802)]
)
def test_the_minima_of_figure_6(mantissa, tokens, loss):
    format = {"exponent_bits": 3, "mantissa_bits": mantissa, "block_size": 128}
    critical = LAW.critical_tokens(params=1e8, **format)
    assert critical == pytest.approx(tokens, rel=5e-3)
    assert LAW.loss(params=1e8, tokens=critical, **format) == pytest.approx(loss, abs=5.1e-4)


BEST_BITS = [(1e20, 3.95), (1e21, 4.19), (1e22, 4.45), (1e24, 5.01), (1e26, 5.63), (1e28, 6.34), (1e30, 7.14)]
BEST_BITS += [(1e31, 7.58), (1e32, 8.04)]


@pytest.mark.parametrize(("compute", "bits"), BEST_BITS)
def test_the_best_precision_for_a_budget(compute, bits):
    best = LAW.best_bits(compute=compute, block_size=128)
    assert best == pytest.approx(bits, abs=5.1e-3)
    if 1e21 <= compute <= 1e31:
        assert 4 <= best <= 8

    # An independent minimum over log N and log P; D is what the compute leaves.
    rho = LAW.gamma * LAW.delta**LAW.delta * LAW.nu**LAW.nu / (LAW.delta + LAW.nu) ** (LAW.delta + LAW.nu)

    def loss(x):
        N, P = np.exp(x)
        D = compute / (6 / 16) / (P * N)
        return LAW.base_loss(params=N, tokens=D) + D**LAW.beta / N**LAW.alpha * 7 / (rho * P ** (LAW.delta + LAW.nu))

    plan = LAW.allocate(compute, block_size=128)
    start = np.log([1.3 * plan.params, 0.8 * plan.bits])
    found = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15, "maxiter": 4000})
    assert np.exp(found.x[1]) == pytest.approx(best, rel=1e-5)
    assert np.exp(found.x[0]) == pytest.approx(plan.params, rel=1e-4)
    assert found.fun == pytest.approx(plan.loss, rel=1e-9)
    assert plan.bits * plan.params * plan.tokens * 6 / 16 == pytest.approx(compute, rel=1e-9)


@pytest.mark.parametrize(
    ("tokens", "bits"), [(1e11, 4.268), (1e12, 5.179), (1e13, 6.284), (1e14, 7.624), (1e15, 9.251)]
)
def test_the_best_precision_for_given_data(tokens, bits):
    assert LAW.best_bits(tokens=tokens) == pytest.approx(bits, abs=5.1e-4)


def test_the_best_precision_for_a_given_model():
    """At fixed C, P^(δ+ν+2β)·N^(α+2β) is the same for all N (Eq. 24), and it is a minimum."""
    s, C = LAW.delta + LAW.nu, 1e22
    products = [
        LAW.best_bits(params=N, compute=C) ** (s + 2 * LAW.beta) * N ** (LAW.alpha + 2 * LAW.beta)
        for N in (1e8, 1e9, 1e10)
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-9)
    gamma_rho, N, best = 160.6972, 1e9, LAW.best_bits(params=1e9, compute=C)

    def loss(P):
        D = C / (6 / 16) / (P * N)
        return LAW.base_loss(params=N, tokens=D) + D**LAW.beta / N**LAW.alpha * 7 / (gamma_rho * P**s)

    assert loss(best) < min(loss(0.99 * best), loss(1.01 * best))


def test_at_the_joint_optimum_every_partial_answer_agrees():
    plan = LAW.allocate(1e24)
    assert LAW.best_bits(tokens=plan.tokens) == pytest.approx(plan.bits, rel=1e-9)
    assert LAW.best_bits(params=plan.params, compute=1e24) == pytest.approx(plan.bits, rel=1e-9)


CAPACITIES = "e1m1 12.09 e1m2 54.68 e2m1 61.76 e2m2 279.3 e3m1 180.8 e1m3 147.8 e2m3 754.8 e3m2 817.8 e4m3 4929 "
CAPACITIES += "e3m4 4643 e5m2 3462 e8m7 356826 e5m10 240205"


def test_denominators():
    words = CAPACITIES.split()
    for name, printed in zip(words[::2], words[1::2], strict=True):
        E, M = (int(x) for x in name[1:].split("m"))
        value = LAW._capacity(E, M) / LAW.gamma
        assert f"{value:.{max(0, len(printed.partition('.')[2]))}f}" == printed


def test_derived_constants():
    assert LAW._gamma_rho() == pytest.approx(160.6972, abs=5e-5)
    assert LAW._gamma_d() == pytest.approx(2.243280e-3, rel=5e-7)


def test_an_unbounded_answer_and_none():
    format = {"exponent_bits": 4, "mantissa_bits": 3}
    assert LAW.critical_tokens(params=1e9, **format, block_size=1) == math.inf
    assert LAW.penalty(params=1e9, tokens=1e12, **format, block_size=1) == 0
    for options in ({"compute": 1e22}, {"tokens": 1e12}, {"params": 1e9, "compute": 1e22}):
        with pytest.raises(ValueError, match="block_size: at 1 the law has no penalty"):
            LAW.best_bits(**options, block_size=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": -1e9}, "params: must be positive, got -1000000000.0"),
        ({"tokens": 0}, "tokens: must be positive, got 0"),
        ({"tokens": [1e9, math.nan]}, "tokens: must be finite"),
        ({"params": "many"}, "params: expected a number or numbers, got 'many'"),
        ({"exponent_bits": -0.5}, "exponent_bits: must be at least 0, got -0.5"),
        ({"block_size": 0.5}, "block_size: must be at least 1, got 0.5"),
        ({"block_size": "chanel"}, "block_size: expected a number of at least 1 or 'channel', got 'chanel'"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LAW.loss(**{"params": 1e9, "tokens": 1e12, "exponent_bits": 4, "mantissa_bits": 3} | change)


def test_bad_questions():
    with pytest.raises(ValueError, match="give compute, or tokens, or params and compute; got nothing"):
        LAW.best_bits()
    with pytest.raises(ValueError, match=r"got \['params'\]"):
        LAW.best_bits(params=1e9)
    with pytest.raises(ValueError, match="bits: must be a whole number of at least 1, got 0"):
        LAW.best_split(0)


@given(
    params=st.floats(1e5, 1e13),
    tokens=st.floats(1e6, 1e17),
    E=st.floats(0, 8),
    M=st.floats(0, 10),
    B=st.floats(1.01, 1e6),
)
def test_more_precision_never_hurts_and_more_data_has_one_minimum(params, tokens, E, M, B):
    at = {"params": params, "tokens": tokens, "block_size": B}
    loss = LAW.loss(exponent_bits=E, mantissa_bits=M, **at)
    assert loss >= LAW.loss(exponent_bits=E + 1, mantissa_bits=M, **at)
    assert loss >= LAW.loss(exponent_bits=E, mantissa_bits=M + 1, **at)
    critical = LAW.critical_tokens(params=params, exponent_bits=E, mantissa_bits=M, block_size=B)
    minimum = LAW.loss(params=params, tokens=critical, exponent_bits=E, mantissa_bits=M, block_size=B)
    assert minimum <= loss * (1 + 1e-12)
