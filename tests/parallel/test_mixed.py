"""Copies and sums between dtypes: PyTorch's operations, and on a GPU a kernel that finds the same bits."""

import pytest
import torch
from torch import Tensor

from lockstep.parallel import mixed


def tensors(count: int, target: torch.dtype, source: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return two tensors of random numbers."""
    generator = torch.Generator(device).manual_seed(count)
    first, second = (torch.randn(count, device=device, generator=generator) for _ in range(2))
    return first.to(target), second.to(source)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("target", "source"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_one_is_copied_or_added(target, source, add) -> None:
    first, second = tensors(100, getattr(torch, target), getattr(torch, source), "cpu")
    wanted = (first.float() + second.float() if add else second.float()).to(first.dtype)
    mixed.put(first, second, add)
    assert torch.equal(first, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("target", "source"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("count", [mixed._LARGE, mixed._LARGE + 4099])
def test_the_kernel_finds_the_bits_of_separate_operations(count, target, source, add) -> None:
    first, second = tensors(count, getattr(torch, target), getattr(torch, source), "cuda")
    assert mixed._has_kernel(first, second)
    wanted = (first.float() + second.float() if add else second.float()).to(first.dtype)
    mixed.put(first, second, add)
    assert torch.equal(first, wanted)
