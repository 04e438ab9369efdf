"""The law's numbers by the paper, and the fit on losses whose optimum is known."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.cli import main
from tenfold.hunyuan_moe import fit_isoflops, minimal_compute, training_flops
from tenfold.hunyuan_moe.scaling.law import PAPERS_PARAMS, PAPERS_TOKENS


def test_the_papers_numbers():
    assert training_flops(58.1e9, 5.6e12) == pytest.approx(3.1215e24, rel=1e-4)
    assert training_flops(52e9, 7e12) == pytest.approx(3.4924e24, rel=1e-4)
    assert PAPERS_PARAMS.inverse(58.1e9) == pytest.approx(3.1088e24, rel=1e-4)
    assert PAPERS_TOKENS(3.1088e24) == pytest.approx(5.642e12, rel=1e-3)
    for compute, params, tokens in ((5e18, 4.905e7, 7.155e9), (9.5e19, 2.339e8, 3.119e10)):
        assert PAPERS_PARAMS(compute) == pytest.approx(params, rel=1e-3)
        assert PAPERS_TOKENS(compute) == pytest.approx(tokens, rel=1e-3)
    assert minimal_compute(3e24, 0.5) == pytest.approx(2e24)
    with pytest.raises(ValueError, match="compute: must be positive, got -1"):
        minimal_compute(-1, 0)
    with pytest.raises(ValueError, match="batch_ratio: must be finite and not negative, got nan"):
        minimal_compute(1e20, math.nan)


def chinchilla(alpha, beta, *, noise=0.0, seeds=1, sizes=7):
    """Runs on isoFLOP curves of L = 1.7 + 400/N^α + 410/D^β with C = 6ND, whose optimum is known."""
    rng = np.random.default_rng(0)
    rows = []
    for compute in np.geomspace(5e18, 9.5e19, 5):
        g = (alpha * 400 / (beta * 410)) ** (1 / (alpha + beta))
        best = g * (compute / 6) ** (beta / (alpha + beta))
        for params in best * np.geomspace(0.5, 2, sizes):
            tokens = compute / (6 * params)
            for _ in range(seeds):
                loss = 1.7 + 400 / params**alpha + 410 / tokens**beta + noise * rng.standard_normal()
                rows.append({"params": params, "tokens": tokens, "loss": loss})
    return rows


@settings(max_examples=25, deadline=None)
@given(st.floats(0.2, 0.5), st.floats(0.2, 0.5))
def test_known_exponents_are_recovered(alpha, beta):
    fit = fit_isoflops(chinchilla(alpha, beta), per_parameter=6, per_token=0, bootstrap=0)
    assert fit.params_exponent.value == pytest.approx(beta / (alpha + beta), rel=0.01)
    assert fit.tokens_exponent.value == pytest.approx(alpha / (alpha + beta), rel=0.01)
    assert all(curve.inside for curve in (*fit.curves, *fit.token_curves))


def test_intervals_cover_noise():
    fit = fit_isoflops(chinchilla(0.34, 0.28, noise=2e-3, seeds=3), per_parameter=6, per_token=0)
    assert fit.params_exponent.low < 0.28 / 0.62 < fit.params_exponent.high
    assert fit.params_exponent.high - fit.params_exponent.low < 0.2


def test_given_compute_is_used_instead_of_the_formula():
    rows = [r | {"compute": 6 * r["params"] * r["tokens"]} for r in chinchilla(0.34, 0.28)]
    ours = fit_isoflops(rows, bootstrap=0)
    assert ours.params == pytest.approx(fit_isoflops(chinchilla(0.34, 0.28), per_parameter=6, per_token=0).params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:7], "a power law needs at least two budgets of compute, got 1"),
        (lambda rows: [], "runs: there are no rows"),
        (lambda rows: rows[:9], "has fewer than three sizes"),
        (lambda rows: [{**r, "loss": -r["loss"]} for r in rows], "row 1: loss: must be positive and finite"),
        (lambda rows: [{**r, "loss": 9 - r["loss"]} for r in rows], "do not rise on both sides of a least one"),
        (lambda rows: [{**r, "tokens": "many"} for r in rows], "row 1: tokens: expected a number, got 'many'"),
        (lambda rows: [{"params": 1, "tokens": 2}], "there is no column 'loss'; .* found params, tokens"),
        # losses on a straight line, up to the last digits
        (
            lambda rows: [
                {**r, "loss": 9 - 0.1 * np.log(r["params"]) + 1e-9 * (i % 7) ** 2} for i, r in enumerate(rows)
            ],
            "at 5e.18 operations do not rise on both sides of a least one: no minimum",
        ),
    ],
)
def test_bad_tables(change, message):
    with pytest.raises(ValueError, match=message):
        fit_isoflops(change(chinchilla(0.34, 0.28)), per_parameter=6, per_token=0)


def write(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def test_a_file_from_a_spreadsheet(tmp_path):
    file = tmp_path / "runs.csv"
    write(file, chinchilla(0.34, 0.28))
    expected = fit_isoflops(file, per_parameter=6, per_token=0, bootstrap=0)
    file.write_text(file.read_text().replace(",", ", ").replace("loss", "loss "), encoding="utf-8-sig")
    found = fit_isoflops(file, per_parameter=6, per_token=0, bootstrap=0)
    assert (found.params, found.tokens) == (expected.params, expected.tokens)
    file.write_text("params;tokens;loss\n1;2;3\n")
    with pytest.raises(ValueError, match=r"no column 'params'; .* found params;tokens;loss"):
        fit_isoflops(file)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["hunyuan-moe", "scaling", "--compute", "3.1088e24"]) == 0
    out = capsys.readouterr().out
    assert "58.1B" in out
    assert "5.64T" in out
    assert not list(tmp_path.iterdir())
    assert main(["hunyuan-moe", "scaling", "--params", "52e9", "--tokens", "7e12"]) == 0
    assert "C = 3.4924e+24" in capsys.readouterr().out
    write(tmp_path / "runs.csv", chinchilla(0.34, 0.28))
    arguments = ["--runs", "runs.csv", "--per_parameter", "6", "--per_token", "0", "--compute", "1e21"]
    assert main(["hunyuan-moe", "scaling", *arguments, "--plot", "fit.svg"]) == 0
    assert "fitted to your runs" in capsys.readouterr().out
    assert (tmp_path / "fit.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "scaling: give --compute, or --params and --tokens, or --runs"),
        (["--params", "1e9"], "scaling: give --compute, or --params and --tokens"),
        (["--compute", "-1"], "compute: must be positive, got -1"),
        (["--runs", "none.csv"], "runs: there is no file none.csv"),
        (["--compute", "1e20", "--batch_ratio", "-1"], "batch_ratio: must be finite and not negative, got -1.0"),
        (["--runs", "x.csv", "--plot", "fit.docx"], "plot: .docx is not a kind of figure"),
    ],
)
def test_bad_commands(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["hunyuan-moe", "scaling", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
