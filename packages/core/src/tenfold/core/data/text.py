"""Text for language models: documents packed into windows of one length, with the bytes they stand for."""

import hashlib
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..files import write_whole
from ..training import ResumableDataLoader
from .cache import cache_folder
from .corpus import Corpus
from .tokenizer import Tokenizer, load_tokenizer, train_tokenizer

log = logging.getLogger(__name__)


class TextDataModule(LightningDataModule):
    """Real text in windows of `length` predicted tokens; by default the Wikipedia leads shipped here.

    A split's documents are joined into one stream, separator first, between and last, and cut into windows
    that share their last token with the next one's first: each token is predicted exactly once. What is left
    over at the end, fewer than `length` tokens, is dropped. Training reshuffles the windows each epoch;
    validation is always the same windows in the same order.

    A batch is a dict of `tokens` `(B, length + 1)` int64, inputs and targets in one, and `bytes` `(B,)`
    int64, the UTF-8 bytes of each row's targets, in which separators count 0: a loss divided by them is a
    number that models with different tokenizers share. With several devices, validation may get rows of
    separators alone, 0 bytes, that make the devices' shares equal and are to be left out.

    Tokenizer and tokens are computed once and kept in the cache folder (`TENFOLD_CACHE`). Checkpoints hold a
    fingerprint of tokenizer and text: with another tokenizer, or to train on with another text, they are refused.

    Args:
        path: a `.txt` or `.jsonl` file or a folder of them, see `Corpus`; None is the Wikipedia leads.
        length: of the windows, in predicted tokens.
        batch_size: rows per batch and device.
        vocab_size: of the tokenizer, which is trained on the training documents.
        tokenizer: a `tokenizer.json` to use instead of training one; must be byte-level and have
            `<|endoftext|>`.
        val_fraction: the share of documents that validate, chosen by their own text: the same ones for every
            seed.
        seed: of the order in training.
        num_workers: processes that load.

    Raises:
        FileNotFoundError, ValueError: text or tokenizer that is missing or of the wrong kind, fewer tokens
            than a window, or a tokenizer larger than `vocab_size`.

    Example:
        >>> data = TextDataModule(length=128, batch_size=16)
        >>> data.setup()
        >>> next(iter(data.train_dataloader()))["tokens"].shape
        torch.Size([16, 129])
    """

    # On resume: the checkpoint knows text and tokenizer by their contents, and batches by their size on all devices.
    may_change: ClassVar[tuple[str, ...]] = ("path", "tokenizer", "batch_size", "num_workers")

    def __init__(
        self,
        path: str | None = None,
        *,
        length: int = 128,
        batch_size: int = 16,
        vocab_size: int = 2048,
        tokenizer: str | None = None,
        val_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value}")
        self.corpus = Corpus(path, val_fraction=val_fraction)
        self.length = length
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.tokenizer_path = tokenizer
        self.seed = seed
        self.num_workers = num_workers

    def prepare_data(self) -> None:
        """Fill the cache, in one process per machine."""
        if self.trainer is None or self.trainer.state.fn != "predict":
            self._load()

    def setup(self, stage: str | None = None) -> None:
        """Load tokenizer and tokens: `tokenizer`, `train` and `val` are there afterwards, or `whole` to predict on."""
        if stage == "predict":
            self.tokenizer = self._tokenizer()
            stream = np.concatenate(list(_parts(self.corpus.documents("all"), self.tokenizer)))
            self.whole = Whole(stream, self.length, self.tokenizer.separator)
            return
        self.tokenizer, streams = self._load()
        lengths = self.tokenizer.bytes_per_token()
        self.train, self.val = (Windows(stream, self.length, lengths) for stream in streams)
        if max(map(len, streams)) <= 1:
            raise ValueError(f"path: {self.corpus.files[0]} is empty, there is no text in it")
        for split, windows in (("train", self.train), ("val", self.val)):
            if len(windows) == 0:
                raise ValueError(
                    f"path: the {split} split has {len(windows.stream)} tokens, fewer than a window of "
                    f"{self.length + 1}; give more documents (<|endoftext|> or a blank line ends one)"
                )

    def train_dataloader(self) -> DataLoader:
        """The training windows, in an order that `seed` and the epoch determine, resumable in mid-epoch."""
        return ResumableDataLoader(
            self.train, batch_size=self.batch_size, seed=self.seed, shuffle=True, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        """The validation windows, padded so that the devices' shares are equal and none is repeated."""
        devices = self.trainer.world_size if self.trainer else 1
        windows = Padded(self.val, devices, self.tokenizer.separator)
        return DataLoader(windows, batch_size=self.batch_size, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        """All of the text, training and validation documents in their order, in windows like those of validation."""
        return DataLoader(self.whole, batch_size=self.batch_size, num_workers=self.num_workers)

    def predictions(self, batches: list[list[Tensor]]) -> Iterator[dict[str, Any]]:
        """What `CausalLM` predicted, a document at a time, as JSON values.

        `logprobs` are natural logarithms, one for each of `tokens`; `pieces` are the tokens as text, where bytes that
        are no UTF-8 of their own are U+FFFD. The last token is the separator that ends the document.
        """
        logp = torch.cat([row for batch in batches for row in batch]).tolist()
        tokens = self.whole.stream[1:].tolist()
        start = 0
        for end, token in enumerate(tokens, 1):
            if token == self.tokenizer.separator:
                own = tokens[start:end]
                pieces = [self.tokenizer.decode([token]) for token in own]
                yield {"tokens": own, "pieces": pieces, "logprobs": logp[start:end]}
                start = end

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint remembers of the data."""
        return {"tokenizer": self.tokenizer.fingerprint, "corpus": self.corpus.digest}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Refuse a checkpoint of another tokenizer and, in training, of another text.

        Raises:
            ValueError: which of the two.
        """
        if state["tokenizer"] != self.tokenizer.fingerprint:
            raise ValueError(
                "data.tokenizer: not the one that the checkpoint was trained with, whose tokens have other meanings; "
                "it lies in the run's folder, tokenizer.json"
            )
        if state["corpus"] != self.corpus.digest and self.trainer.state.fn == "fit":
            raise ValueError(
                "data.path: not the text, or not the split, that the run was training on; to go on from its weights "
                "with other data, begin a run with --model.init_from FOLDER (tenfold export makes the folder)"
            )

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer_path is None:
            tokenizer = train_tokenizer(self.corpus, self.vocab_size)
        else:
            tokenizer = load_tokenizer(self.tokenizer_path)
        if tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"vocab_size: {self.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} tokens"
            )
        return tokenizer

    def _load(self) -> tuple[Tokenizer, list[np.ndarray]]:
        tokenizer = self._tokenizer()
        return tokenizer, [token_stream(self.corpus, tokenizer, split) for split in ("train", "val")]


class Windows(Dataset):
    """Window i of a stream of tokens: `length` inputs and the `length` targets that follow them by one."""

    def __init__(self, stream: np.ndarray, length: int, bytes_per_token: Tensor) -> None:
        self.stream = stream
        self.length = length
        self.bytes_per_token = bytes_per_token

    def __len__(self) -> int:
        return max(len(self.stream) - 1, 0) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.length
        tokens = torch.from_numpy(self.stream[start : start + self.length + 1].astype(np.int64))
        return {"tokens": tokens, "bytes": self.bytes_per_token[tokens[1:]].sum()}


class Whole(Dataset):
    """Windows over all of a stream: the last one filled up with separators, `targets` says how many are real."""

    def __init__(self, stream: np.ndarray, length: int, separator: int) -> None:
        self.stream = stream
        self.length = length
        self.separator = separator

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.length
        tokens = self.stream[start : start + self.length + 1].astype(np.int64)
        filled = np.pad(tokens, (0, self.length + 1 - len(tokens)), constant_values=self.separator)
        return {"tokens": torch.from_numpy(filled), "targets": torch.tensor(len(tokens) - 1)}


class Padded(Dataset):
    """Windows followed by as many rows of separators, 0 bytes, as make their number a multiple."""

    def __init__(self, windows: Windows, multiple: int, separator: int) -> None:
        self.windows = windows
        self.rows = -(-len(windows) // multiple) * multiple
        self.padding = {"tokens": torch.full((windows.length + 1,), separator), "bytes": torch.tensor(0)}

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if len(self.windows) <= index < self.rows:
            return self.padding
        return self.windows[index]


def token_stream(corpus: Corpus, tokenizer: Tokenizer, split: str) -> np.ndarray:
    """The documents of a split as one array of tokens, a separator before each and after the last.

    The array is a read-only map of a file in the cache; a file that is missing or damaged is made again.
    """
    name = hashlib.sha256(f"{corpus.fingerprint()} {tokenizer.fingerprint}".encode()).hexdigest()[:16]
    path = cache_folder() / "tokens" / f"{name}-{split}.npy"
    if path.exists():
        try:
            return np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            log.warning("The cached tokens %s are damaged: computing them again.", path)

    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    stream = np.concatenate([part.astype(dtype) for part in _parts(corpus.documents(split), tokenizer)])
    with write_whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, stream)
    return np.load(path, mmap_mode="r")


def _parts(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    separator = np.array([tokenizer.separator])
    yield separator
    while texts := list(islice(documents, 1000)):
        for tokens in tokenizer.encode_batch(texts):
            yield tokens
            yield separator
