"""The Triton kernels' value tests without a GPU: a process with `TRITON_INTERPRET=1` for each op."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("test_*_triton.py"))


@pytest.mark.timeout(1200)  # a whole file, which a slow machine takes minutes for
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_kernels_are_right_in_tritons_interpreter(file):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(file)],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # tiny products
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]
