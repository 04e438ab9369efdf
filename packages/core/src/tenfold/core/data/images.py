"""Fashion-MNIST (arXiv 1708.07747): the 10,000 images of its test set, which ship with this package."""

import lzma
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..training import ResumableDataLoader

FOLDER = Path(__file__).parent / "fashion-mnist"
CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


class FashionMNISTDataModule(LightningDataModule):
    """28×28 gray photographs of clothes in 10 classes: 10,000 of them, the last `val_images` for validation.

    A batch is a dict of `images` `(B, 1, 28, 28)` float32 from -1 (background) to 1, and `labels` `(B,)`
    int64, which `CLASSES` names. These are the data set's test images; the 60,000 training images are not
    shipped.

    Args:
        batch_size: images per batch and device.
        val_images: kept for validation, the same ones for every seed.
        seed: of the order in training.
        num_workers: processes that load.

    Raises:
        ValueError: a split that leaves nothing to train or to validate on.

    Example:
        >>> data = FashionMNISTDataModule(batch_size=64)
        >>> data.setup()
        >>> next(iter(data.val_dataloader()))["images"].shape
        torch.Size([64, 1, 28, 28])
    """

    may_change: ClassVar[tuple[str, ...]] = ("batch_size", "num_workers")  # when a run is resumed

    def __init__(self, *, batch_size: int = 64, val_images: int = 1000, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
        if not 0 < val_images < 10_000:
            raise ValueError(f"val_images: must be between 1 and 9999, got {val_images}")
        self.batch_size = batch_size
        self.val_images = val_images
        self.seed = seed
        self.num_workers = num_workers

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(CLASSES)

    def setup(self, stage: str | None = None) -> None:
        """Read the images: `train` and `val` are there afterwards."""
        images, labels = read_fashion_mnist()
        split = len(images) - self.val_images
        self.train = Images(images[:split], labels[:split])
        self.val = Images(images[split:], labels[split:])

    def train_dataloader(self) -> DataLoader:
        """The training images, in an order that `seed` and the epoch determine, resumable in mid-epoch."""
        return ResumableDataLoader(
            self.train, batch_size=self.batch_size, seed=self.seed, shuffle=True, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        """The validation images, always in the same order."""
        return DataLoader(self.val, batch_size=self.batch_size, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        """The validation images."""
        return self.val_dataloader()


class Images(Dataset):
    """Images kept as bytes, given as floats from -1 to 1."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index].float().div(127.5).sub(1), "labels": self.labels[index]}


def read_fashion_mnist() -> tuple[Tensor, Tensor]:
    """The shipped images `(10000, 1, 28, 28)` uint8 and their labels `(10000,)` int64."""
    images = _read_idx(FOLDER / "t10k-images-idx3-ubyte.xz").unsqueeze(1)
    return images, _read_idx(FOLDER / "t10k-labels-idx1-ubyte.xz").long()


def _read_idx(path: Path) -> Tensor:
    """An IDX file of bytes: 0, 0, 8 (for bytes), the number of dimensions, their sizes as int32, the data."""
    content = lzma.decompress(path.read_bytes())
    dimensions = content[3]
    sizes = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(tuple(sizes)).copy())
