"""The Triton kernel of copies and sums between dtypes. Importing it needs Triton, which PyTorch's GPU builds bring."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # elements that a program holds


def put(target: Tensor, source: Tensor, add: bool) -> None:
    """Copy a tensor to another, or add it there in FP32; both are contiguous and as long."""
    count = target.numel()
    _put[(triton.cdiv(count, _BLOCK),)](target, source, count, add=add, block=_BLOCK, num_warps=8)


@triton.jit
def _put(target, source, count, add: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    found = tl.load(source + place, mask=place < count, other=0.0).to(tl.float32)
    if add:
        found += tl.load(target + place, mask=place < count, other=0.0).to(tl.float32)
    tl.store(target + place, found.to(target.dtype.element_ty), mask=place < count)
