"""The tokenizer: lossless, counted in bytes, the same every time."""

import subprocess
import sys

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from tenfold.core.data import tokenizer as tokenizer_module
from tenfold.core.data.corpus import Corpus
from tenfold.core.data.text import TextDataModule
from tenfold.core.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEXT = "\n\n".join(f"The {n}th document — naïve, in façade № {n % 9}." for n in range(200))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return Corpus(tmp_path / "text.txt", val_fraction=0.2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENFOLD_CACHE", str(folder / "cache"))
        return train_tokenizer(Corpus(folder / "text.txt"), 320)


@given(st.text())
@example("a text that quotes <|endoftext|> inside")
@example("  leading, trailing \t and\r\n odd\x00 spaces \n\n")
@example("e\u0301 stays decomposed, 👩‍👩‍👧 stays joined")
def test_any_string_comes_back_with_its_bytes_counted(trained, string):
    tokens = trained.encode(string)
    assert trained.decode(tokens) == string
    assert trained.separator not in tokens
    assert trained.bytes_per_token()[tokens].sum() == len(string.encode())


def test_vocabulary_is_separator_bytes_and_merges(trained):
    lengths = trained.bytes_per_token()
    assert trained.separator == 0
    assert len(lengths) == trained.vocab_size == 320
    assert lengths[0] == 0
    assert (lengths[1:257] == 1).all()
    assert (lengths[257:] > 1).all()
    assert trained.decode([0]) == "<|endoftext|>"


def test_training_is_the_same_in_every_process(corpus, tmp_path):
    code = (
        "import sys; from tenfold.core.data.corpus import Corpus;"
        "from tenfold.core.data.tokenizer import train_tokenizer;"
        "print(train_tokenizer(Corpus(sys.argv[1], val_fraction=0.2), 320).fingerprint)"
    )
    here = train_tokenizer(corpus, 320).fingerprint
    environment = {
        "TENFOLD_CACHE": str(tmp_path / "elsewhere"),
        "PYTHONHASHSEED": "7",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-c", code, str(tmp_path / "text.txt")]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert here == there


def test_validation_text_has_no_say(tmp_path, corpus):
    train = list(corpus.documents("train"))
    (tmp_path / "train.txt").write_text("\n\n".join(train), encoding="utf-8")
    assert list(corpus.documents("val"))
    alone = train_tokenizer(Corpus(tmp_path / "train.txt", val_fraction=0.2), 320)
    assert alone.fingerprint == train_tokenizer(corpus, 320).fingerprint


def test_it_is_trained_once_and_again_when_damaged(corpus, cache, monkeypatch, caplog):
    first = train_tokenizer(corpus, 300).fingerprint
    (file,) = (cache / "tokenizers").iterdir()
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module.trainers, "BpeTrainer", lambda **_: pytest.fail("trained again"))
        assert train_tokenizer(corpus, 300).fingerprint == first
    for damaged in (b"", whole[: len(whole) // 2], b"{}"):
        file.write_bytes(damaged)
        assert train_tokenizer(corpus, 300).fingerprint == first
        assert file.read_bytes() == whole
    assert "damaged" in caplog.text
    assert list((cache / "tokenizers").iterdir()) == [file]


def test_a_users_tokenizer_is_used(tmp_path, trained):
    trained.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert load_tokenizer(tmp_path).fingerprint == trained.fingerprint
    data = TextDataModule(
        str(tmp_path / "text.txt"), length=8, vocab_size=320, tokenizer=str(tmp_path / "tokenizer.json")
    )
    data.setup()
    assert data.tokenizer.fingerprint == trained.fingerprint
    small = TextDataModule(str(tmp_path / "text.txt"), vocab_size=319, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="vocab_size: 319 is less than the tokenizer's 320 tokens"):
        small.setup()


def test_tokenizers_that_cannot_count_bytes_are_refused(tmp_path, corpus):
    with pytest.raises(FileNotFoundError, match="tokenizer: no such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is not a tokenizer.json"):
        load_tokenizer(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="byte-level"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
    without_separator = tokenizers.Tokenizer(tokenizers.models.BPE())
    without_separator.decoder = tokenizers.decoders.ByteLevel()
    with pytest.raises(ValueError, match="endoftext"):
        Tokenizer(without_separator)
    with pytest.raises(ValueError, match="vocab_size: must be at least 257"):
        train_tokenizer(corpus, 256)
