"""The fit recovers a known law from the paper's own grid of runs, and refuses tables that cannot tell one."""

import math
from dataclasses import fields

import numpy as np
import pytest

from tenfold.core.cli import main
from tenfold.fp_scaling import (
    ChinchillaLaw,
    PrecisionLaw,
    RunTable,
    ScalingLaw,
    extrapolation_error,
    held_out_error,
)

LAW = ScalingLaw.paper()
SIZES = (40_894_464, 84_934_656, 154_140_672, 679_477_248)
TOKENS = (10_485_760_000, 20_971_520_000, 52_428_800_000, 104_857_600_000)
CHANNEL = "e0m7 e1m1 e1m2 e1m3 e1m4 e1m5 e1m6 e2m1 e2m3 e3m1 e3m2 e4m1 e4m3 e4m5 e5m1 e5m2 e6m1"


def papers_runs():
    """The (N, D, E, M, B) of the 359 runs that the paper fits; its tensor-wise block is put at 2¹⁵."""
    rows = []
    for N in SIZES:
        for D in TOKENS:
            formats = [(int(name[1]), int(name[3])) for name in CHANNEL.split()]
            if (SIZES[3], TOKENS[3]) == (N, D):
                formats.remove((5, 1))
            blocks = [32, 64, 128, 256, 2**15] + [512] * (N in (SIZES[0], SIZES[3]))
            grid = [(*format, "channel") for format in formats] + [(1, 1, block) for block in blocks]
            names = ("params", "tokens", "exponent_bits", "mantissa_bits", "block_size")
            rows += [dict(zip(names, (N, D, *run), strict=True)) for run in grid]
    assert len(rows) == 359
    return rows


def with_losses(rows, law=LAW.loss, noise=0.0, seed=0):
    errors = np.random.default_rng(seed).normal(0, noise, len(rows)) if noise else np.zeros(len(rows))
    return [{**row, "loss": law(**row) + error} for row, error in zip(rows, errors, strict=True)]


def test_noise_free_runs_give_the_constants_back():
    law = ScalingLaw.fit(with_losses(papers_runs()), bootstrap=0)
    for field in fields(law):
        if field.name != "bootstrap":
            assert getattr(law, field.name) == pytest.approx(getattr(LAW, field.name), rel=1e-3), field.name


@pytest.mark.parametrize("seed", range(3))
def test_noisy_runs_give_the_law_back(seed):
    rows = papers_runs()
    law = ScalingLaw.fit(with_losses(rows, noise=0.005, seed=seed), bootstrap=0)
    truth = np.array([LAW.loss(**row) for row in rows])
    np.testing.assert_allclose([law.loss(**row) for row in rows], truth, rtol=0.005)
    assert law.delta > law.nu


def test_intervals_hold_the_truth_and_tell_exponent_from_mantissa():
    law = ScalingLaw.fit(with_losses(papers_runs(), noise=0.005), bootstrap=60)
    assert len(law.bootstrap) == 60
    for quantity, truth in (
        (lambda law: law.alpha, LAW.alpha),
        (lambda law: law.delta, LAW.delta),
        (lambda law: law.critical_tokens(params=1e9, exponent_bits=1, mantissa_bits=1), None),
    ):
        value, low, high = law.interval(quantity)
        assert low < value < high
        if truth is not None:
            assert abs(value - truth) < 2 * (high - low)
    assert law.interval(lambda law: law.delta - law.nu).low > 0
    assert LAW.interval(lambda law: law.alpha) == (LAW.alpha, -math.inf, math.inf)


def test_a_wild_run_moves_nothing():
    rows = with_losses(papers_runs(), noise=0.005)
    rows[17]["loss"] *= 1.5
    law = ScalingLaw.fit(rows, bootstrap=0)
    np.testing.assert_allclose(law.loss(**papers_runs()[17]), LAW.loss(**papers_runs()[17]), rtol=0.005)


def test_the_baselines_recover_their_own_truth():
    rows = papers_runs()
    N, D, P = np.array([(r["params"], r["tokens"], r["exponent_bits"] + r["mantissa_bits"] + 1) for r in rows]).T
    kumar = 69 * (N * (1 - np.exp(-P / 1.7))) ** -0.24 + 7e4 * D**-0.52 + 1.9
    law = PrecisionLaw.fit([{**r, "loss": loss} for r, loss in zip(rows, kumar, strict=True)], bootstrap=0)
    assert law.gamma == pytest.approx(1.7, rel=1e-3)
    assert law.alpha == pytest.approx(0.24, rel=1e-3)
    chinchilla = 69 * N**-0.24 + 7e4 * D**-0.52 + 1.9
    law = ChinchillaLaw.fit([{**r, "loss": loss} for r, loss in zip(rows, chinchilla, strict=True)], bootstrap=0)
    assert (law.alpha, law.beta, law.epsilon) == pytest.approx((0.24, 0.52, 1.9), rel=1e-3)


def test_errors_on_what_was_held_out():
    table = with_losses(papers_runs(), noise=0.005)
    ours, kumar = (held_out_error(kind, table) for kind in (ScalingLaw, PrecisionLaw))
    assert ours.low < 0.005 < ours.high + 3e-4
    assert kumar.low > 5 * ours.high
    assert extrapolation_error(ScalingLaw, table).value < 0.01
    assert extrapolation_error(ChinchillaLaw, table).value > 0.03


def test_runs_that_share_their_noise_are_resampled_together():
    rows = [{**row, "seed": seed} for row in with_losses(papers_runs()) for seed in range(2)]
    table = RunTable.read(rows)
    assert len(np.unique(table.group)) == 4 * 4 * 2
    assert len(np.unique(table.configurations())) == 359
    assert len(np.unique(RunTable.read(papers := with_losses(papers_runs())).group)) == len(papers)


def test_columns_and_a_file_are_tables_too(tmp_path):
    rows = with_losses(papers_runs()[:20])
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    text = "\n".join(",".join(map(str, row)) for row in (columns, *zip(*columns.values(), strict=True)))
    (tmp_path / "runs.csv").write_text(text)
    tables = [RunTable.read(source) for source in (rows, columns, tmp_path / "runs.csv")]
    for table in tables:
        np.testing.assert_array_equal(table.loss, [row["loss"] for row in rows])
        np.testing.assert_array_equal(table.block_size, tables[0].block_size)


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("loss", math.nan, "row 5: loss: must be finite, got nan"),
        ("loss", math.inf, "row 5: loss: must be finite, got inf"),
        ("loss", 0.0, "row 5: loss: must be positive, got 0"),
        ("loss", "high", "row 5: loss: expected a number, got 'high'"),
        ("params", -40e6, "row 5: params: must be at least 1, got -4e"),
        ("tokens", None, "row 5: tokens: expected a number, got None"),
        ("exponent_bits", -1, "row 5: exponent_bits: must be at least 0, got -1"),
        ("block_size", math.nan, "row 5: block_size: must be finite, got nan"),
        ("block_size", 0, "row 5: block_size: must be at least 1, got 0"),
    ],
)
def test_a_bad_cell_is_named(column, cell, message):
    rows = with_losses(papers_runs())
    rows[4][column] = cell
    with pytest.raises(ValueError, match=message):
        ScalingLaw.fit(rows)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda row: False, "table: has no rows"),
        (lambda row: row["params"] == SIZES[0], "params: at least 2 different values are needed"),
        (lambda row: row["tokens"] == TOKENS[1], "tokens: at least 2 different values are needed"),
        (lambda row: row["exponent_bits"] == 1, "exponent_bits: at least 2 different values are needed"),
        (lambda row: row["mantissa_bits"] == 1, "mantissa_bits: at least 2 different values are needed"),
        (
            lambda row: (row["exponent_bits"], row["mantissa_bits"]) in ((2, 3), (4, 1)) and row["params"] < 1e8,
            "16 rows are too few for the 8 constants of ScalingLaw|17 rows",
        ),
    ],
)
def test_a_table_that_cannot_tell_is_refused(keep, message):
    rows = [row for row in with_losses(papers_runs()) if keep(row)]
    if "too few" in message:
        rows = rows[:15]
        message = "15 rows are too few for the 8 constants of ScalingLaw; at least 16 are needed"
    with pytest.raises(ValueError, match=message):
        ScalingLaw.fit(rows, bootstrap=0)


def test_a_missing_column_is_named():
    rows = with_losses(papers_runs())
    for row in rows:
        del row["block_size"]
    with pytest.raises(ValueError, match="table: no column block_size; needed: params, tokens"):
        ScalingLaw.fit(rows)


def test_a_law_is_saved_and_loaded(tmp_path):
    law = ScalingLaw.fit(with_losses(papers_runs(), noise=0.005), bootstrap=3)
    law.save(tmp_path / "law.json")
    loaded = ScalingLaw.load(tmp_path / "law.json")
    assert loaded == law
    assert loaded.bootstrap == law.bootstrap
    for text in ("{", "[]", '{"law": "PrecisionLaw", "constants": {}}', '{"law": "ScalingLaw", "constants": {"n": 1}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="is not a law that fit-law wrote"):
            ScalingLaw.load(tmp_path / "bad.json")


def csv_of(rows, path):
    path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))
    return str(path)


def test_fit_law_and_plan_on_the_command_line(tmp_path, capsys):
    table = csv_of(with_losses(papers_runs(), noise=0.005), tmp_path / "runs.csv")
    assert main(["fp-scaling", "fit-law", table, "--bootstrap", "5"]) == 0
    assert "Predicted against measured" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"runs.csv", "law.json", "fit.svg"}
    plot = str(tmp_path / "plan.png")
    options = ["--params", "7e9", "--tokens", "2e12", "--plot", plot]
    assert main(["fp-scaling", "plan", *options, "--law", str(tmp_path / "law.json")]) == 0
    assert "e4m3" in capsys.readouterr().out
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_the_plan_of_the_papers_constants(tmp_path, capsys):
    options = ["--params", "1e9", "--tokens", "1e12", "--bits", "8", "--plot", str(tmp_path / "plan.svg")]
    assert main(["fp-scaling", "plan", *options]) == 0
    output = capsys.readouterr().out
    assert "27.3T tokens" in output
    assert "5.18" in output  # best bits for 1e12 tokens
    assert f"{LAW.loss(params=1e9, tokens=1e12, exponent_bits=4, mantissa_bits=3):.4f} nats" in output
    assert main(["fp-scaling", "plan", "--compute", "1e24", "--plot", str(tmp_path / "plan.svg")]) == 0
    assert "5.01 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "give --params and --tokens, or --compute alone"),
        (["plan", "--params", "7e9"], "give --params and --tokens, or --compute alone"),
        (["plan", "--params=-7e9", "--tokens", "2e12"], "params: must be positive, got -7000000000.0"),
        (["plan", "--params", "7e9", "--tokens", "2e12", "--bits", "0"], "bits: must be a whole number of at least 1"),
        (["plan", "--params", "7e9", "--tokens", "2e12", "--block_size", "1"], "block_size: must be above 1, got 1"),
        (["plan", "--params", "7e9", "--tokens", "2e12", "--plot", "x.txt"], "plot: x.txt should end in .svg"),
        (["plan", "--params", "7e9", "--tokens", "2e12", "--law", "no.json"], "law: there is no file no.json"),
        (["fit-law", "no.csv"], "table: there is no file no.csv"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fp-scaling", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
