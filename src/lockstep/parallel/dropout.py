"""Dropout masks that depend neither on the tensor-parallel nor on the context-parallel layout.

Shape legend: b batch, s sequence, q tokens of this process, h hidden, n query heads.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lockstep.models import DropoutStreams
from lockstep.models.dropout import STREAM_NAMES
from lockstep.parallel.context import SequencePart
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.plan import Shard


def stream_number(mesh: Mesh) -> int:
    """Return the number of the streams that this process draws from: one for each pipeline stage and dp process."""
    return mesh.pp.rank * mesh.dp.size + mesh.dp.rank


def stream_layout(mesh: Mesh) -> dict[str, int]:
    """Return what of a layout decides which streams there are."""
    return {"data_parallel": mesh.dp.size, "pipeline_parallel": mesh.pp.size}


def keeps_streams(mesh: Mesh) -> bool:
    """Tell whether this process is the first of those that draw from the same streams."""
    return mesh.tp.rank == mesh.cp.rank == 0


class LayoutDropoutStreams(DropoutStreams):
    """Draws the mask that one process would draw and keeps the part of this one: its heads, its tokens.

    ``heads`` is the number of query heads of the whole model. Data-parallel processes and pipeline stages draw from
    streams of their own.
    """

    def __init__(self, seed: int, device: torch.device, mesh: Mesh, heads: int):
        numbers: Mapping[str, int] = dict.fromkeys(STREAM_NAMES, stream_number(mesh))
        super().__init__(seed, device, numbers)
        self._mesh = mesh
        self._sequence = SequencePart(mesh.cp)
        self._heads = heads // mesh.tp.size

    def dropped(self, name: str, shape: tuple[int, ...], probability: float) -> Tensor:
        """Draw the mask of this process's tensor: attention [b * n / size, q, s], others [b, q or q / size, h]."""
        tp = self._mesh.tp
        whole: tuple[int, ...]
        if name == "attention":
            whole = (shape[0] // self._heads, tp.size, self._heads, shape[2], shape[2])
            return self._own(super().dropped(name, whole, probability)[:, tp.rank].flatten(0, 1))
        shares = tp.size if self._mesh.sequence_parallel else 1
        whole = (shape[0], shape[1] * shares * self._mesh.cp.size, *shape[2:])
        own = self._own(super().dropped(name, whole, probability))
        return own.chunk(shares, dim=1)[tp.rank] if shares > 1 else own

    def dropped_channels(self, shape: tuple[int, ...], probability: float, shard: Shard | None) -> Tensor:
        """Draw the mask of a tensor [b, q, c or c / size], whose channels ``shard`` splits (None: they are whole).

        Tensor parallelism leaves its sequence whole.
        """
        tp = self._mesh.tp
        width = shape[-1] * (1 if shard is None else tp.size)
        whole = (shape[0], shape[1] * self._mesh.cp.size, *shape[2:-1], width)
        own = self._own(super().dropped("hidden", whole, probability))
        return own if shard is None else replace(shard, dim=own.dim() - 1).part(own, tp.size, tp.rank)

    def _own(self, mask: Tensor) -> Tensor:
        """Keep the rows of this process's tokens of a mask whose dimension 1 is the sequence."""
        return mask if self._mesh.cp.size == 1 else mask[:, self._sequence.positions(mask.shape[1], mask.device)]
