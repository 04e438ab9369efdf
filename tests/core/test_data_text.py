"""Text: documents, their split, and the windows that cover them."""

import json
import lzma

import numpy as np
import pytest
import torch

from tenfold.core.data import text
from tenfold.core.data.corpus import Corpus
from tenfold.core.data.text import Padded, TextDataModule, Windows, token_stream
from tenfold.core.data.tokenizer import train_tokenizer

DOCUMENTS = [f"Document {n}: naïve café № {n * n}, {'word ' * (n % 7)}Ende." for n in range(300)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "documents.txt"
    path.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    return path


def module(path, **arguments):
    data = TextDataModule(
        str(path), **{"length": 16, "batch_size": 4, "vocab_size": 300, "val_fraction": 0.2} | arguments
    )
    data.prepare_data()
    data.setup()
    return data


def documents(path, **arguments):
    corpus = Corpus(path, **arguments)
    return [*corpus.documents("train"), *corpus.documents("val")]


def test_kinds_of_files_give_the_same_documents(tmp_path, path):
    lines = "".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS)
    (tmp_path / "a.jsonl").write_text(lines)
    with lzma.open(tmp_path / "b.jsonl.xz", "wt", encoding="utf-8") as stream:
        stream.write(lines)
    (tmp_path / "c.txt").write_text("<|endoftext|>".join(DOCUMENTS), encoding="utf-8-sig", newline="\r\n")
    expected = documents(path)
    assert sorted(expected) == sorted(DOCUMENTS)
    for name in ("a.jsonl", "b.jsonl.xz", "c.txt"):
        assert documents(tmp_path / name) == expected


def test_a_separator_keeps_paragraphs_together(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\nstill one\n<|endoftext|>\ntwo<|endoftext|>\n")
    assert sorted(documents(tmp_path / "a.txt")) == ["one\n\nstill one", "two"]


def test_a_folder_is_searched_in_order_and_titles_come_first(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.txt").write_text("two")
    (tmp_path / "a.jsonl").write_text('{"title": "One", "text": "one"}\n\n{"title": null, "text": "1"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    corpus = Corpus(tmp_path, val_fraction=1e-9)
    assert list(corpus.documents("train")) == ["One\none", "1", "two"]


def test_a_text_without_blank_lines_is_cut_into_pieces(tmp_path):
    lines = "\n".join(f"Line {n} of a log, which has no blank lines at all." for n in range(2000))
    words = " ".join(f"word{n}" for n in range(20_000))
    for name, content in (("lines", lines), ("words", words)):
        file = tmp_path / f"{name}.txt"
        file.write_text(content)
        pieces = list(Corpus(file).documents("all"))
        assert 50 <= len(pieces) <= 200
        assert max(map(len, pieces)) <= 2 * 2000
        assert ("\n" if name == "lines" else " ").join(pieces) == content
        assert all(list(Corpus(file).documents(split)) for split in ("train", "val"))
    file.write_text("oneline" * 1000)  # nowhere to cut
    assert list(Corpus(file).documents("all")) == ["oneline" * 1000]
    file.write_text("a\n  \nb\n\n\nc")
    assert list(Corpus(file).documents("all")) == ["a", "b", "c"]


@pytest.mark.parametrize("content", ["", "\n\n \n"])
def test_an_empty_file_is_called_empty(tmp_path, content):
    (tmp_path / "mine.txt").write_text(content)
    with pytest.raises(ValueError, match=r"path: .*mine\.txt is empty"):
        module(tmp_path / "mine.txt")


def test_split_follows_the_documents_own_text(tmp_path, path):
    val = set(Corpus(path, val_fraction=0.2).documents("val"))
    train = set(Corpus(path, val_fraction=0.2).documents("train"))
    assert not val & train
    assert val | train == set(DOCUMENTS)
    assert 30 <= len(val) <= 90  # 60 expected, standard deviation 7

    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(["Another one.", *DOCUMENTS[:150][::-1]]), encoding="utf-8")
    assert set(Corpus(other, val_fraction=0.2).documents("val")) & set(DOCUMENTS) == val & set(DOCUMENTS[:150])
    assert set(Corpus(path, val_fraction=0.1).documents("val")) < val


def test_fingerprint_follows_content_and_split(tmp_path, path):
    first = Corpus(path).fingerprint()
    copy = tmp_path / "copy.txt"
    copy.write_bytes(path.read_bytes())
    assert Corpus(copy).fingerprint() == first
    assert Corpus(path, val_fraction=0.1).fingerprint() != first
    copy.write_bytes(path.read_bytes() + b"!")
    assert Corpus(copy).fingerprint() != first


def test_windows_predict_each_token_once_and_bytes_are_the_texts(path):
    data = module(path, vocab_size=400)
    for split, windows in (("train", data.train), ("val", data.val)):
        texts = list(data.corpus.documents(split))
        stream = torch.from_numpy(windows.stream.astype(np.int64))
        assert data.tokenizer.decode(stream) == "".join(f"<|endoftext|>{t}" for t in texts) + "<|endoftext|>"

        targets = torch.cat([row["tokens"][1:] for row in windows])
        inputs = torch.cat([row["tokens"][:-1] for row in windows])
        assert torch.equal(targets, stream[1 : len(targets) + 1])
        assert torch.equal(inputs, stream[: len(targets)])
        assert 0 <= len(stream) - 1 - len(targets) < data.length

        lengths = data.tokenizer.bytes_per_token()
        assert sum(row["bytes"] for row in windows) == lengths[targets].sum()
        assert lengths[stream].sum() == sum(len(t.encode()) for t in texts)


def test_training_order_follows_seed_and_epoch(path):
    def epochs(seed):
        data = module(path, seed=seed)
        loader = data.train_dataloader()
        return [torch.cat([batch["tokens"] for batch in loader]) for _ in range(2)]

    first, second = epochs(0)
    assert all(torch.equal(a, b) for a, b in zip(epochs(0), (first, second), strict=True))
    assert not torch.equal(first, second)
    assert not torch.equal(first, epochs(1)[0])
    rows = module(path).train
    everything = sorted(tuple(row["tokens"].tolist()) for row in rows)
    for epoch in (first, second):
        seen = sorted(map(tuple, epoch.tolist()))
        assert len(everything) - 4 < len(seen) <= len(everything)
        assert set(seen) <= set(everything)


def test_validation_is_the_same_for_every_seed(path):
    one, two = (list(module(path, seed=seed).val_dataloader()) for seed in (0, 1))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(one, two, strict=True))


def test_padding_makes_shares_equal_without_repeating():
    windows = Windows(np.arange(1, 23, dtype=np.uint16), length=4, bytes_per_token=torch.ones(30, dtype=torch.int64))
    padded = Padded(windows, multiple=3, separator=0)
    assert len(windows) == 5
    assert [row["bytes"].item() for row in padded] == [4, 4, 4, 4, 4, 0]
    assert padded[5]["tokens"].tolist() == [0] * 5
    assert len(Padded(windows, multiple=5, separator=0)) == 5


def test_tokens_are_computed_once_and_again_when_damaged(path, cache, monkeypatch, caplog):
    expected = np.array(module(path).train.stream)
    monkeypatch.setattr(text, "_parts", lambda *_: pytest.fail("tokenised again"))
    assert np.array_equal(module(path).train.stream, expected)
    monkeypatch.undo()
    monkeypatch.setenv("TENFOLD_CACHE", str(cache))

    (file,) = (cache / "tokens").glob("*-train.npy")
    for damaged in (b"", file.read_bytes()[:-10], b"not numpy"):
        file.write_bytes(damaged)
        assert np.array_equal(module(path).train.stream, expected)
    assert "damaged" in caplog.text
    assert not [f for f in cache.rglob("*") if f.name.startswith(".")]


def test_a_write_that_fails_leaves_nothing(path, cache, monkeypatch):
    monkeypatch.setattr(np, "save", lambda file, array: file.write(b"half") and 1 / 0)
    corpus = Corpus(path)
    with pytest.raises(ZeroDivisionError):
        token_stream(corpus, train_tokenizer(corpus, 300), "train")
    assert list((cache / "tokens").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.txt", None, FileNotFoundError, "path: no such file or folder"),
        ("a.pdf", b"%PDF", ValueError, "expected .txt or .jsonl"),
        ("a.jsonl", b'{"text": "fine"}\n{"txt": 1}\n', ValueError, 'a.jsonl.* line 2: expected .*"text"'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', ValueError, "line 1"),
        ("a.jsonl", b'{"text": "cut', ValueError, "line 1"),
        ("a.txt", b"\xff\xfe", ValueError, "a.txt cannot be read"),
        ("a.txt.xz", b"not xz", ValueError, "a.txt.xz cannot be read"),
        ("a.txt.bz2", b"not bz2", ValueError, "a.txt.bz2 cannot be read"),
        ("a.txt", b"only one document", ValueError, "fewer than a window"),
    ],
)
def test_text_that_cannot_be_used_is_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        module(tmp_path / name)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .txt or .jsonl file"):
        Corpus(tmp_path)


@pytest.mark.parametrize("arguments", [{"val_fraction": 0.0}, {"val_fraction": 1.5}, {"length": 1}, {"batch_size": 0}])
def test_arguments_out_of_range_are_named(path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TextDataModule(str(path), **arguments)
