"""What takes the place of the model's own modules on a tensor-parallel process; parameters keep their names.

Shape legend: b batch, s sequence, h hidden, v vocabulary, p part of the vocabulary on this process.
"""

import dataclasses

import torch
from torch import Tensor, nn

from lockstep.models.cross_entropy import linear_cross_entropy
from lockstep.models.layers import Linear, Table
from lockstep.models.moe import Compiler, Dispatcher, Rows
from lockstep.models.ops import embedding, linear
from lockstep.models.router import Assignment
from lockstep.parallel.adapters import ColumnPart, RowPart, split_adapter, whole_input
from lockstep.parallel.exchange import added, added_and_split, copied, part, whole
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.plan import ROWS, Shard


class ColumnParallelLinear(Linear):
    """Has some of the outputs: takes the whole input, or the parts of its sequence, and returns a part."""

    def __init__(self, inner: Linear, mesh: Mesh, shard: Shard = ROWS):
        nn.Module.__init__(self)
        self.weight, self.bias = inner.weight, inner.bias
        self.adapter = split_adapter(inner.adapter, ColumnPart(mesh, shard))
        self.mesh = mesh

    def product(self, x: Tensor) -> Tensor:
        """Return this process's outputs [b, s, o / size] without the bias."""
        return self.adapted(x, self.multiplied(whole_input(x, self.mesh)))


class RowParallelLinear(Linear):
    """Has some of the inputs: the products of all processes add up, each rounded before."""

    def __init__(self, inner: Linear, mesh: Mesh):
        nn.Module.__init__(self)
        self.weight, self.bias = inner.weight, inner.bias
        self.adapter = split_adapter(inner.adapter, RowPart(mesh))
        self.mesh = mesh

    def product(self, x: Tensor) -> Tensor:
        """Return the sum [b, s, o], or this process's part of its sequence, without the bias."""
        return _summed(self.adapted(x, self.multiplied(x)), self.mesh)


class SharedByParts(nn.Module):
    """Takes what all processes have, or the parts of its sequence, to the parts of a layer; gradients add up."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        """Return the whole x [b, s, ...]."""
        return whole_input(x, self.mesh)


class VocabParallelTable(Table):
    """Has the rows of some tokens; the others are zero here and come from another process."""

    def __init__(self, inner: Table, mesh: Mesh, first_row: int):
        nn.Module.__init__(self)
        self.weight = inner.weight
        self.mesh = mesh
        self.first_row = first_row

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [b, s, h] of ids [b, s], or this process's part of the sequence."""
        rows = ids - self.first_row
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        found = embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return _summed(found.masked_fill(elsewhere[..., None], 0.0), self.mesh)


class SequenceParallelTable(Table):
    """A whole table that looks up this process's part of the sequence only."""

    def __init__(self, inner: Table, mesh: Mesh):
        nn.Module.__init__(self)
        self.weight = inner.weight
        self.mesh = mesh

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [b, s / size, h] of ids [b, s]."""
        return embedding(ids.chunk(self.mesh.tp.size, dim=1)[self.mesh.tp.rank], self.weight)


class VocabParallelHead:
    """Logits and cross entropy where every process has a part of the vocabulary, from row ``first_row`` on."""

    def __init__(self, mesh: Mesh, vocabulary: int, first_row: int):
        self.mesh = mesh
        self.vocabulary = vocabulary
        self.first_row = first_row

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of each token [b, s], or without labels all logits [b, s, v], which have no gradient."""
        hidden = whole_input(hidden, self.mesh)
        if labels is None:
            return self._all_logits(linear(hidden.detach(), weight.detach()))
        return linear_cross_entropy(hidden, weight, labels, first_row=self.first_row, merge=self._merge)

    def _merge(self, log_sum: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Combine log-sums over parts of the vocabulary [t], and the logits of labels [t], zero but on one process."""
        axis = self.mesh.tp
        return torch.logsumexp(axis.stacked(log_sum), dim=0), axis.sum_(target)

    def _all_logits(self, logits: Tensor) -> Tensor:
        widest = -(-self.vocabulary // self.mesh.tp.size)
        padded = nn.functional.pad(logits, (0, widest - logits.shape[-1]))
        widths = [len(part) for part in torch.arange(self.vocabulary).tensor_split(self.mesh.tp.size)]
        parts = self.mesh.tp.stacked(padded)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)


class SplitExpertsDispatcher(Dispatcher):
    """Every process has a part of the inner width of each expert: all route all tokens, and their outputs add up.

    ``inner`` hands the tokens out.
    """

    def __init__(self, mesh: Mesh, inner: Dispatcher):
        super().__init__()
        self.mesh = mesh
        self.inner = inner

    def compile(self, compiled: Compiler) -> None:
        """Have what ``inner`` adds up compiled."""
        self.inner.compile(compiled)

    def seen(self, x: Tensor) -> Tensor:
        """Return all tokens [b, s, h] of the sequence of which x may be this process's part."""
        return whole(x, self.mesh.tp) if self.mesh.sequence_parallel else x

    def dispatch(self, x: Tensor, assignment: Assignment) -> Rows:
        """Sort all tokens by expert; their gradient, and that of their weights, is the sum over the processes."""
        weights = copied(assignment.weights, self.mesh.tp)
        return self.inner.dispatch(whole_input(x, self.mesh), dataclasses.replace(assignment, weights=weights))

    def combine(self, output: Tensor, rows: Rows) -> Tensor:
        """Return the sum over experts and processes [b, s, h], or this process's part of its sequence."""
        return _summed(self.inner.combine(output, rows), self.mesh)


class SequencePartDispatcher(Dispatcher):
    """Experts are whole: every process routes all tokens, and hands out those of its part of the sequence.

    ``inner`` hands them out. The residual stream is split along the sequence.
    """

    def __init__(self, mesh: Mesh, inner: Dispatcher):
        super().__init__()
        self.mesh = mesh
        self.inner = inner

    def compile(self, compiled: Compiler) -> None:
        """Have what ``inner`` adds up compiled."""
        self.inner.compile(compiled)

    def seen(self, x: Tensor) -> Tensor:
        """Return all tokens [b, s, h] of the sequence of which x is this process's part."""
        return whole(x, self.mesh.tp)

    def dispatch(self, x: Tensor, assignment: Assignment) -> Rows:
        """Sort the tokens x [b, s / size, h] by expert, given the experts of all tokens."""

        def own(values: Tensor) -> Tensor:
            return part(values.unflatten(0, (x.shape[0], -1)), self.mesh.tp).flatten(0, 1)

        mine = dataclasses.replace(
            assignment,
            experts=own(assignment.experts),
            weights=own(assignment.weights),
            kept=None if assignment.kept is None else own(assignment.kept),
        )
        return self.inner.dispatch(x, mine)

    def combine(self, output: Tensor, rows: Rows) -> Tensor:
        """Return the sum over experts [b, s / size, h] for the tokens of this process."""
        return self.inner.combine(output, rows)


def _summed(x: Tensor, mesh: Mesh) -> Tensor:
    return added_and_split(x, mesh.tp) if mesh.sequence_parallel else added(x, mesh.tp)
