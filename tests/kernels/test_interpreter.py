"""The Triton kernels' value tests without a GPU: one process for all of them, with `TRITON_INTERPRET=1`."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_kernels_are_right_in_tritons_interpreter():
    files = sorted(map(str, Path(__file__).parent.glob("test_*_triton.py")))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # tiny products
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]
