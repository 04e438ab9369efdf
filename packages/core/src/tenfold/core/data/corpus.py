"""Text as a stream of documents: the Wikipedia leads that ship with this package, or the user's own files."""

import bz2
import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TextIO

SEPARATOR = "<|endoftext|>"
WIKIPEDIA_LEADS = Path(__file__).parent / "wikipedia-leads" / "articles.jsonl.bz2"

_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_OPEN = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}


class Corpus:
    """Documents of text, split into training and validation by their own content.

    Args:
        path: a `.jsonl` file (a document per line: its string under "text", on a line below the one under
            "title" if there is one), a `.txt` file (documents separated by `<|endoftext|>` if that occurs in
            the file, else by blank lines; without either, cut into pieces of 200 to 2,000 characters at the ends of
            lines, or at spaces where lines are longer), either compressed as `.bz2`, `.gz` or `.xz`; or a
            folder of such files, searched whole, in the order of their names. None is the Wikipedia leads.
        val_fraction: the share of documents kept for validation. Whether a document is one of them depends on
            its text alone, so it stays on its side when others come or go, and copies never lie on both
            sides.

    Raises:
        FileNotFoundError: no such file or folder, or a folder without text.
        ValueError: a file of another kind, a line that is not JSON with a "text", or a fraction not between 0
            and 1.
    """

    def __init__(self, path: str | Path | None = None, *, val_fraction: float = 0.05) -> None:
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: must be between 0 and 1, got {val_fraction}")
        self.val_fraction = val_fraction
        self.files = _find(WIKIPEDIA_LEADS if path is None else Path(path))

    @cached_property
    def digest(self) -> str:
        """A hash of the files' contents and the split."""
        digest = hashlib.sha256(f"{self.val_fraction}\n".encode())
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest() + _kind(file).encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """A hash of `digest` and of the code here: equal ones give equal documents."""
        return hashlib.sha256(f"{self.digest}\n{Path(__file__).read_text(encoding='utf-8')}".encode()).hexdigest()

    def documents(self, split: str) -> Iterator[str]:
        """The documents of `split`, "train", "val" or "all", in the order of the files; empty ones are left out."""
        for file in self.files:
            for document in _read(file):
                if not document.strip():
                    continue
                if split == "all" or (_position(document) < self.val_fraction) == (split == "val"):
                    yield document


def _position(document: str) -> float:
    """A number in [0, 1), spread evenly over documents, that is a function of the text."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:6], "big") / 2**48


def _kind(file: Path) -> str:
    """The name's ending that says what is inside: ".jsonl" or ".txt", also below a compression's; else ""."""
    inner = Path(file.stem) if file.suffix in _OPEN else file
    return inner.suffix if inner.suffix in (".jsonl", ".txt") else ""


def _find(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
        if not files:
            raise FileNotFoundError(f"path: no .txt or .jsonl file in {path}")
        return files
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file or folder: {path}")
    if not _kind(path):
        raise ValueError(f"path: expected .txt or .jsonl, or one of them as .bz2, .gz or .xz, got {path.name}")
    return [path]


def _read(file: Path) -> Iterator[str]:
    opener = _OPEN.get(file.suffix, open)
    read = _read_jsonl if _kind(file) == ".jsonl" else _read_txt
    try:
        with opener(file, "rt", encoding="utf-8-sig") as stream:
            yield from read(stream)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"path: {file} cannot be read: {error}") from error


def _read_jsonl(stream: TextIO) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            title, text = entry.get("title"), entry["text"]
            document = f"{title}\n{text}" if isinstance(title, str) else text
            document.encode()  # JSON can spell surrogates, which no text file can hold
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f'line {number}: expected JSON with a string under "text"') from None
        yield document


def _read_txt(stream: TextIO) -> Iterator[str]:
    text = stream.read()
    if SEPARATOR in text:
        documents = text.split(SEPARATOR)
    elif len(parts := _BLANK_LINE.split(text.strip("\n"))) > 1:
        documents = parts
    else:
        documents = _pieces(text.strip("\n"))
    for document in documents:
        yield document.strip("\n")


def _pieces(text: str) -> Iterator[str]:
    """About 200 pieces, so that some of them can validate, but neither tiny nor longer than a few paragraphs."""
    size, start = min(2000, max(200, len(text) // 200)), 0
    while len(text) - start > size:
        end = text.find("\n", start + size, start + 2 * size)
        end = text.find(" ", start + size) if end < 0 else end
        if end < 0:
            break
        yield text[start:end]
        start = end + 1
    yield text[start:]
