"""Gradients of parameters that several processes have: adding them up, and measuring each parameter once."""

from collections.abc import Sequence

import torch

from lockstep.config.model import ModelConfig
from lockstep.models.ops import widened
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.plan import has_partial_gradient, shard_of


class Gradients:
    """Reduces the gradients of the named parameters of a model that was laid out over ``mesh``.

    Gradients come as lists in the order of ``names``.
    """

    def __init__(self, names: Sequence[str], config: ModelConfig, mesh: Mesh) -> None:
        self._mesh = mesh
        self._split = [mesh.tp.size > 1 and shard_of(name, config) is not None for name in names]
        self._partial = [mesh.tp.size > 1 and has_partial_gradient(name, mesh.sequence_parallel) for name in names]

    def reduce_(self, grads: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> None:
        """Add up, in place: partial gradients over the tensor-parallel axis, all over the data-parallel one.

        The losses behind them are divided by the counts of the whole global batch, so nothing is divided here.
        """
        partial = [grad for grad, is_partial in zip(grads, self._partial, strict=True) if is_partial]
        for axis, tensors in ((self._mesh.tp, partial), (self._mesh.dp, list(grads))):
            if axis.size > 1 and tensors:
                flat = torch.cat([t.flatten() for t in tensors])
                total = axis.sum_(flat.to(dtype) if dtype is not None else flat)
                for tensor, piece in zip(tensors, total.split([t.numel() for t in tensors]), strict=True):
                    tensor.copy_(piece.view_as(tensor))

    def norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the L2 norm over all parameters of the model, each counted once, as a scalar (at least FP32)."""
        whole = [t for t, is_split in zip(tensors, self._split, strict=True) if not is_split]
        parts = [t for t, is_split in zip(tensors, self._split, strict=True) if is_split]
        if not parts:
            return l2_norm(whole).to(widened(tensors[0]).dtype)
        squares = self._mesh.tp.sum_(l2_norm(parts).square())
        if whole:
            squares = squares + l2_norm(whole).square()
        return squares.sqrt().to(widened(tensors[0]).dtype)

    def count(self, counts: Sequence[int], device: torch.device) -> int:
        """Return the sum of a count over all parameters, each counted once."""
        whole = sum(n for n, is_split in zip(counts, self._split, strict=True) if not is_split)
        parts = sum(n for n, is_split in zip(counts, self._split, strict=True) if is_split)
        return whole + int(self._mesh.tp.sum_(torch.tensor(parts, device=device)).item())

    def anywhere(self, flag: bool, device: torch.device) -> bool:
        """Tell whether the flag is up on any process."""
        return bool(self._mesh.world.highest_(torch.tensor(int(flag), device=device)).item())


def l2_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm over all tensors as a scalar FP64 tensor.

    Row norms first, and those in FP64: one FP32 sum over millions of squares would lose digits.
    """
    rows = [torch.linalg.vector_norm(t, dim=-1, dtype=widened(t).dtype).flatten() for t in tensors]
    return torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64)
