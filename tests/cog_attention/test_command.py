"""What `tenfold fit cog-attention` answers to a user's mistakes: one line, status 2, nothing left behind."""

from pathlib import Path

import pytest

from tenfold.core.cli import main

MISTAKES = {
    "tiny --data.vocab_size 2048": "data.vocab_size: 2048 is more than the model's vocab_size, 1024",
    "tiny --data.length 4096": "data.length: 4096 is more than the model's max_length, 128",
    "tiny --model.heads 0": "heads: must be at least 1, got 0",
    "tiny --model.heads 3": "heads: 3 do not divide dim 64",
    "tiny --model.kv_heads 3": "kv_heads: 3 do not divide heads 2",
    "tiny --model.layers 0": "layers: must be at least 1, got 0",
    "tiny --model.softmax_layers [9]": "layers: the model has 4 attention layers, there is no layer 9",
    "tiny --model.lr -1": "lr: must be at least 0, got -1",
    "tiny --model.min_lr_ratio 3": "min_lr_ratio: must be from 0 to 1, got 3",
    "tiny --data.path no-such.txt": "no-such.txt",
    "uvic-tiny --model.image_size 32": "images: (64, 1, 28, 28) make 50 tokens, but the model has positions for 65",
    "uvic-tiny --model.classes 3": "model.classes: 3 are fewer than the data's 10",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes(line, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "cog-attention", "--config", *line.split()]) == 2
    captured = capsys.readouterr()
    # torchao, where it is installed, logs under torch 2.15 when it is first imported, which may be here.
    said = [text for text in captured.err.splitlines() if "torch/utils/_pytree.py" not in text]
    assert len(said) == 1
    assert said[0].startswith("tenfold: ")
    assert MISTAKES[line] in said[0]
    assert "run folder" not in captured.out
    assert not list(Path().iterdir())
