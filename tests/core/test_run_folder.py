"""A run's folder: what belongs to the run, what it says of itself, and what is refused under its checkpoint."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tenfold.core.cli import main
from tenfold.core.data.corpus import Corpus
from tenfold.core.data.tokenizer import load_tokenizer, train_tokenizer
from tenfold.core.trained import open_run
from tenfold.core.training import load_checkpoint

TOY = Path(__file__).parent / "toy"
RUN = Path("runs/toy/lm")
LAST = RUN / "checkpoints" / "last.ckpt"
TEXT = "\n\n".join(f"The {n}th document says that {n} times {n} is {n * n}." for n in range(300))
OTHER = "\n\n".join(f"Zwölf Boxkämpfer jagen Viktor quer über {n} Deiche." for n in range(300))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)
    Path("other.txt").write_text(OTHER)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with a run in it, and what was exported of it."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOY)
        patch.chdir(folder)
        patch.setenv("TENFOLD_CACHE", str(folder / "cache"))
        Path("text.txt").write_text(TEXT)
        fit()
        assert main(["export", str(RUN), "begin"]) == 0
    return folder


@pytest.fixture
def trained(template):
    """That run, in the current folder."""
    shutil.copytree(template / "runs", "runs")
    shutil.copytree(template / "cache", "cache")


@pytest.fixture
def exported(template):
    """What was exported, in the current folder."""
    shutil.copytree(template / "begin", "begin")


def fit(*arguments):
    assert main(["fit", "toy", "--config", "lm", *arguments]) == 0


def refused(capsys, *arguments):
    """The one line that is said; the run's folder is as it was."""
    before = {file: file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()}
    capsys.readouterr()
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("tenfold: ")
    assert err.count("\n") == 1, err
    assert {file: file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()} == before
    return err


def test_the_tokenizer_belongs_to_the_run(trained, capsys):
    kept = load_tokenizer(RUN / "tokenizer.json")
    assert kept.fingerprint == load_checkpoint(LAST)["TextDataModule"]["tokenizer"]

    # Its own text, from which the same tokenizer would be made, and another one, from which another would.
    bits = {}
    for text in ("text.txt", "other.txt"):
        capsys.readouterr()
        assert main(["validate", "toy", "--ckpt_path", str(RUN), "--data.path", text]) == 0
        bits[text] = capsys.readouterr().out
    assert "bits_per_byte" in bits["other.txt"]

    # Without the run's tokenizer the corpus makes its own: right for its text, and refused for another one.
    (RUN / "tokenizer.json").unlink()
    assert main(["validate", "toy", "--ckpt_path", str(RUN)]) == 0
    assert capsys.readouterr().out == bits["text.txt"]
    assert "data.tokenizer: not the one" in refused(
        capsys, "validate", "toy", "--ckpt_path", str(RUN), "--data.path", "other.txt"
    )


def test_bits_per_byte_of_another_text_are_the_models_own(trained, capsys):
    """By transformers' loss on the run's own tokens, document by document as they are packed."""
    from transformers import LlamaForCausalLM

    from tenfold.core.lm import llama_config

    config = llama_config(vocab_size=300, layers=1, dim=16, heads=2, ffn=24, max_length=32)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({k.removeprefix("lm."): v for k, v in load_checkpoint(LAST)["state_dict"].items()})
    tokenizer = load_tokenizer(RUN / "tokenizer.json")
    stream = [0]
    for document in Corpus("other.txt", val_fraction=0.1).documents("val"):
        stream += [*tokenizer.encode(document), 0]
    rows = torch.tensor(stream[: (len(stream) - 1) // 16 * 16 + 1])
    windows = torch.stack([rows[i : i + 17] for i in range(0, len(rows) - 1, 16)])
    with torch.no_grad():
        logp = model(windows[:, :-1]).logits.double().log_softmax(-1).gather(-1, windows[:, 1:, None])
    size = sum(len(tokenizer.decode([t]).encode()) for t in rows[1:] if t != 0 and t >= 257)
    size += sum(1 for t in rows[1:] if 0 < t < 257)
    expected = -logp.sum().item() / size / torch.log(torch.tensor(2.0)).item()

    capsys.readouterr()
    assert main(["validate", "toy", "--ckpt_path", str(RUN), "--data.path", "other.txt"]) == 0
    out = capsys.readouterr().out
    assert f"{expected:.3f}"[:5] in out, (expected, out)


def test_another_text_under_a_checkpoint_is_refused_in_training(trained, capsys):
    more = ("--trainer.max_steps", "30")
    err = refused(capsys, "fit", "toy", "--resume", str(RUN), "--data.path", "other.txt", *more)
    assert "data.path: not the text" in err
    assert "--model.init_from" in err
    (Path("copy.txt")).write_text(TEXT)  # the same text elsewhere is the same text
    assert main(["fit", "toy", "--resume", str(RUN), "--data.path", "copy.txt", *more]) == 0
    assert load_checkpoint(LAST)["global_step"] == 30


def test_another_tokenizer_under_a_checkpoint_is_refused(trained, capsys):
    other = "other.json"
    train_tokenizer(Corpus("other.txt"), 300).save(Path(other))
    for line in (["fit", "toy", "--resume", str(RUN)], ["validate", "toy", "--ckpt_path", str(LAST)]):
        assert "data.tokenizer: not the one" in refused(capsys, *line, "--data.tokenizer", other)


def test_the_record_says_what_ran():
    fit("--model.lr", "0.02")
    assert main(["fit", "toy", "--resume", str(RUN), "--trainer.max_steps", "25"]) == 0
    record = json.loads((RUN / "run.json").read_text())
    assert record["method"] == "toy"
    assert [start["step"] for start in record["starts"]] == [0, 20]
    assert record["starts"][0]["arguments"] == ["--config", "lm", "--model.lr", "0.02"]
    assert record["starts"][0]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"date", "commit", "device", "processor"} <= record["starts"][1].keys()
    assert yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["max_steps"] == 25


def rates(run=RUN):
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["lr-AdamW/pg1"]) for row in csv.DictReader(file) if row["lr-AdamW/pg1"]}


def expected_rate(step, lr, total, warmup=2, floor=0.1):
    """The formula of `warmup_cosine`."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    return lr * (floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)


def test_another_learning_rate_takes_effect_on_resume(capsys):
    fit("--trainer.log_every_n_steps", "1")
    more = ["--trainer.max_steps", "30", "--model.lr", "0.05", "--model.weight_decay", "0.7"]
    assert main(["fit", "toy", "--resume", str(RUN), *more]) == 0
    found = rates()
    assert found.keys() == set(range(30))
    for step, rate in found.items():
        lr, total = (0.01, 20) if step < 20 else (0.05, 30)
        assert rate == pytest.approx(expected_rate(step, lr, total)), step
    kept = load_checkpoint(LAST)
    groups = kept["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
    assert yaml.safe_load((RUN / "config.yaml").read_text())["model"]["init_args"]["lr"] == 0.05
    assert kept["hyper_parameters"]["lr"] == 0.05


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--model.layers", "6"], "model.layers: 6, the run has 1"),
        (["--model.init_std", "0.1"], "model.init_std: 0.1, the run has 0.02"),
        (["--data.batch_size", "4"], "batch_size: 4 rows a batch, batch_size × devices, the run has 8"),
        (["--data.val_fraction", "0.2"], "data.val_fraction: 0.2, the run has 0.1"),
        (["--seed_everything", "4"], "seed_everything: 4, the run has 0"),
        (["--trainer.precision", "no"], "trainer.precision"),
    ],
)
def test_a_refused_resume_changes_nothing(trained, capsys, option, words):
    err = refused(capsys, "fit", "toy", "--resume", str(RUN), "--trainer.max_steps", "30", *option)
    assert words in err
    # And the same under the checkpoint's name alone, for a run of its own.
    assert words in refused(capsys, "fit", "toy", "--config", "lm", "--ckpt_path", str(LAST), *option)


def test_a_checkpoint_without_its_run_knows_its_model(trained, capsys):
    Path("alone").mkdir()
    shutil.copy(LAST, "alone/last.ckpt")
    begin = ["fit", "toy", "--config", "lm", "--trainer.max_steps", "24", "--ckpt_path", "alone/last.ckpt"]
    assert "model.heads: 4, the run has 2" in refused(capsys, *begin, "--model.heads", "4")  # of the same shapes
    assert main([*begin, "--model.lr", "0.02"]) == 0


def test_a_checkpoint_of_other_sizes_is_refused_by_its_options(trained, capsys):
    err = refused(capsys, "validate", "toy", "--ckpt_path", str(RUN), "--model.dim", "32")
    assert "model.dim: 32, the run has 16" in err


def test_begin_with_the_weights_of_a_folder_on_other_text(trained, capsys):
    assert main(["export", str(RUN), "begin"]) == 0
    assert main(["fit", "toy", "--config", "lm", "--model.init_from", "begin", "--data.path", "other.txt"]) == 0
    run = Path("runs/toy/lm-2")
    assert load_tokenizer(run / "tokenizer.json").fingerprint == load_tokenizer("begin").fingerprint

    # With a learning rate of 0 the weights stay what they were.
    still = ["--model.init_from", "begin", "--model.lr", "0", "--model.weight_decay", "0"]
    fit(*still)
    before, after = (load_checkpoint(path)["state_dict"] for path in (LAST, "runs/toy/lm-3/checkpoints/last.ckpt"))
    torch.testing.assert_close(after, before, rtol=0, atol=0)

    shutil.rmtree("begin")  # which the run does not need any more
    assert main(["fit", "toy", "--resume", str(run), "--trainer.max_steps", "24"]) == 0
    assert main(["generate", str(run), "--max_new_tokens", "3"]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--model.init_from", "nowhere"], "init_from: there is no folder nowhere"),
        (["--model.ffn", "32"], "gate_proj.weight is (24, 16), the model's (32, 16)"),
        (["--model.heads", "4"], "num_attention_heads is 2, the model's 4"),
        (["--model.layers", "2"], "model.layers.1.self_attn.q_proj.weight is missing"),
        (["--model.tie_embeddings", "true"], "tie_word_embeddings is False, the model's True"),
        (["--data.tokenizer", "other.json"], "data.tokenizer: not that of init_from"),
    ],
)
def test_a_folder_of_another_model_is_refused(exported, capsys, change, words):
    train_tokenizer(Corpus("other.txt"), 300).save(Path("other.json"))
    assert words in refused(capsys, "fit", "toy", "--config", "lm", "--model.init_from", "begin", *change)


def test_predict_writes_the_log_probability_of_each_token(trained, capsys):
    """By transformers' own logits over the same windows of 16, the last one short."""
    text = "Zwölf Boxkämpfer.\n\n9 times 9 is 81. 🙂\n\nThe end"
    Path("mine.txt").write_text(text)
    assert main(["predict", "toy", "--ckpt_path", str(RUN), "--data.path", "mine.txt"]) == 0
    assert capsys.readouterr().out.endswith(f"predictions: {RUN}/predictions.jsonl\n")
    documents = [json.loads(line) for line in (RUN / "predictions.jsonl").read_text().splitlines()]

    run = open_run(RUN)
    assert [run.tokenizer.decode(d["tokens"][:-1]) for d in documents] == text.split("\n\n")
    assert all(d["tokens"][-1] == 0 and d["pieces"][-1] == "<|endoftext|>" for d in documents)
    stream = torch.tensor([0, *(token for d in documents for token in d["tokens"])])
    assert (len(stream) - 1) % 16
    expected = []
    for start in range(0, len(stream) - 1, 16):
        window = stream[start : start + 17]
        with torch.no_grad():
            logp = run.module.lm(window[None, :-1]).logits[0].double().log_softmax(-1)
        expected += logp.gather(-1, window[1:, None])[:, 0].tolist()
    found = [value for d in documents for value in d["logprobs"]]
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_finished_run_says_so(trained, capsys):
    before = (RUN / "run.json").read_text()
    assert main(["fit", "toy", "--resume", str(RUN)]) == 0
    assert "step 20: finished already, by trainer.max_steps 20" in capsys.readouterr().out
    assert (RUN / "run.json").read_text() == before
