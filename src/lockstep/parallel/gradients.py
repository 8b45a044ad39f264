"""Gradients of parameters that several processes have: adding them up, and measuring each parameter once."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch

from lockstep.config.model import ModelConfig
from lockstep.models.ops import widened
from lockstep.parallel.kinds import KINDS, kind_of
from lockstep.parallel.mesh import Axis, Mesh
from lockstep.parallel.plan import WORD_EMBEDDINGS, has_partial_gradient, is_expert, shard_of

T = TypeVar("T")

_ROW = 1 << 14


class Gradients:
    """Adds up and measures gradients of the named parameters of a model that was laid out over ``mesh``.

    Where the optimizer's weights are cut into parts over the processes with the same weights, ``pieces`` names the
    parameters of which this process has a piece: all methods but ``add_shared`` then take tensors of these.
    """

    def __init__(
        self, names: Sequence[str], config: ModelConfig, mesh: Mesh, pieces: Sequence[str] | None = None
    ) -> None:
        self._mesh = mesh
        self._sharded = pieces is not None
        owned = names if pieces is None else pieces
        self._split = [mesh.tp.size > 1 and shard_of(name, config) is not None for name in owned]
        self._expert = [mesh.experts_apart and is_expert(name) for name in owned]
        self._partial = [_is_partial(name, config, mesh) for name in names]
        self._tied = [is_tied(name, config, mesh) for name in names]
        # The first stage counts what both ends of a pipeline have.
        self._elsewhere = [is_tied(name, config, mesh) and mesh.ends.rank > 0 for name in owned]
        self._kinds = [KINDS.index(kind_of(name)) for name in owned]

    def add_shared(self, grads: Sequence[torch.Tensor]) -> None:
        """Add up, in place, partial gradients over tensor parallel and those of tied weights over both ends.

        It comes before the sum over the processes with the same weights. The losses behind the gradients are divided by
        the counts of the whole global batch, so nothing is divided here.
        """
        _sum_(self._mesh.tp, [grad for grad, partial in zip(grads, self._partial, strict=True) if partial])
        _sum_(self._mesh.ends, [grad for grad, tied in zip(grads, self._tied, strict=True) if tied])

    def norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the L2 norm over all parameters of the model, each counted once, as a scalar (at least FP32).

        No two tensors of the sequence are held at a time.
        """
        dtype = widened(tensors[0]).dtype
        if not (self._sharded or any(self._split) or any(self._expert) or self._mesh.pp.size > 1):
            return l2_norm(tensors).to(dtype)
        zero = tensors[0].new_zeros((), dtype=torch.float64)
        squares = torch.stack(
            [
                l2_norm(tensors[i] for i in group).square() if group else zero
                for group in self._sorted(range(len(tensors)))
            ]
        )
        return self._total(squares).sqrt().to(dtype)

    def norms(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what ``norm`` does, and the L2 norms over the parameters of each of ``KINDS`` (FP64).

        The elements are read once: the norms of kinds are made of the norms of rows, as the whole one is, and cross
        the processes with it.
        """
        dtype = widened(tensors[0]).dtype
        rows = [_row_norms(tensors[i]) for i in range(len(tensors))]  # One tensor at a time is held.
        if not (self._sharded or any(self._split) or any(self._expert) or self._mesh.pp.size > 1):
            return _norm_of(rows).to(dtype), self._by_kind(list(range(len(rows))), rows).sqrt()
        nothing = tensors[0].new_zeros((), dtype=torch.float64)
        squares = []
        for group in self._sorted(range(len(rows))):
            whole = _norm_of([rows[i] for i in group]).square() if group else nothing
            squares.append(torch.cat([whole[None], self._by_kind(group, rows)]))
        totals = self._total(torch.stack(squares)).sqrt()
        return totals[0].to(dtype), totals[1:]

    def _by_kind(self, group: Sequence[int], rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of squares of each kind within a group of parameters."""
        nothing = rows[0].new_zeros((), dtype=torch.float64)
        sorted_rows: list[list[torch.Tensor]] = [[] for _ in KINDS]
        for i in group:
            sorted_rows[self._kinds[i]].append(rows[i])
        return torch.stack([_norm_of(of_kind).square() if of_kind else nothing for of_kind in sorted_rows])

    def _sorted(self, values: Sequence[T]) -> list[list[T]]:
        """Sort what there is for each parameter: of those whole on every process, and of those split.

        Where experts lie otherwise the same two groups of experts follow.
        """
        groups: list[list[T]] = [[] for _ in range(4 if self._mesh.experts_apart else 2)]
        for value, split, expert, elsewhere in zip(values, self._split, self._expert, self._elsewhere, strict=True):
            if not elsewhere:
                groups[2 * expert + split].append(value)
        return groups

    def _total(self, sums: torch.Tensor) -> torch.Tensor:
        """Add up, over all processes that have something of their own, one sum for each group of parameters."""
        if self._sharded:
            self._mesh.shards.sum_(sums)
        if len(sums) == 4:
            experts = sums[2:].clone()
            if not self._sharded:
                self._mesh.ep.sum_(experts)
            elif self._mesh.whole_experts:
                self._mesh.tp.sum_(experts)
            sums = sums[:2] + experts
        return self._mesh.pp.sum_(sums[0] + self._mesh.tp.sum_(sums[1].clone()))

    def count(self, counts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of a count, one integer scalar each, over all parameters, each counted once."""
        nothing = torch.zeros_like(counts[0])
        groups = self._sorted(counts)
        return self._total(torch.stack([torch.stack(group).sum() if group else nothing for group in groups]))

    def anywhere(self, flag: torch.Tensor) -> bool:
        """Tell whether the flag, a scalar, is up on any process; waits for the device."""
        return bool(self._mesh.world.highest_(flag.int()).item())


def is_shared(name: str, config: ModelConfig, mesh: Mesh) -> bool:
    """Tell whether ``Gradients.add_shared`` changes the gradient of a parameter."""
    return _is_partial(name, config, mesh) or is_tied(name, config, mesh)


def _is_partial(name: str, config: ModelConfig, mesh: Mesh) -> bool:
    return mesh.tp.size > 1 and has_partial_gradient(name, config, mesh.sequence_parallel)


def is_tied(name: str, config: ModelConfig, mesh: Mesh) -> bool:
    """Tell whether both ends of the pipeline have a parameter."""
    return config.share_embeddings_and_output_weights and mesh.ends.size > 1 and name == WORD_EMBEDDINGS


def _sum_(axis: Axis, tensors: Sequence[torch.Tensor]) -> None:
    if axis.size == 1 or not tensors:
        return
    total = axis.sum_(torch.cat([t.flatten() for t in tensors]))
    for tensor, piece in zip(tensors, total.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))


def l2_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm over all tensors as a scalar FP64 tensor.

    Row norms first, and those in FP64: one FP32 sum over millions of squares would lose digits.
    """
    return _norm_of([_row_norms(tensor) for tensor in tensors])


def _norm_of(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.cat(list(rows)), dtype=torch.float64)


def _row_norms(tensor: torch.Tensor) -> torch.Tensor:
    parts = _rows(tensor)
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=widened(tensor).dtype).flatten() for part in parts]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def _rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Cut a long piece of a parameter, which has one dimension, into rows and a rest."""
    if tensor.dim() != 1 or len(tensor) <= _ROW:
        return [tensor]
    even = len(tensor) // _ROW * _ROW
    return [tensor[:even].view(-1, _ROW), tensor[even:]]
