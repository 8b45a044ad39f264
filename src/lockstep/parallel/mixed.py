"""Copies and sums between FP32 and low-precision tensors, at a GPU's bandwidth.

PyTorch's own operations on two dtypes reach about half of it, so large ones take a kernel that finds the same bits.
"""

import torch
from torch import Tensor

from lockstep.models.ops import runs_triton

_LARGE = 1 << 20  # elements from which the kernel saves more time than its launch takes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def put(target: Tensor, source: Tensor, add: bool = False) -> None:
    """Copy a tensor to another of the same shape, rounded to its dtype, or add it there."""
    if _has_kernel(target, source):
        from lockstep.parallel import mixed_kernel

        mixed_kernel.put(target, source, add)
    elif add:
        target.add_(source)
    else:
        target.copy_(source)


def _has_kernel(target: Tensor, source: Tensor) -> bool:
    mixed = target.dtype != source.dtype and {target.dtype, source.dtype} <= set(_DTYPES)
    whole = target.is_contiguous() and source.is_contiguous()
    return runs_triton(target.device) and source.is_cuda and mixed and whole and source.numel() >= _LARGE
