"""The `tenfold` command: what it says, what it leaves behind, and how it says no."""

import csv
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tenfold.core.cli import main
from tenfold.core.reproduce import ReproduceError
from tenfold.core.training import load_checkpoint

TOY = Path(__file__).parent / "toy"
FIT = ["fit", "toy", "--config", "tiny"]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENFOLD_DEBUG", raising=False)
    return tmp_path


def weights(run):
    return load_checkpoint(f"runs/toy/{run}/checkpoints/last.ckpt")["state_dict"]


def metrics(run):
    with Path(f"runs/toy/{run}/metrics.csv").open(newline="") as file:
        return [(row["step"], row["train/loss"], row["val/loss"]) for row in csv.DictReader(file)]


def test_listing_and_help_do_not_import_torch():
    code = (
        "import sys; from tenfold.core.cli import main; "
        "assert main(['list']) == main([]) == main(['fit']) == main(['--version']) == 0; "
        "sys.exit('torch' in sys.modules or 'jsonargparse' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(TOY)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"toy" in done.stdout
    assert b"A toy: a small network trained on noise" in done.stdout


def test_info(capsys):
    assert main(["info", "toy"]) == 0
    out = capsys.readouterr().out
    assert "toy_method 0.1" in out
    assert "tenfold fit toy --config tiny" in out
    assert "Say something." in out
    assert "tiny               A network of 97 weights, in a blink\n" in out


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "tenfold.core", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tenfold 0.")


def test_verb(capsys):
    assert main(["toy", "say", "hi", "--times", "2"]) == 0
    assert capsys.readouterr().out == "hi hi\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_interrupt_and_resume(name, status, monkeypatch, capsys):
    assert main([*FIT, "--model.lr", "0.02"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # not a terminal: no bar
    assert "val/loss" in out
    monkeypatch.setenv("TOY_SIGNAL", f"{name}:13:0")
    assert main([*FIT, "--model.lr", "0.02"]) == status
    assert capsys.readouterr().out.endswith("to go on: tenfold fit toy --resume runs/toy/tiny-2\n")
    monkeypatch.delenv("TOY_SIGNAL")
    # With the run's own learning rate, not the config's.
    assert main(["fit", "toy", "--ckpt_path", "last"]) == 0
    torch.testing.assert_close(weights("tiny-2"), weights("tiny"), rtol=0, atol=0)
    assert metrics("tiny-2") == metrics("tiny")
    assert {f.name for f in Path("runs/toy").iterdir()} == {"tiny", "tiny-2"}
    assert not list(Path("runs").rglob(".*"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [9, 14, 16])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.val_check_interval", "5"],
        ["--trainer.accumulate_grad_batches", "3", "--trainer.max_epochs", "5"],
    ],
    ids=["plain", "validating", "accumulating"],
)
@pytest.mark.parametrize("how", ["signal", "crash"])
def test_metrics_after_a_resume_are_those_of_an_uninterrupted_run(how, options, step, monkeypatch):
    """Rows, steps and values; a crash is in the step after, and comes after rows that no checkpoint knows."""
    import toy_method

    assert main([*FIT, *options]) == 0
    if how == "signal":
        monkeypatch.setenv("TOY_SIGNAL", f"SIGTERM:{step}:0")
        assert main([*FIT, *options]) == 143
        monkeypatch.delenv("TOY_SIGNAL")
    else:

        def fail(self, *_):
            if self.global_step == step + 1:
                raise RuntimeError("lost")

        monkeypatch.setattr(toy_method.Toy, "on_before_optimizer_step", fail, raising=False)
        with pytest.raises(RuntimeError, match="lost"):
            main([*FIT, *options])
        monkeypatch.delattr(toy_method.Toy, "on_before_optimizer_step")
    assert main(["fit", "toy", "--resume", "runs/toy/tiny-2"]) == 0
    assert metrics("tiny-2") == metrics("tiny")


@pytest.mark.filterwarnings("ignore")
def test_a_second_interrupt_stops_at_once(monkeypatch, capsys):
    import signal

    import toy_method

    def training_step(self, batch, index):
        for _ in range(2 * (self.global_step == 3)):
            signal.raise_signal(signal.SIGINT)
        return self.net(batch).square().mean()

    monkeypatch.setattr(toy_method.Toy, "training_step", training_step)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    assert main(FIT) == 130
    assert "nothing was saved" in capsys.readouterr().out
    assert not list(Path("runs").rglob("*.ckpt"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore")
def test_run_folder_holds_all_that_evaluation_needs(capsys):
    Path("mine.yaml").write_text("trainer: {max_epochs: 1}\nmodel: {init_args: {kind: b}}\n")
    assert main([*FIT, "--config", "mine.yaml", "--seed_everything", "5"]) == 0
    run = Path("runs/toy/mine")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 1
    assert config["model"]["init_args"] | {"kind": "b", "dropout": 0.2} == config["model"]["init_args"]
    assert config["seed_everything"] == 5
    expected = metrics("mine")[-1][2]
    capsys.readouterr()
    assert main(["validate", "toy", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    assert expected[:6] in capsys.readouterr().out
    assert [f.name for f in Path("runs/toy").iterdir()] == ["mine"]


@pytest.mark.filterwarnings("ignore")
def test_a_log_has_a_line_per_validation_and_per_minute(monkeypatch, capsys):
    assert main([*FIT, "--trainer.val_check_interval", "5"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and " of " in line]
    assert [line.split("  ")[0] for line in lines] == [f"step {n} of 20" for n in (5, 10, 15, 20)]
    last = metrics("tiny")[-1][2]
    assert f"val/loss {float(last):.4g}" in lines[-1]

    clock = iter(range(0, 10**6, 13))  # seconds between one look at it and the next
    monkeypatch.setattr("tenfold.core.training.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert main([*FIT, "--trainer.limit_val_batches", "0"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 20" in line]
    assert [line.split("  ")[0] for line in lines] == [f"step {n} of 20" for n in (5, 10, 15, 20)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [["--trainer.max_steps", "15", "--trainer.max_epochs", "-1"], []])
def test_the_bar_counts_steps_and_fits_80_columns(limit, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*FIT, *limit]) == 0
    out, err = capsys.readouterr()
    shown = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", err))
    assert any(("15/15" if limit else "20/20") in line and "val/loss" in line for line in shown), err
    assert max(map(len, shown)) <= 80
    assert " of " not in out


@pytest.mark.filterwarnings("ignore")
def test_help_shows_the_configs_own_classes_first(capsys):
    for arguments in (FIT, ["fit", "toy"]):
        assert main([*arguments, "--model.lr", "0.5", "--help"]) == 0
        out = capsys.readouterr().out
        places = [
            out.index(name) for name in ("--config", "--model.kind {a,b}", "--data.batch_size", "--trainer.max_steps")
        ]
        assert places == sorted(places)
    assert main(["fit", "toy", "--config", "lm", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--model.ffn FFN inner width of the feed-forward. (type: int, default: 24)" in out
    assert not Path("runs").exists()


@pytest.mark.filterwarnings("ignore")
def test_loggers_by_name(capsys, monkeypatch):
    assert main([*FIT, "--trainer.logger", "CSVLogger"]) == 0
    assert metrics("tiny")
    assert main([*FIT, "--trainer.logger=false"]) == 0
    assert not Path("runs/toy/tiny-2/metrics.csv").exists()
    capsys.readouterr()
    monkeypatch.setattr("tenfold.core.training.runs.find_spec", lambda name: None)
    assert main([*FIT, "--trainer.logger", "TensorBoardLogger"]) == 2
    assert capsys.readouterr().err == "tenfold: trainer.logger: TensorBoardLogger needs pip install tensorboard\n"
    assert not Path("runs/toy/tiny-3").exists()


@pytest.mark.filterwarnings("ignore")
def test_another_logger_writes_into_the_runs_folder_beside_metrics_csv(monkeypatch):
    from lightning.pytorch import loggers

    class Other(loggers.CSVLogger):
        """In TensorBoard's place, which is not installed for the tests."""

    monkeypatch.setattr(loggers, "TensorBoardLogger", Other)
    monkeypatch.setattr("tenfold.core.training.runs.find_spec", lambda name: True)
    assert main([*FIT, "--trainer.logger", "TensorBoardLogger"]) == 0
    assert metrics("tiny")
    assert list(Path("runs/toy/tiny/tensorboard").rglob("metrics.csv"))


@pytest.mark.filterwarnings("ignore")
def test_the_root_of_the_run_folders_can_be_chosen(capsys):
    assert main([*FIT, "--trainer.default_root_dir", "elsewhere"]) == 0
    assert Path("elsewhere/toy/tiny/checkpoints/last.ckpt").exists()
    assert not Path("runs").exists()
    assert main(["fit", "toy", "--resume", "--trainer.default_root_dir=elsewhere"]) == 0
    Path("root.yaml").write_text("trainer: {default_root_dir: third}\n")
    assert main([*FIT, "--config", "root.yaml"]) == 0
    assert Path("third/toy/root/checkpoints/last.ckpt").exists()
    assert main(["predict", "toy", "--ckpt_path", "elsewhere/toy/tiny/checkpoints/last.ckpt"]) == 2
    assert "predict: Toy has nothing to predict" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_nan_is_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setenv("TOY_NAN", "4")
    assert main(FIT) == 1
    err = capsys.readouterr().err
    assert err.startswith("tenfold: step 4, epoch 0, batch 4: loss nan")
    assert err.count("\n") == 1


def broken(text):
    Path("broken.yaml").write_text(text)
    return "broken.yaml"


TINY = (TOY / "toy_method" / "configs" / "tiny.yaml").read_text()
MISTAKES = {
    # arguments after `tenfold`: what the line must hold
    "fitt toy": ["'fitt'", "did you mean 'fit'?"],
    "fit tyo --config tiny": ["unknown method 'tyo'", "did you mean 'toy'?"],
    "fit zzz": ["unknown method 'zzz'", "accepted", "toy"],
    "toy sya": ["unknown verb of toy 'sya'", "did you mean 'say'?"],
    "toy fit": ["tenfold fit toy"],
    "toy say": ["text"],
    "toy say hi --times x": ["times: expected int, got 'x'"],
    "toy say hi --tims 2": ["'tims'", "did you mean 'times'?"],
    "toy say hi --times 0": ["times: must be at least 1, got 0"],
    "list all": ["unrecognized arguments: all"],
    "reproduce toy --quik": ["'--quik'", "did you mean '--quick'?"],
    "reproduce toy --seeds 0": ["seeds: expected at least 1, got 0"],
    "reproduce toy --seeds few": ["--seeds", "'few'"],
    "reproduce tyo": ["unknown method 'tyo'"],
    "report --output nowhere": ["output", "nowhere", "tenfold reproduce"],
    "bench nothing": ["unknown benchmark 'nothing'"],
    "fit toy": ["config", "tiny"],
    "fit toy --config tny": ["config", "'tny'", "did you mean 'tiny'?"],
    "fit toy --config no/such.yaml": ["config", "no/such.yaml", "tiny"],
    "fit toy --config": ["--config: expected a value"],
    "fit toy --config tiny extra": ["unexpected argument 'extra'"],
    "fit toy --config tiny --model.dropuot 0.1": ["'model.dropuot'", "did you mean 'model.dropout'?"],
    "fit toy --config tiny --trainer.max_epoch 3": [
        "'trainer.max_epoch'",
        "did you mean 'trainer.max_epochs'?",
    ],
    "fit toy --config tiny --model.dropout lots": ["model.dropout: expected float, got 'lots'"],
    "fit toy --config tiny --model.lr nan": ["model.lr: expected float, got 'nan'"],
    "fit toy --config tiny --model.kind c": ["model.kind: expected 'a' or 'b', got 'c'"],
    "fit toy --config tiny --model.dropout 2": ["dropout: must be at most 1, got 2.0"],
    "fit toy --config tiny --data own.txt": ["--data own.txt: did you mean --data.path own.txt?"],
    "fit toy --config tiny --data=folder/own.jsonl": ["did you mean --data.path folder/own.jsonl?"],
    "fit toy --config tiny --data.batch_size=x": ["data.batch_size: expected int, got 'x'"],
    "fit toy --config tiny --data.batch_size 41": ["batch_size", "40"],
    "fit toy --config tiny --data.path no/such/file": ["no/such/file"],
    "fit toy --config tiny --trainer.max_epochs many": ["trainer.max_epochs: expected int", "'many'"],
    "fit toy --config tiny --trainer.max_epochs -5": ["trainer.max_epochs", "non-negative", "-5"],
    "fit toy --config tiny --trainer.max_epochs": ["trainer.max_epochs: expected one argument"],
    "fit toy --config tiny --trainer.devices 9999": ["trainer.devices: 9999", "this machine has"],
    "fit toy --config tiny --trainer.strategy nope": ["trainer.strategy", "nope"],
    "fit toy --config tiny --seed_everything -3": ["seed_everything", "-3"],
    "fit toy --resume": ["resume", "no run to go on with"],
    "fit toy --resume no/run": ["resume", "no/run"],
    "fit toy --config tiny --ckpt_path no.ckpt": ["checkpoint no.ckpt: there is no such file"],
    "fit toy --config tiny --ckpt_path broken.yaml": ["checkpoint broken.yaml: damaged"],
    "validate toy --config tiny --ckpt_path broken.yaml": ["checkpoint broken.yaml: damaged"],
    "validate toy --config tiny": ["ckpt_path: validate needs a checkpoint"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes(line, capsys):
    broken("")
    refused(line.split(), MISTAKES[line], capsys)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [1, 2\n  x: y", ["broken.yaml", "not valid YAML", "line 2"]),
        ("- a", ["broken.yaml", "expected sections", "list"]),
        (TINY.replace("dropout", "dropuot"), ["'model.dropuot'", "did you mean 'model.dropout'?"]),
        (TINY.replace("0.2", "[1]"), ["model.dropout: expected float, got '[1]'"]),
        (TINY.replace("trainer:", "trianer:"), ["trianer", "did you mean 'trainer."]),
        (TINY.replace("max_epochs", "max_epoch"), ["'trainer.max_epoch'", "'trainer.max_epochs'"]),
        (TINY.replace("toy_method.Toy", "toy_method.Tyo"), ["model.class_path 'toy_method.Tyo'"]),
        ("model: {dropout: 0.1}", ["model.class_path"]),
    ],
)
def test_mistakes_in_a_config(text, words, capsys):
    refused(["fit", "toy", "--config", broken(text)], words, capsys)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_another_model_is_refused(capsys):
    torch.save({"state_dict": {"other": torch.zeros(1)}, "pytorch-lightning_version": "2.6.6"}, "other.ckpt")
    refused([*FIT, "--ckpt_path", "other.ckpt"], ["checkpoint other.ckpt", "not this model's"], capsys)


def refused(arguments, words, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("tenfold: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert not Path("runs").exists(), "nothing half written"


def test_reproduce(monkeypatch, capsys):
    calls = []
    outcomes = {0: None, 1: ReproduceError("not all"), 2: ValueError("output: no"), 143: SIGTERMException()}

    def reproduce(methods, **options):
        calls.append(([method.name for method in methods], options))
        if outcome := outcomes[expected]:
            raise outcome

    monkeypatch.setattr("tenfold.core.reproduce.reproduce", reproduce)
    for expected in outcomes:
        assert main(["reproduce", "toy", "--quick", "--seeds", "4", "--output", "there"]) == expected
        assert capsys.readouterr().err.count("\n") == (expected in (1, 2))
    assert calls[0] == (["toy"], {"budget": "quick", "seeds": 4, "output": Path("there")})
    assert len(calls) == 4


def test_debug_shows_where_it_came_from(monkeypatch):
    monkeypatch.setenv("TENFOLD_DEBUG", "1")
    with pytest.raises(Exception, match="unknown method") as caught:
        main(["info", "tyo"])
    assert caught.traceback[-1].name == "load"


def test_bench_outside_a_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tenfold.core.cli.__file__", str(tmp_path / "cli.py"))
    refused(["bench"], ["bench", "in a checkout"], capsys)


def test_bench_runs_the_script(monkeypatch, capfd, tmp_path):
    for folder, script in (("kernels", "op_one"), ("packages/core", "none"), ("packages/my-method", "speed")):
        path = tmp_path / folder / "benchmarks" / f"{script}.py"
        path.parent.mkdir(parents=True)
        path.write_text(f"import sys\nif __name__ == '__main__':\n    print('{script}', *sys.argv[1:])\n")
    (tmp_path / "kernels" / "benchmarks" / "helper.py").write_text("raise SystemExit(3)\n")
    assert main(["bench", "my-method", "--rows", "3"]) == 0
    assert "speed --rows 3\n" in capfd.readouterr().out
    assert main(["bench", "op_on"]) == 2
    assert "did you mean 'op_one'?" in capfd.readouterr().err
    (tmp_path / "kernels" / "benchmarks" / "op_one.py").write_text("if __name__ == '__main__': exit(4)")
    assert main(["bench", "op_one"]) == 4
