"""One thread per test process: the tests' tensors are small, and two processes share the machine (pytest-xdist)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
