"""A byte-level BPE tokenizer that is trained once, on the training documents, and kept in the cache."""

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ..files import write_whole
from .cache import cache_folder
from .corpus import SEPARATOR, Corpus

log = logging.getLogger(__name__)


class Tokenizer:
    """Byte-level BPE: any string comes back from its tokens unchanged, and a token has a length in bytes.

    Args:
        tokenizer: of the `tokenizers` library, byte-level, with the special token `<|endoftext|>`.

    Raises:
        ValueError: a tokenizer that is not byte-level or has no `<|endoftext|>`.

    Example:
        >>> tokenizer = train_tokenizer(Corpus(), vocab_size=2048)
        >>> tokenizer.decode(tokenizer.encode("Ohm's law"))
        "Ohm's law"
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        if not _is_byte_level(tokenizer):
            raise ValueError("tokenizer: expected a byte-level one (a ByteLevel decoder), as GPT-2's or Llama 3's")
        separator = tokenizer.token_to_id(SEPARATOR)
        if separator is None:
            raise ValueError(f"tokenizer: has no token {SEPARATOR}, which separates documents")
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True  # a text that quotes the separator does not end the document
        self.separator: int = separator

    @property
    def vocab_size(self) -> int:
        """The number of tokens, the separator included: one more than the largest."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def fingerprint(self) -> str:
        """A hash of all that the tokenizer does to a text; what models want around a text is not part of it."""
        content = json.loads(self.tokenizer.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`, which `load_tokenizer` and transformers read."""
        with write_whole(path) as temporary:
            self.tokenizer.save(str(temporary))

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without separators."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, on all cores."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.uint32) for one in encoded]

    def decode(self, tokens: list[int] | Tensor) -> str:
        """The text of `tokens`; separators are spelled out, bytes that are not UTF-8 become U+FFFD."""
        tokens = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def bytes_per_token(self) -> Tensor:
        """`(vocab_size,)` int64: the UTF-8 bytes that each token stands for, 0 for special tokens.

        Byte-level BPE writes every byte as one printable character, so a token's length is its number of
        bytes.
        """
        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        for text, token in self.tokenizer.get_vocab().items():
            lengths[token] = len(text)
        for token, added in self.tokenizer.get_added_tokens_decoder().items():
            lengths[token] = 0 if added.special else len(added.content.encode())
        return lengths


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """The byte-level BPE tokenizer of `corpus`'s training documents, from the cache if it was trained before.

    Token 0 is the separator; then come the 256 bytes, then the merges. A corpus too small for so many merges
    gives fewer tokens.

    Raises:
        ValueError: a vocabulary that has no room for the bytes.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size: must be at least 257 (256 bytes and the separator), got {vocab_size}")
    name = hashlib.sha256(f"{corpus.fingerprint()} {tokenizers.__version__}".encode()).hexdigest()[:16]
    path = cache_folder() / "tokenizers" / f"{name}-{vocab_size}.json"
    if path.exists():
        try:
            return load_tokenizer(path)
        except ValueError:
            log.warning("The cached tokenizer %s is damaged: training it again.", path)

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.documents("train"), trainer)
    trained = Tokenizer(tokenizer)
    trained.save(path)
    return trained


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, or in a model's folder that holds one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not a tokenizer, or one that `Tokenizer` does not take.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: no such file: {path}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer: {path} is not a tokenizer.json: {error}") from error
    return Tokenizer(tokenizer)


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    return "ByteLevel" in [part["type"] for part in decoder.get("decoders", [decoder]) if part]
