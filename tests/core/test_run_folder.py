"""A run's folder: what belongs to the run, what it says of itself, and what is refused under its checkpoint."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tenfold.core.cli import main
from tenfold.core.data.tokenizer import load_tokenizer
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


def test_the_tokenizer_belongs_to_the_run(capsys):
    fit()
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


def test_bits_per_byte_of_another_text_are_the_models_own(capsys):
    """By transformers' loss on the run's own tokens, document by document as they are packed."""
    from transformers import LlamaForCausalLM

    from tenfold.core.data.corpus import Corpus
    from tenfold.core.lm import llama_config

    fit()
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


def test_another_text_under_a_checkpoint_is_refused_in_training(capsys):
    fit()
    more = ("--trainer.max_steps", "30")
    err = refused(capsys, "fit", "toy", "--resume", str(RUN), "--data.path", "other.txt", *more)
    assert "data.path: not the text" in err
    assert "--model.init_from" in err
    (Path("copy.txt")).write_text(TEXT)  # the same text elsewhere is the same text
    assert main(["fit", "toy", "--resume", str(RUN), "--data.path", "copy.txt", *more]) == 0
    assert load_checkpoint(LAST)["global_step"] == 30


def test_another_tokenizer_under_a_checkpoint_is_refused(capsys):
    fit()
    fit("--data.path", "other.txt")
    other = "runs/toy/lm-2/tokenizer.json"
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
