"""Batches of samples on their way from a dataset to the device.

Shapes: b samples of a batch, s tokens of a sample.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from lockstep.data.build import batch_hash, collate
from lockstep.data.samplers import CyclicSampler, SequentialSampler
from lockstep.errors import UserError
from lockstep.parallel import Axis
from lockstep.training.device import HostCopy, sent


class Samples(Protocol):
    """A dataset: samples by number, each a mapping of numpy arrays [s] that ``collate`` takes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """Samples that are processed together: tensors [b, s], integers but for ``loss_mask``.

    ``document_ids`` numbers the documents of a sample where attention must not cross them; ``rotary_positions`` are
    given where rotary positions do not count from the start of the sequence. Where the batch has a part
    of every sample, ``document_ids`` are still those of whole samples, and so are the numbers of ``valid_tokens`` [b].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor | None = None
    rotary_positions: torch.Tensor | None = None
    valid_tokens: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``."""
        return Batch(**{k: sent(v, device) for k, v in self._tensors().items()})

    def pinned(self) -> "Batch":
        """Return the batch in memory that a GPU takes it from while the host goes on."""
        return Batch(**{k: v.pin_memory() for k, v in self._tensors().items()})

    def split(self, samples: int) -> Iterator["Batch"]:
        """Yield the batch in pieces of ``samples`` samples, in order."""
        for start in range(0, len(self), samples):
            yield Batch(**{k: v[start : start + samples] for k, v in self._tensors().items()})

    def first(self, length: int) -> "Batch":
        """Return the batch cut to its first ``length`` tokens."""
        return Batch(**{k: v[:, :length].contiguous() for k, v in self._tensors().items()})

    def at(self, positions: torch.Tensor) -> "Batch":
        """Return the part of every whole sample that stands at some positions."""
        part = {k: v[:, positions] for k, v in self._tensors().items() if k != "document_ids"}
        return Batch(**part, document_ids=self.document_ids, valid_tokens=self.loss_mask.sum(dim=1))

    def aside(self) -> dict[str, torch.Tensor]:
        """Return all but the tokens, by name."""
        return {name: value for name, value in self._tensors().items() if name != "tokens"}

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


class Feed:
    """Takes batches from a dataset in the order of a sampler, on the host.

    ``order`` returns the sample numbers of each micro-batch that follows so many samples; ``split`` names the data in
    messages. ``shares`` processes take turns at the order; ``taken`` counts the samples that all of them took.
    ``length`` returns to how many tokens the samples from one number up to another are cut, where they all end in
    padding.
    """

    def __init__(
        self,
        dataset: Samples,
        order: Callable[[int], Iterator[Sequence[int]]],
        split: str,
        shares: int = 1,
        length: Callable[[int, int], int] | None = None,
    ) -> None:
        self._dataset = dataset
        self._order = order
        self._split = split
        self._shares = shares
        self._length = length
        self._indices = order(0)
        self._ready: Batch | Exception | None = None
        self.taken = 0

    def seek(self, taken: int) -> None:
        """Go on after ``taken`` samples from the start of the order."""
        assert self._ready is None, "no batch is prepared"
        if taken == self.taken:
            return
        # The first sample of the order leaves its mark on the masks of all later ones; see ``GPTDataset``.
        for index in next(self._order(0), ())[:1]:
            self._dataset[index]
        self._indices = self._order(taken)
        self.taken = taken

    def prepare(self, micro_batches: int, device: torch.device) -> None:
        """Take what ``next`` is to return early, while ``device`` works; what goes wrong is raised by ``next``."""
        assert self._ready is None, "one batch is prepared at a time"
        try:
            batch = self._take(micro_batches)
            self._ready = batch.pinned() if device.type == "cuda" else batch
        except Exception as error:
            self._ready = error

    def next(self, micro_batches: int) -> Batch:
        """Return the next ``micro_batches`` micro-batches as one batch.

        Raises:
            UserError: the data ends before them.
        """
        ready, self._ready = self._ready, None
        if isinstance(ready, Exception):
            raise ready
        return self._take(micro_batches) if ready is None else ready

    def _take(self, micro_batches: int) -> Batch:
        samples: list[Any] = []
        start = self.taken
        for _ in range(micro_batches):
            chunk = next(self._indices, None)
            if chunk is None:
                raise UserError(
                    f"the {self._split} split ended after {self.taken} samples of the {len(self._dataset)} it has; "
                    "give more data, a shorter run, or dataset.dataloader_type=cyclic"
                )
            samples.extend(self._dataset[index] for index in chunk)
            self.taken += len(chunk) * self._shares
        batch = Batch(**collate(samples))
        if self._length is None:
            return batch
        return batch.first(self._length(start, self.taken))


@dataclass(frozen=True)
class Hashes:
    """Hashes of a global batch: of the whole, and of each micro-batch in its order."""

    batch: str
    micro_batches: list[str]


def batch_hashes(
    batch: Batch, micro_batch_size: int, dp: Axis, device: torch.device, learned: bool = False
) -> Callable[[], Hashes]:
    """Return what hashes the global batch of which every data-parallel process has its micro-batches.

    The processes exchange it here; the hashes are made, and waited for, when they are asked for. ``learned`` adds all
    labels that have a loss: in fine-tuning they do not follow from the tokens alone.
    """
    if dp.size == 1:
        return lambda: _hashes(_text(batch, learned), micro_batch_size)
    micro_batches = sent(_text(batch, learned), device).unflatten(0, (-1, micro_batch_size))
    ordered = HostCopy(in_global_order(micro_batches, dp).flatten(0, 1))
    return lambda: _hashes(ordered.read(), micro_batch_size)


def _text(batch: Batch, learned: bool) -> torch.Tensor:
    last = batch.labels.where(batch.loss_mask > 0, -1) if learned else batch.labels[:, -1:]
    return torch.cat([batch.tokens, last], dim=1)  # [b, s + 1 or 2 s]


def _hashes(text: torch.Tensor, micro_batch_size: int) -> Hashes:
    parts = text.split(micro_batch_size)
    return Hashes(batch_hash(text[:, :-1], text[:, -1:]), [batch_hash(part[:, :-1], part[:, -1:]) for part in parts])


def in_global_order(local: torch.Tensor, dp: Axis) -> torch.Tensor:
    """Return what every data-parallel process has for its micro-batches [m, ...], in the order one would have.

    The processes take turns: the first micro-batch of each, then the second of each.
    """
    return dp.stacked(local).transpose(0, 1).flatten(0, 1)


def sample_order(
    kind: str | None, total: int, micro_batch_size: int, dp: Axis, consumed_samples: int = 0
) -> Iterator[Sequence[int]]:
    """Return the sample numbers of each micro-batch of a data-parallel process.

    ``cyclic`` reshuffles every epoch, else the order is the dataset's. ``consumed_samples`` of all processes together
    are behind; a run that has taken all goes on with none.
    """
    if kind == "cyclic":
        return iter(CyclicSampler(total, consumed_samples, micro_batch_size, dp.rank, dp.size))
    if consumed_samples and total - consumed_samples < micro_batch_size * dp.size:
        return iter(())
    return iter(SequentialSampler(total, consumed_samples, micro_batch_size, dp.rank, dp.size))
