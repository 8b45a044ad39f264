"""The part of every sequence that one of several context-parallel processes has.

Shape legend: b batch, s sequence, q tokens of this process.
"""

import torch
from torch import Tensor

from lockstep.models.sequence import WholeSequence
from lockstep.parallel.exchange import joined
from lockstep.parallel.mesh import Axis


class SequencePart(WholeSequence):
    """One chunk from the front and the one as far from the end, of twice as many chunks as there are processes.

    A late token attends to more keys than an early one: so every process has the same work.
    """

    def __init__(self, axis: Axis):
        self.parts = axis.size
        self._axis = axis

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Return where in a sequence of so many tokens those of this process stand, int64 [q]."""
        return torch.cat([torch.arange(run.start, run.stop, device=device) for run in self.runs(length)])

    def runs(self, length: int) -> tuple[range, ...]:
        """Return both chunks."""
        size, early = length // (2 * self.parts), self._axis.rank
        late = 2 * self.parts - 1 - early
        return range(early * size, (early + 1) * size), range(late * size, (late + 1) * size)

    def total(self, counts: Tensor) -> Tensor:
        """Return a count over the tokens of whole sequences, given that over this process's; it has no gradient."""
        return self._axis.sum_(counts.contiguous())

    def joined(self, x: Tensor) -> Tensor:
        """Return x of the whole sequence [b, s, ...] from the parts [b, q, ...]; backward adds up and splits."""
        by_process = joined(x, self._axis).unflatten(1, (self.parts, 2, -1))
        front, back = by_process[:, :, 0], by_process[:, :, 1].flip(1)
        return torch.cat((front, back), dim=1).flatten(1, 2)
