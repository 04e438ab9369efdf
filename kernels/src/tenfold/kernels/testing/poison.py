"""Scratch memory that shows when it is read before it is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def poisoned_scratch() -> Iterator[None]:
    """Inside the block, uninitialised memory from torch holds NaN, or the largest integer, or True.

    It covers `torch.empty`, `empty_like`, `empty_strided`, and the tensor methods `new_empty` and
    `new_empty_strided`; what torch's own operators allocate for themselves stays as it is.
    """
    with (
        _poisoned(torch, "empty"),
        _poisoned(torch, "empty_like"),
        _poisoned(torch, "empty_strided"),
        _poisoned(Tensor, "new_empty"),
        _poisoned(Tensor, "new_empty_strided"),
    ):
        yield


def _poisoned(owner: object, name: str):
    allocate = getattr(owner, name)

    def poison(*args, **kwargs) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            filling = torch.nan
        else:
            filling = True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
        with torch.no_grad():
            return tensor.fill_(filling)

    return mock.patch.object(owner, name, poison)
