"""Where the Triton kernels run: on the GPU if there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, and what it runs cannot be compiled, so it gets a
process of its own: `test_interpreter.py` starts pytest on every `*_triton.py` file there, and the main
process skips them.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or INTERPRETING:
        return
    skip = pytest.mark.skip(reason="no GPU: test_interpreter.py runs this file in Triton's interpreter")
    for item in items:
        if item.path.name.endswith("_triton.py"):
            item.add_marker(skip)
