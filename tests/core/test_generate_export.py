"""From a run to a sentence, and to a folder that loads in a process that knows nothing of the run."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tenfold.core import methods
from tenfold.core.cli import main
from tenfold.core.data.tokenizer import load_tokenizer
from tenfold.core.trained import open_run

TOY = Path(__file__).parent / "toy"
TEXT = "\n\n".join(f"The {n}th document says that {n} times {n} is {n * n}." for n in range(300))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the toy method's language model."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOY)
        patch.chdir(folder)
        patch.setenv("TENFOLD_CACHE", str(folder / "cache"))
        Path("text.txt").write_text(TEXT)
        assert main(["fit", "toy", "--config", "lm"]) == 0
    return folder / "runs" / "toy" / "lm"


def said(capsys, *arguments):
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_greedy_text_is_the_most_likely_token_each_time(trained, capsys):
    text = said(capsys, "generate", str(trained), "--prompt", "The 3", "--temperature", "0", "--max_new_tokens", "8")
    run = open_run(trained)
    tokens = [0, *run.tokenizer.encode("The 3")]
    for _ in range(8):
        with torch.no_grad():
            logits = run.module.lm(torch.tensor([tokens])).logits[0, -1, : run.tokenizer.vocab_size]
        tokens.append(logits.argmax().item())
    assert text.rstrip("\n") == run.tokenizer.decode(tokens[1:])


def test_sampling_follows_the_seed(trained, capsys):
    texts = [said(capsys, "generate", str(trained), "--seed", seed, "--top_k", "0") for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "temperature: -1.0"),
        (["--top_p", "0"], "top_p: 0"),
        (["--max_new_tokens", "99"], "max_new_tokens: the model's longest text is 32 tokens, the prompt has 1"),
        (["--prompt", "7 " * 40], "prompt: the model's longest text is 32 tokens"),
        (["--promt", "x"], "did you mean 'prompt'?"),
    ],
)
def test_generate_refuses(trained, capsys, arguments, words):
    assert main(["generate", str(trained), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_what_is_no_run_or_no_language_model_is_refused(tmp_path, capsys):
    assert main(["generate", "nowhere", "--prompt", "x"]) == 2
    assert "run: nowhere holds no run" in capsys.readouterr().err
    assert main(["fit", "toy", "--config", "tiny"]) == 0
    for command in (["generate", "runs/toy/tiny"], ["export", "runs/toy/tiny", "out"]):
        assert main(command) == 2
        assert "Toy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def code_of(folder):
    """The Python of the model card."""
    return "\n\n".join(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))


def fresh_process(folder, code):
    """Run `code` in another process, in `folder`, without the tests' own packages on the path."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_export_loads_in_a_fresh_process(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert str(out) in said(capsys, "export", str(trained), str(out))
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names <= {file.name for file in out.iterdir()}
    card = (out / "README.md").read_text()
    for fact in ("| updates | 20 |", "path: text.txt", "val/bits_per_byte", "| torch | 2", "lr: 0.01"):
        assert fact in card
    assert str(tmp_path) not in card

    run = open_run(trained)
    ids = run.tokenizer.encode("The 17th document")
    with torch.no_grad():
        expected = run.module.lm(torch.tensor([[0, *ids]])).logits
    torch.save(expected, tmp_path / "expected.pt")
    check = f"""
import torch
ids = tokenizer("The 17th document", return_tensors="pt").input_ids
assert ids.tolist() == [{[0, *ids]}], ids
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, torch.load({str(tmp_path / "expected.pt")!r}))
assert model.generation_config.eos_token_id == 0 == tokenizer.eos_token_id
"""
    assert fresh_process(out, code_of(out) + check).startswith("The")  # as the card's own lines print


def test_a_separator_other_than_token_0_ends_a_text(trained, tmp_path, capsys):
    """A tokenizer from elsewhere has `<|endoftext|>` somewhere; what is exported says where."""
    import json

    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    other = next(token for token, number in vocab.items() if number == 7)
    vocab["<|endoftext|>"], vocab[other] = 7, 0
    content["added_tokens"][0]["id"] = 7
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(copy / "tokenizer.json").separator == 7
    said(capsys, "export", str(copy), str(tmp_path / "out"))
    for file in ("config.json", "generation_config.json"):
        saved = json.loads((tmp_path / "out" / file).read_text())
        assert (saved["bos_token_id"], saved["eos_token_id"]) == (7, 7)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("x").input_ids[0] == 7


def test_export_does_not_write_over_anything(trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert main(["export", str(trained), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_methods_own_export_is_used(trained, tmp_path, capsys, monkeypatch):
    def export(module, folder):
        torch.save(dict(module.net.state_dict()), folder / "net.pt")
        return "import torch\n\nmodel = torch.load(f'{folder}/net.pt')"

    assert main(["fit", "toy", "--config", "tiny"]) == 0
    monkeypatch.setattr("toy_method.METHOD", replace(methods.load("toy"), export=export))
    said(capsys, "export", "runs/toy/tiny", str(tmp_path / "out"))
    assert "4, 16" not in code_of(tmp_path / "out")
    shapes = fresh_process(tmp_path / "out", code_of(tmp_path / "out") + "\nprint([*model['0.weight'].shape])")
    assert shapes == "[16, 4]\n"


def test_weights_on_disk_are_those_of_the_run(trained, tmp_path, capsys):
    said(capsys, "export", str(trained), str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in open_run(trained).module.lm.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=0)
