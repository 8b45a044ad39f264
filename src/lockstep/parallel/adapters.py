"""Adapters of linears that tensor parallelism splits.

Shape legend: b batch, s sequence, q tokens of this process, i inputs, o outputs.
"""

from torch import Tensor, nn

from lockstep.models.dropout import DropoutStreams
from lockstep.models.moe import Experts
from lockstep.parallel.dropout import LayoutDropoutStreams
from lockstep.parallel.exchange import copied, joined
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.plan import Shard
from lockstep.peft.adapter import Adapter, Whole


class ColumnPart(Whole):
    """Of a linear with some of the outputs: what is small between both matrices travels in place of the input."""

    def __init__(self, mesh: Mesh, shard: Shard):
        self.mesh = mesh
        self.shard = shard

    def spread(self, x: Tensor) -> Tensor:
        """Return x [b, s, ...] of all parts of the sequence; gradients add up."""
        return whole_input(x, self.mesh)

    def dropped_outputs(self, streams: DropoutStreams, shape: tuple[int, ...], probability: float) -> Tensor:
        """Draw a mask of the outputs here [b, q, o / size]."""
        return _channels(streams, shape, probability, self.shard)


class RowPart(Whole):
    """Of a linear with some of the inputs: what it adds is a part of the sum, as the product is."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def total(self, squares: Tensor) -> Tensor:
        """Return the sums [o] over the inputs of all processes."""
        return self.mesh.tp.sum_(squares)

    def dropped_inputs(self, streams: DropoutStreams, shape: tuple[int, ...], probability: float) -> Tensor:
        """Draw a mask of the inputs here [b, q, i / size]."""
        return _channels(streams, shape, probability, Shard(0))

    def dropped_outputs(self, streams: DropoutStreams, shape: tuple[int, ...], probability: float) -> Tensor:
        """Draw a mask of the outputs [b, q, o], the same on all processes."""
        return _channels(streams, shape, probability, None)


def _channels(streams: DropoutStreams, shape: tuple[int, ...], probability: float, shard: Shard | None) -> Tensor:
    assert isinstance(streams, LayoutDropoutStreams), "a layout has streams of its own"
    return streams.dropped_channels(shape, probability, shard)


def split_adapter(adapter: nn.Module | None, part: ColumnPart | RowPart) -> nn.Module | None:
    """Tell an adapter, whose parameters are those of this process already, which part of its linear is here."""
    if isinstance(adapter, Adapter):
        adapter.part = part
        if isinstance(part, ColumnPart):
            adapter.rows = adapter.rows.part(part.mesh.tp.size)
    return adapter


def whole_input(x: Tensor, mesh: Mesh) -> Tensor:
    """Return x [b, s, ...] of all parts of the sequence; gradients add up over the tensor-parallel processes."""
    return joined(x, mesh.tp) if mesh.sequence_parallel else copied(x, mesh.tp)


def split_expert_adapters(experts: Experts, mesh: Mesh) -> None:
    """Tell the adapters of experts which part of their inner width is here; their inputs are whole or partial sums."""
    for holder in (experts, *experts.local_experts.values()):
        first, second = (getattr(getattr(holder, name), "adapter", None) for name in ("linear_fc1", "linear_fc2"))
        if isinstance(first, Adapter):
            first.rows = first.rows.part(mesh.tp.size)
        if isinstance(second, Adapter):
            second.part = RowPart(mesh)
