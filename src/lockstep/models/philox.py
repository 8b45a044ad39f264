"""PyTorch's CUDA normal generator, reproduced on the CPU.

A GPU draws normals with Philox4x32-10: every GPU thread owns one counter subsequence and walks the tensor in a
grid-sized stride, four numbers a step. The stream a seed gives therefore depends on the grid, which PyTorch derives
from the size of the tensor and of the GPU; the numbers of `Grid` are those of an H100 or H200.

The integers are exact. The Box-Muller step is not: a GPU takes its sine and cosine from a hardware approximation
(absolute error up to about 5e-7), so single float32 results differ in their last bits, and about one bfloat16 result
in thousands rounds to its neighbour. `docs/numerics.md` has the measured figures.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_KEY_STEP_0 = 0x9E3779B9
_KEY_STEP_1 = 0xBB67AE85
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
_ROUNDS = 10

_INVERSE = float(np.float32(2.0**-32))
_INVERSE_2PI = float(np.float32(2.0**-32 * 2 * np.pi))

_NUMBERS_PER_STEP = 4
_CHUNK_THREADS = 1 << 15  # working arrays of this many 64-bit words stay in cache


@dataclass(frozen=True)
class Grid:
    """The launch limits that decide which thread draws which element."""

    multiprocessors: int = 132
    threads_per_multiprocessor: int = 2048
    threads_per_block: int = 256

    def threads(self, numel: int) -> int:
        """Return how many threads PyTorch launches to fill `numel` elements."""
        blocks_needed = -(-numel // self.threads_per_block)
        blocks_resident = self.multiprocessors * (self.threads_per_multiprocessor // self.threads_per_block)
        return self.threads_per_block * min(blocks_needed, blocks_resident)


class CudaNormalGenerator:
    """The state of a CUDA generator after `manual_seed(seed)`; each draw advances it as the GPU's would."""

    def __init__(self, seed: int, grid: Grid | None = None):
        self.seed = seed
        self.grid = grid or Grid()
        self.offset = 0  # 32-bit numbers each thread has consumed, the unit of torch.cuda's philox offset

    def normal(self, shape: torch.Size | tuple[int, ...], std: float, dtype: torch.dtype) -> Tensor:
        """Draw N(0, std) in float32 and return it rounded to `dtype`, on the CPU, in the given shape."""
        numel = int(np.prod(shape))
        threads = self.grid.threads(numel)
        steps = -(-numel // (threads * _NUMBERS_PER_STEP))
        values = torch.empty(steps, _NUMBERS_PER_STEP, threads)
        radius, angle = np.empty((2, threads), dtype=np.float32), np.empty((2, threads), dtype=np.float32)
        for step in range(steps):
            for start in range(0, threads, _CHUNK_THREADS):
                span = slice(start, min(start + _CHUNK_THREADS, threads))
                words = philox_words(self.seed, self.offset // _NUMBERS_PER_STEP + step, span.start, span.stop)
                radius[0, span], radius[1, span] = words[0], words[2]
                angle[0, span], angle[1, span] = words[1], words[3]
            values[step, 0::2], values[step, 1::2] = _box_muller(torch.from_numpy(radius), torch.from_numpy(angle))
        self.offset += steps * _NUMBERS_PER_STEP
        return values.view(-1)[:numel].mul_(std).view(shape).to(dtype)


def philox_words(
    seed: int, counter: int, first: int, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return Philox4x32-10 of one 64-bit counter for the subsequences `first` to `end`, as four uint64 arrays.

    Every array has `end - first` entries below 2**32.
    """
    subsequence = np.arange(first, end, dtype=np.uint64)
    c0 = np.full_like(subsequence, counter & 0xFFFFFFFF)
    c1 = np.full_like(subsequence, counter >> 32)
    c2 = subsequence & _LOW_32
    c3 = subsequence >> _SHIFT_32
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIER_0
        product1 = c2 * _MULTIPLIER_1
        c0 = (product1 >> _SHIFT_32) ^ c1 ^ np.uint64(key0)
        c1 = product1 & _LOW_32
        c2 = (product0 >> _SHIFT_32) ^ c3 ^ np.uint64(key1)
        c3 = product0 & _LOW_32
        key0 = (key0 + _KEY_STEP_0) & 0xFFFFFFFF
        key1 = (key1 + _KEY_STEP_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Turn two tensors of 32-bit integers, as float32, into two of standard normals, rounding where the GPU rounds.

    Each float32 step is evaluated in float64 and rounded once, which is what a fused multiply-add and a correctly
    rounded function give.
    """
    u = x.double().mul_(_INVERSE).add_(_INVERSE / 2).float()
    v = y.double().mul_(_INVERSE_2PI).add_(_INVERSE_2PI / 2).float()
    radius = u.double().log_().float().mul_(-2.0).sqrt_()
    angle = v.double()
    return angle.sin().float().mul_(radius), angle.cos_().float().mul_(radius)
