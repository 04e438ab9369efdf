"""The sweep: its grid, its table, and that an interrupted one loses nothing."""

import csv

import pytest

from tenfold.core.cli import main
from tenfold.fp_scaling import RunTable
from tenfold.fp_scaling import sweep as module
from tenfold.fp_scaling.sweep import FLOAT32, sweep

GRID = {"models": ["1x32", "2x32"], "tokens": [2048, 4096], "formats": [FLOAT32, "e1m1", "e4m3"]}


class Trainings:
    """Stands in for `train`: counts, and stops after `limit`."""

    def __init__(self, limit=10**9, diverges="none of them"):
        self.calls, self.limit, self.diverges = [], limit, diverges

    def __call__(self, **settings):
        if len(self.calls) == self.limit:
            raise KeyboardInterrupt
        self.calls.append(settings)
        loss = None if settings.get("fmt") == self.diverges else 3.0 + 0.01 * len(self.calls)
        return {"loss": loss, "params": 1000, "tokens": settings["steps"] * 512}


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    output = tmp_path / "sweep.csv"
    first, second, third = Trainings(limit=7), Trainings(), Trainings()
    monkeypatch.setattr(module, "train", first)
    with pytest.raises(KeyboardInterrupt):
        sweep(**GRID, seeds=2, output=output)
    kept = rows(output)
    assert len(kept) == 7
    monkeypatch.setattr(module, "train", second)
    sweep(**GRID, seeds=2, output=output)
    # 2 models, 2 budgets, 2 seeds: float32 once, the formats with three block sizes each
    assert len(rows(output)) == 2 * 2 * 2 * (1 + 2 * 3)
    assert len(second.calls) == len(rows(output)) - 7
    assert rows(output)[:7] == kept
    monkeypatch.setattr(module, "train", third)
    sweep(**GRID, seeds=2, output=output)
    assert third.calls == []
    sweep(**GRID | {"formats": ["e2m1"]}, seeds=1, output=output)  # another grid adds to the table
    assert len(third.calls) == 2 * 2 * 3
    assert list(tmp_path.iterdir()) == [output]


def test_the_table_is_one_for_fit_law(tmp_path, monkeypatch):
    trainings = Trainings(diverges="e4m3")
    monkeypatch.setattr(module, "train", trainings)
    sweep(**GRID, output=tmp_path / "sweep.csv")
    table = RunTable.read(tmp_path / "sweep.csv")
    assert len(table) == 2 * 2 * (1 + 3)  # what diverged is not in it
    assert table.quantized.sum() == 2 * 2 * 3
    plain = ~table.quantized
    assert set(table.exponent_bits[plain] + table.mantissa_bits[plain]) == {31}
    settings = [call for call in trainings.calls if call.get("fmt") == "e1m1"][:3]
    assert [(call["scale"], call.get("block_size")) for call in settings] == [
        ("block", 8),
        ("block", 32),
        ("channel", None),
    ]
    assert "fmt" not in trainings.calls[0]


def test_real_trainings(tmp_path, monkeypatch, capsys):
    grid = {"models": "[1x32]", "tokens": "[2e3]", "formats": "[float32, e1m1]", "block_sizes": "[8, channel]"}
    arguments = [word for name, values in grid.items() for word in (f"--{name}", values)]
    assert main(["fp-scaling", "sweep", *arguments, "--output", str(tmp_path / "sweep.csv")]) == 0
    table = rows(tmp_path / "sweep.csv")
    assert [(row["format"], row["block_size"]) for row in table] == [
        ("float32", "1"),
        ("e1m1", "8"),
        ("e1m1", "channel"),
    ]
    assert {row["tokens"] for row in table} == {"2048"}
    assert {row["params"] for row in table} == {str(4 * 32**2 + 3 * 32 * 96)}
    assert "3 runs in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ["big"]}, "models: expected LAYERSxWIDTH such as 4x64"),
        ({"models": ["2x40"]}, "the width a multiple of 32, got '2x40'"),
        ({"models": []}, "models: give at least one"),
        ({"tokens": [100]}, "tokens: must be at least 512, one batch, got 100"),
        ({"formats": ["e9m9"]}, "e9m9"),
        ({"block_sizes": ["5"]}, "block_size: 5 does not divide the 32 features of model 1x32"),
        ({"block_sizes": ["row"]}, "block_sizes: expected whole numbers or 'channel', got 'row'"),
        ({"seeds": 0}, "seeds: must be at least 1, got 0"),
        ({"lr": -1.0}, "lr: must be positive"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_trained(arguments, message, tmp_path, monkeypatch):
    trainings = Trainings()
    monkeypatch.setattr(module, "train", trainings)
    with pytest.raises(ValueError, match=message):
        sweep(**GRID | arguments, output=tmp_path / "sweep.csv")
    assert trainings.calls == []


def test_another_file_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", Trainings())
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"output: .*notes.csv is not a table of this command"):
        sweep(**GRID, output=tmp_path / "notes.csv")
    assert (tmp_path / "notes.csv").read_text() == "a,b\n1,2\n"
