"""Which keys the queries may see, told without a mask of all pairs where a kernel needs none.

Shape legend: b batch, s sequence (keys), q queries.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lockstep.models.sequence import WholeSequence


@dataclass(frozen=True)
class Segments:
    """Documents of all samples end to end: where the queries and the keys of each begin, int32 [documents + 1]."""

    queries: Tensor
    keys: Tensor


class CausalMask:
    """Queries see earlier tokens of the same document, or all earlier tokens where there are no document_ids [b, s].

    ``length`` is that of the whole sequence. The queries are ``runs`` of neighbouring positions, in this order.
    """

    def __init__(
        self,
        length: int,
        device: torch.device,
        document_ids: Tensor | None = None,
        sequence: WholeSequence | None = None,
    ):
        sequence = sequence or WholeSequence()
        self.length = length
        self.document_ids = document_ids
        self.runs: tuple[range, ...] = sequence.runs(length)
        self.positions = sequence.positions(length, device)
        self._segments: dict[range, Segments] = {}

    @cached_property
    def hidden(self) -> Tensor:
        """A boolean mask [1 or b, q, s], True where a query (row) must not see a key (column)."""
        return hidden_positions(self.positions, self.length, self.document_ids)

    def hidden_of(self, run: range) -> Tensor:
        """Return the part of ``hidden`` of one run, for the keys up to its end."""
        documents = None if self.document_ids is None else self.document_ids[:, : run.stop]
        positions = torch.arange(run.start, run.stop, device=self.positions.device)
        return hidden_positions(positions, run.stop, documents)

    def segments(self, run: range) -> Segments:
        """Return the documents among the keys up to the end of a run; the last of each are the queries of the run.

        The host waits for the device once for every run of a batch. Documents lie in one piece each.
        """
        if run not in self._segments:
            assert self.document_ids is not None, "there are documents"
            self._segments[run] = _segments(self.document_ids[:, : run.stop], run)
        return self._segments[run]


def _segments(documents: Tensor, run: range) -> Segments:
    samples, keys = documents.shape
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = begins.flatten().nonzero()[:, 0]
    sample, position = first // keys, first % keys
    queries = sample * len(run) + (position - run.start).clamp(min=0)
    ends = first.new_tensor([samples * len(run), samples * keys])
    return Segments(torch.cat((queries, ends[:1])).int(), torch.cat((first, ends[1:])).int())


def hidden_positions(positions: Tensor, length: int, document_ids: Tensor | None) -> Tensor:
    """Return a boolean mask [1 or b, q, s], True where a query (row) must not see a key (column).

    The queries stand at positions [q] of a sequence of ``length`` keys, whose documents are document_ids [b, s].
    """
    later = positions[:, None] < torch.arange(length, device=positions.device)
    return later[None] if document_ids is None else later | (document_ids[:, positions, None] != document_ids[:, None])
