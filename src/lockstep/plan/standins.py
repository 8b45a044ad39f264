"""Where PyTorch treats the meta device otherwise than a GPU: what keeps a plan on the GPU's path."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def like_gpu() -> Iterator[None]:
    """Within it operations on meta tensors keep and allocate what a GPU's kernels do, and fused optimizers take them.

    PyTorch has one RMSNorm kernel for GPUs and takes it apart elsewhere; it offers fused optimizers on devices that
    compute only, and has no process group that sends meta tensors from stage to stage.
    """
    with (
        patch("torch.nn.functional.rms_norm", _rms_norm),
        patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]),
        patch("torch.distributed.batch_isend_irecv", lambda exchanges: []),
    ):
        yield


class _RmsNorm(torch.autograd.Function):
    """One kernel each way; it keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(x: Tensor, size: tuple[int, ...], weight: Tensor, eps: float | None = None) -> Tensor:
    return _RmsNorm.apply(x, weight)
