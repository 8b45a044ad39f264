"""Samples for fine-tuning: a text, or a pack of them, in a sequence.

Shapes: s sequence.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lockstep.data.gpt_dataset import Sample, SplitName, beyond_vocabulary
from lockstep.data.sft.packing import Algorithm, pack
from lockstep.data.sft.store import Store

Order = Literal["once", "repeated", "shuffled"]
"""Every text once, for a sampler that orders them; over and over; or over and over, each time in another order."""


@dataclass(frozen=True)
class Packing:
    """How texts share sequences: in which order they are dealt out, and the multiple that each is padded to."""

    algorithm: Algorithm
    multiple: int = 1


@dataclass(frozen=True)
class Layout:
    """How texts lie in sequences of ``seq_length`` tokens; ``pad`` fills the rest, without a loss."""

    seq_length: int
    pad: int
    vocab_size: int
    packing: Packing | None = None


class SFTDataset:
    """Samples of a split.

    Args:
        store: the texts.
        split: name of the split, for the record.
        layout: how they lie in sequences.
        num_samples: samples that a run takes; None for each once.
        order: the order of the samples.
        seed: seed of packs and order.
        identity: what the texts come from, for the record.

    Raises:
        UserError: a token id is not in the vocabulary.
    """

    def __init__(
        self,
        store: Store,
        *,
        split: SplitName,
        layout: Layout,
        num_samples: int | None,
        order: Order,
        seed: int,
        identity: dict[str, Any],
    ) -> None:
        self.split = split
        self.store = store
        self.layout = layout
        self.num_samples = num_samples
        self._order = order
        self._seed = seed
        self._identity = identity
        self._epoch: tuple[int, list[int]] = (-1, [])
        if layout.packing is None:
            self._members, self._starts = np.arange(len(store)), np.arange(len(store) + 1)
        else:
            room = self._places(store.places)
            self._members, self._starts = pack(room, layout.seq_length, layout.packing.algorithm, seed)
        self._check_ids()

    @property
    def num_sequences(self) -> int:
        """Different samples there are: packs, or texts."""
        return len(self._starts) - 1

    def __len__(self) -> int:
        repeats = self._order != "once" and self.num_samples is not None
        return int(self.num_samples or 0) if repeats else self.num_sequences

    def __getitem__(self, index: int) -> Sample:
        """Return a sample; IndexError when there is none of this number."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sequence(self.sequence_of(index))

    def sequence_of(self, index: int) -> int:
        """Return which sequence is the sample of a number: a pass over all of them follows another."""
        epoch, position = divmod(index, self.num_sequences)
        if self._order != "shuffled":
            return position
        if self._epoch[0] != epoch:
            import torch

            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch = epoch, torch.randperm(self.num_sequences, generator=generator).tolist()
        return self._epoch[1][position]

    def texts_of(self, sequence: int) -> list[int]:
        """Return the numbers of the texts in a sequence, in order."""
        return self._members[self._starts[sequence] : self._starts[sequence + 1]].tolist()

    def sequence(self, number: int) -> Sample:
        """Return a sequence as a sample: texts one after another, each with positions of its own, then padding."""
        size, pad = self.layout.seq_length, self.layout.pad
        tokens, labels = np.full(size, pad, np.int64), np.full(size, pad, np.int64)
        loss_mask = np.zeros(size, np.float32)
        members = self.texts_of(number)
        positions, documents = np.zeros(size, np.int64), np.full(size, len(members), np.int64)
        start = 0
        for document, member in enumerate(members):
            text, learned = self.store.text(member)
            end = start + len(text) - 1
            tokens[start:end], labels[start:end], loss_mask[start:end] = text[:-1], text[1:], learned[1:]
            end = start + int(self._places(np.array(len(text) - 1)))
            positions[start:end], documents[start:end] = np.arange(end - start), document
            start = end
        positions[start:] = np.arange(start, size) if self.layout.packing is None else np.arange(size - start)
        sample = Sample(tokens=tokens, labels=labels, loss_mask=loss_mask, position_ids=positions)
        if self.layout.packing is not None:
            sample["document_ids"], sample["rotary_positions"] = documents, positions
        return sample

    def longest(self, start: int, stop: int) -> int:
        """Return the places that the longest of some samples takes, by their numbers."""
        members = [self.texts_of(self.sequence_of(index)) for index in range(start, stop)]
        return max(int(self._places(self.store.places[numbers]).sum()) for numbers in members)

    @property
    def filled(self) -> float:
        """Share of the places of all sequences that texts take."""
        return float(self.store.places.sum()) / (self.num_sequences * self.layout.seq_length)

    def summary(self) -> str:
        """Return one line on what the texts are and how they lie."""
        counts, size = self.store.counts, self.layout.seq_length
        words = [f"{self.split}: {len(self.store)} texts of {counts.rows} rows"]
        for number, what in (
            (counts.without_completion, "left out without a completion"),
            (counts.completion_cut_away, "left out because their completion does not fit"),
            (int(self.store.shortened.sum()), "shortened"),
        ):
            if number:
                words.append(f"{number} {what}")
        kind = "packed into" if self.layout.packing is not None else "in"
        words.append(f"{kind} {self.num_sequences} sequences of {size} tokens, {self.filled:.1%} full")
        return ", ".join(words)

    def describe(self) -> dict[str, Any]:
        """Return plain values for a run record."""
        packing = self.layout.packing
        return {
            "kind": "sft",
            "split": self.split,
            "source": self._identity,
            "texts": len(self.store),
            "rows": vars(self.store.counts),
            "sequences": self.num_sequences,
            "packing": None if packing is None else vars(packing),
            "filled": self.filled,
            "learned_tokens": int(self.store.learned.sum()) - int(self.store.learned[self.store.starts[:-1]].sum()),
            "num_samples": len(self),
            "requested_samples": self.num_samples,
        }

    def _places(self, places: np.ndarray) -> np.ndarray:
        """Return places rounded up to the multiple that texts of a pack are padded to, as far as a sequence goes."""
        multiple = self.layout.packing.multiple if self.layout.packing is not None else 1
        return np.minimum(-(-places // multiple) * multiple, self.layout.seq_length)

    def _check_ids(self) -> None:
        from lockstep.errors import UserError

        for worst in (int(self.store.tokens.max()), int(self.store.tokens.min())):
            if not 0 <= worst < self.layout.vocab_size:
                raise UserError(beyond_vocabulary(f"the {self.split} split", worst, self.layout.vocab_size))
