"""The order of GPT samples: which documents, where each sample starts, in which order samples are drawn.

The three indices and the state of the random generator between them follow Megatron-LM, so that the same corpus, seed,
length and number of samples give the same samples.
"""

from dataclasses import dataclass

import numpy as np

_SEPARATE_FINAL_EPOCH_BELOW = 0.80
_ROWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class SampleIndices:
    """The order of the samples of one split.

    Attributes:
        document_index: int32 [documents * epochs], document ids in reading order.
        sample_index: int32 or int64 [samples + 1, 2], position in ``document_index`` and token offset there; sample
            row r runs from row r to row r + 1, one token overlapping.
        shuffle_index: uint32 or int64 [samples], the row of each sample.
    """

    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are read.

    Attributes:
        num_epochs: passes over the documents.
        rows_before_final: samples that lie wholly in the passes before the last one.
        separate_final_epoch: the last pass is needed for so few samples that it is shuffled on its own.
    """

    num_epochs: int
    rows_before_final: int
    separate_final_epoch: bool


def plan_epochs(tokens_per_epoch: int, num_samples: int | None, seq_length: int) -> EpochPlan:
    """Return how many passes over ``tokens_per_epoch`` tokens ``num_samples`` samples take; one when None."""
    if num_samples is None:
        return EpochPlan(1, 0, False)
    needed = num_samples * seq_length + 1
    num_epochs = max(1, -(-needed // tokens_per_epoch))
    if num_epochs == 1:
        return EpochPlan(1, 0, False)
    before_final = ((num_epochs - 1) * tokens_per_epoch - 1) // seq_length
    per_epoch = (tokens_per_epoch - 1) // seq_length
    separate = num_samples - before_final < int(_SEPARATE_FINAL_EPOCH_BELOW * per_epoch)
    return EpochPlan(num_epochs, before_final, separate)


def build_indices(
    lengths: np.ndarray, documents: np.ndarray, *, num_samples: int | None, seq_length: int, seed: int
) -> SampleIndices:
    """Return the sample order.

    Args:
        lengths: [all documents], in tokens.
        documents: ids of the documents of the split; together they hold at least one token.
        num_samples: samples that must be there at least; None for one pass over the documents.
        seq_length: tokens a sample.
        seed: seed of the order.
    """
    tokens_per_epoch = int(lengths[documents].sum(dtype=np.int64))
    plan = plan_epochs(tokens_per_epoch, num_samples, seq_length)
    rng = np.random.RandomState(seed)
    document_index = _document_index(documents, plan, rng)
    sample_index = build_sample_index(lengths[document_index], seq_length)
    num_rows = len(sample_index) - 1
    first = plan.rows_before_final if plan.separate_final_epoch else num_rows
    return SampleIndices(document_index, sample_index, _shuffle_index(first, num_rows, rng))


def _document_index(documents: np.ndarray, plan: EpochPlan, rng: np.random.RandomState) -> np.ndarray:
    parts = [plan.num_epochs - 1, 1] if plan.separate_final_epoch else [plan.num_epochs]
    shuffled = []
    for repeats in parts:
        part = np.tile(documents.astype(np.int32), repeats)
        rng.shuffle(part)
        shuffled.append(part)
    return np.concatenate(shuffled)


def build_sample_index(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Return where samples start when documents of these lengths are read one after another.

    Args:
        lengths: [documents in reading order], in tokens; zeros are allowed.
        seq_length: tokens a sample, not counting the token that the next sample starts with.

    Returns:
        [samples + 1, 2], position of the document and token offset there; int32 where that is wide enough.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    num_rows = max(0, int(ends[-1]) - 1) // seq_length if len(ends) else 0
    widest = max(len(lengths), int(lengths.max(initial=0)))
    dtype = np.int32 if widest <= np.iinfo(np.int32).max else np.int64
    index = np.zeros((num_rows + 1, 2), dtype)
    # A row points at the document that holds its first token; the very first stays (0, 0) even before empty documents.
    for start in range(1, num_rows + 1, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, num_rows + 1), dtype=np.int64)
        positions = np.searchsorted(ends, rows * seq_length, side="right")
        index[rows, 0] = positions
        index[rows, 1] = rows * seq_length - (ends[positions] - lengths[positions])
    return index


def _shuffle_index(first: int, total: int, rng: np.random.RandomState) -> np.ndarray:
    dtype = np.int64 if total >= np.iinfo(np.uint32).max - 1 else np.uint32
    parts = [np.arange(0, first, dtype=dtype), np.arange(first, total, dtype=dtype)]
    rng.shuffle(parts[0])
    if first < total:
        rng.shuffle(parts[1])
    return np.concatenate(parts)
