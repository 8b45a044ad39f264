"""Dropout masks that do not depend on the tensor-parallel layout.

Shape legend: b batch, s sequence, h hidden, n query heads.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lockstep.models import DropoutStreams
from lockstep.models.dropout import STREAM_NAMES
from lockstep.parallel.mesh import Mesh


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
    """Draws the mask that one process would draw and keeps the part of this one: its heads, its part of the sequence.

    ``heads`` is the number of query heads of the whole model. Data-parallel processes and pipeline stages draw from
    streams of their own.
    """

    def __init__(self, seed: int, device: torch.device, mesh: Mesh, heads: int):
        numbers: Mapping[str, int] = dict.fromkeys(STREAM_NAMES, stream_number(mesh))
        super().__init__(seed, device, numbers)
        self._mesh = mesh
        self._heads = heads // mesh.tp.size

    def dropped(self, name: str, shape: tuple[int, ...], probability: float) -> Tensor:
        """Draw the mask of this process's tensor: attention [b * n / size, s, s], others [b, s or s / size, h]."""
        size, rank = self._mesh.tp.size, self._mesh.tp.rank
        if name == "attention":
            whole = (shape[0] // self._heads, size, self._heads, *shape[1:])
            return super().dropped(name, whole, probability)[:, rank].flatten(0, 1)
        if self._mesh.sequence_parallel:
            whole = (shape[0], size, *shape[1:])
            return super().dropped(name, whole, probability)[:, rank]
        return super().dropped(name, shape, probability)
