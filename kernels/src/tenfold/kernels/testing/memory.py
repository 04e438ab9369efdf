"""How much memory a call needs beyond what was there before it."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(fn: Callable[[], object], *, device: str | torch.device = "cpu") -> int:
    """The most bytes held at one time while `fn()` runs, above what was held when it began.

    On the CPU from the allocations that torch's profiler sees, on CUDA and ROCm from the caching allocator.
    What `fn` returns counts too.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"device: cannot measure memory on {device}; accepted: cpu, cuda")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    # `profiler.events()` shows only the memory that changed hands outside every op: read the trace itself.
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in changes), initial=0))
