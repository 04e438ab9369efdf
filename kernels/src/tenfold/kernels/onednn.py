"""Matrix products by oneDNN on the CPU.

torch's own float32 products are MKL's, which keeps to AVX2 on AMD processors and there takes about twice as long
where AVX-512 is to be had. oneDNN compiles a program for every shape it meets, about 1 ms: use it where the
shapes are few and the products large.
"""

import torch
from torch import Tensor


def available(dtype: torch.dtype) -> bool:
    """Whether `linear` can be called; `torch.backends.mkldnn` is the user's switch."""
    return (
        dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weightᵀ`. The op is the one that torch.compile puts in place of linear layers."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
