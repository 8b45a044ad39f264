"""Keys and values of earlier tokens, so that a new token costs one pass over itself.

Shape legend: b batch, s sequence so far, q new tokens.
"""

import torch
from torch import Tensor

from lockstep.models.sequence import WholeSequence


class GrowingSequence(WholeSequence):
    """Sequences of which a pass of the model works on the new tokens alone.

    What layers join from all tokens, they join in the same order in every pass: so its place in the order says which
    tensor of earlier passes it continues. One growing sequence is for one batch.
    """

    def __init__(self, capacity: int):
        """``capacity`` is the longest that the sequences may grow."""
        self._capacity = capacity
        self._kept: list[Tensor] = []
        self._past = self._asked = 0

    def grown(self, tokens: int) -> None:
        """Note that a pass over so many new tokens is over."""
        self._past, self._asked = self._past + tokens, 0

    def length(self, tokens: int) -> int:
        """Return how long the sequences are with so many new tokens."""
        return self._past + tokens

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Return where the new tokens stand in sequences of this length, int64 [q]."""
        return torch.arange(self._past, length, device=device)

    def runs(self, length: int) -> tuple[range, ...]:
        """Return the same positions as a run of neighbours."""
        return (range(self._past, length),)

    def joined(self, x: Tensor) -> Tensor:
        """Return x of all tokens so far [b, s, ...], given that of the new ones [b, q, ...]."""
        if self._asked == len(self._kept):
            self._kept.append(x.new_empty(x.shape[0], self._capacity, *x.shape[2:]))
        kept, end = self._kept[self._asked], self.length(x.shape[1])
        kept[:, self._past : end] = x
        self._asked += 1
        return kept[:, :end]
