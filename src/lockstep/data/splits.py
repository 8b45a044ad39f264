"""Which documents belong to train, validation and test."""

from itertools import pairwise

import numpy as np

from lockstep.data.gpt_dataset import SplitName
from lockstep.errors import UserError

SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")

Interval = tuple[float, float]


def normalize(weights: list[float]) -> list[float]:
    """Return the weights divided by their sum, in float64 as numpy sums it."""
    values = np.array(weights, dtype=np.float64)
    return (values / np.sum(values)).tolist()


def parse_split(split: str) -> list[Interval | None]:
    """Return for train, validation and test the share of the documents as bounds in [0, 1]; None for weight 0.

    Raises:
        UserError: not one to three non-negative numbers with commas between them, or all are 0.
    """
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= len(SPLITS) or not all(0 <= w < float("inf") for w in weights) or sum(weights) == 0:
        raise UserError(f"split {split!r}: expected up to three weights such as 969,30,1, of which one is above 0")
    weights += [0.0] * (len(SPLITS) - len(weights))
    bounds = [0.0]
    for share in normalize(weights):
        bounds.append(bounds[-1] + share)
    return [(low, high) if high > low else None for low, high in pairwise(bounds)]


def documents_of(interval: Interval, num_documents: int) -> np.ndarray:
    """Return the document ids of an interval of [0, 1], int32."""
    low, high = (round(bound * float(num_documents)) for bound in interval)
    return np.arange(low, high, dtype=np.int32)
