"""Which tokens of every sequence a model works on.

Shape legend: b batch, s sequence, q tokens that the model works on.
"""

import torch
from torch import Tensor


class WholeSequence:
    """All tokens, in order. A layout puts in its place what has some of them and can get at the others."""

    parts = 1

    def length(self, tokens: int) -> int:
        """Return how long the sequences are of which this model works on so many tokens."""
        return tokens * self.parts

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Return where in a sequence of so many tokens those of this model stand, int64 [q]."""
        return torch.arange(length, device=device)

    def runs(self, length: int) -> tuple[range, ...]:
        """Return the same positions as runs of neighbours."""
        return (range(length),)

    def total(self, counts: Tensor) -> Tensor:
        """Return a count over the tokens of whole sequences, given that over this model's."""
        return counts

    def joined(self, x: Tensor) -> Tensor:
        """Return x of all tokens of the sequence [b, s, ...], in order, from that of this model's [b, q, ...]."""
        return x
