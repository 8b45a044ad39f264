"""Samples for next-token prediction, cut from documents in the order of ``sampling``.

Shapes: s sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Protocol, TypedDict

import numpy as np

from lockstep.data.cache import Arrays, IndexCache
from lockstep.data.sampling import SampleIndices, build_indices
from lockstep.data.source import TokenSource
from lockstep.errors import UserError

SplitName = Literal["train", "valid", "test"]

NO_PAD = -1
"""Pad id that no token has."""


class Sample(TypedDict):
    """One training sample; every array has shape [s]."""

    tokens: np.ndarray  # int64
    labels: np.ndarray  # int64
    loss_mask: np.ndarray  # float32, 0 or 1
    position_ids: np.ndarray  # int64
    document_ids: NotRequired[np.ndarray]  # int64, counts up after each end of document; attention stays within one
    rotary_positions: NotRequired[np.ndarray]  # int64, where they do not count from the start of the sample


class Dataset(Protocol):
    """Samples by number, in the order of training."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def describe(self) -> dict[str, Any]:
        """Return plain values for a run record: sources, hashes, numbers of documents and samples."""


@dataclass(frozen=True)
class SampleRules:
    """How tokens become a sample.

    Attributes:
        seq_length: tokens a sample.
        vocab_size: ids from this one on are refused.
        eod: end-of-document id; None only when no rule below needs it.
        pad: padding id, ``NO_PAD`` when there is none.
        eod_mask_loss: no loss where the input is ``eod``.
        reset_position_ids: positions restart after each ``eod``.
        reset_attention_mask: samples carry ``document_ids``.
    """

    seq_length: int
    vocab_size: int
    eod: int | None
    pad: int = NO_PAD
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False

    @property
    def share_loss_mask(self) -> bool:
        """Megatron-LM keeps the first sample's loss mask and starts every later one from it."""
        return not (self.eod_mask_loss or self.reset_position_ids or self.reset_attention_mask)


class GPTDataset:
    """Samples of one split of one source.

    As in Megatron-LM, unless a rule makes masks differ by sample, the first sample that is read decides where all
    later ones have no loss because of padding. It only shows when documents hold pad tokens.

    Args:
        source: the documents.
        documents: ids of the split's documents.
        split: name of the split, for messages and the cache.
        num_samples: samples needed at least; None for one pass over the documents.
        rules: how tokens become a sample.
        seed: seed of the order.
        cache: where to keep the indices; None to build them each time.

    Raises:
        UserError: the split has no documents or too few tokens for one sample; names it and the remedy.
    """

    def __init__(
        self,
        source: TokenSource,
        documents: np.ndarray,
        *,
        split: SplitName,
        num_samples: int | None,
        rules: SampleRules,
        seed: int,
        cache: IndexCache | None = None,
    ) -> None:
        self.split = split
        self._source = source
        self._documents = documents
        self._rules = rules
        self._shared_loss_mask: np.ndarray | None = None
        tokens = int(source.sequence_lengths[documents].sum(dtype=np.int64))
        _check_not_empty(source, documents, split, num_samples, tokens, rules.seq_length)
        self._tokens_per_epoch = tokens

        def build() -> SampleIndices:
            return build_indices(
                source.sequence_lengths, documents, num_samples=num_samples, seq_length=rules.seq_length, seed=seed
            )

        key = {
            "source": source.identity(),
            "documents": _range(documents),
            "num_samples": num_samples,
            "seq_length": rules.seq_length,
            "seed": seed,
        }
        self.indices = build() if cache is None else _through_cache(cache, f"GPTDataset-{split}", key, build)
        self.num_samples = num_samples

    def __len__(self) -> int:
        return len(self.indices.shuffle_index)

    def __getitem__(self, index: int) -> Sample:
        """Return a sample.

        Raises:
            UserError: a token id is not in the vocabulary; names the data, the id and the vocabulary size.
            IndexError: no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        text = self._text(int(self.indices.shuffle_index[index]))
        tokens, labels = text[:-1].copy(), text[1:].copy()
        sample = Sample(
            tokens=tokens,
            labels=labels,
            loss_mask=self._loss_mask(tokens, labels),
            position_ids=self._position_ids(tokens),
        )
        if self._rules.reset_attention_mask:
            sample["document_ids"] = _documents_before(tokens == self._rules.eod)
        for values in (tokens, labels):
            values[values == self._rules.pad] = 0
        return sample

    def describe(self) -> dict[str, Any]:
        """Return plain values for a run record."""
        return {
            "kind": "gpt",
            "split": self.split,
            "source": self._source.identity(),
            "documents": _range(self._documents),
            "tokens_per_epoch": self._tokens_per_epoch,
            "num_samples": len(self),
            "requested_samples": self.num_samples,
        }

    def _text(self, row: int) -> np.ndarray:
        """Return the s + 1 tokens of a row of the sample index, int64."""
        (first, start), (last, end) = self.indices.sample_index[row : row + 2].tolist()
        documents = self.indices.document_index[first : last + 1].tolist()
        if first == last:
            parts = [self._source.get(documents[0], start, end - start + 1)]
        else:
            middle = [self._source.get(document) for document in documents[1:-1]]
            parts = [self._source.get(documents[0], start), *middle, self._source.get(documents[-1], 0, end + 1)]
        text = np.concatenate(parts, dtype=np.int64)
        self._check_ids(text)
        return text

    def _check_ids(self, text: np.ndarray) -> None:
        vocab_size = self._rules.vocab_size
        for worst in (int(text.max()), int(text.min())):
            if not 0 <= worst < vocab_size:
                raise UserError(beyond_vocabulary(self._source.name, worst, vocab_size))

    def _loss_mask(self, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        rules = self._rules
        if rules.share_loss_mask and self._shared_loss_mask is not None:
            mask = self._shared_loss_mask.copy()
        else:
            mask = np.ones(len(tokens), np.float32)
        if rules.eod_mask_loss:
            mask[tokens == rules.eod] = 0.0
        mask[labels == rules.pad] = 0.0
        if rules.share_loss_mask and self._shared_loss_mask is None:
            self._shared_loss_mask = mask.copy()
        return mask

    def _position_ids(self, tokens: np.ndarray) -> np.ndarray:
        positions = np.arange(len(tokens), dtype=np.int64)
        if not self._rules.reset_position_ids:
            return positions
        restarts = np.zeros_like(positions)
        restarts[1:] = np.where(tokens[:-1] == self._rules.eod, positions[1:], 0)
        return positions - np.maximum.accumulate(restarts)


def beyond_vocabulary(name: str, token_id: int, vocab_size: int) -> str:
    """Return the message for a token id that the vocabulary does not have."""
    return (
        f"{name} holds token id {token_id}, the vocabulary has {vocab_size} tokens (0 to {vocab_size - 1}); "
        "use the tokenizer that the data was prepared with (lockstep data verify finds the places)"
    )


def _documents_before(is_end: np.ndarray) -> np.ndarray:
    """Return how many documents ended before each position, int64 [s]."""
    ids = np.zeros(len(is_end), np.int64)
    np.cumsum(is_end[:-1], out=ids[1:])
    return ids


def _range(documents: np.ndarray) -> list[int]:
    return [int(documents[0]), int(documents[-1]) + 1]


def _check_not_empty(
    source: TokenSource,
    documents: np.ndarray,
    split: SplitName,
    num_samples: int | None,
    tokens: int,
    seq_length: int,
) -> None:
    total = len(source.sequence_lengths)
    wanted = "one pass over it is" if num_samples is None else f"{num_samples} sample(s) are"
    remedy = f"give it a larger share (--split), more documents, or ask for no {split} samples"
    if not len(documents):
        raise UserError(
            f"the {split} split of {source.name} has no documents (0 of {total}), but {wanted} asked for; {remedy}"
        )
    too_few = tokens < seq_length + 1 if num_samples is None else tokens < 2
    if too_few:
        raise UserError(
            f"the {split} split of {source.name} has too few tokens for a sample of {seq_length}: {tokens} in "
            f"{len(documents)} of {total} documents; {remedy}"
        )


def _through_cache(
    cache: IndexCache, kind: str, key: dict[str, Any], build: Callable[[], SampleIndices]
) -> SampleIndices:
    def as_arrays() -> Arrays:
        indices = build()
        return {
            "document_index": indices.document_index,
            "sample_index": indices.sample_index,
            "shuffle_index": indices.shuffle_index,
        }

    return SampleIndices(**cache.load_or_build(kind, key, as_arrays))
