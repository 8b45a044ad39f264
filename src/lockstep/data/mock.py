"""Generated data: 100,000 documents of random length that count up, the same for everyone."""

from typing import Any

import numpy as np

_NUM_DOCUMENTS = 100_000
_LENGTH_BELOW = 4096
_LENGTH_SEED = 0


class MockTokens:
    """The generated documents: 1, 2, 3, ... modulo the vocabulary size, closed by the end-of-document id.

    Their lengths never change; ``seed`` of a run only orders them.
    """

    def __init__(self, vocab_size: int, eod: int) -> None:
        self._vocab_size = vocab_size
        self._eod = eod
        rng = np.random.default_rng(_LENGTH_SEED)
        self.sequence_lengths = rng.integers(1, _LENGTH_BELOW, size=_NUM_DOCUMENTS, dtype=np.int32)

    @property
    def name(self) -> str:
        """How messages call the data."""
        return "mock data"

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return int64 tokens of a document from ``offset``, all that follow or ``length`` of them."""
        size = int(self.sequence_lengths[sequence])
        stop = size if length is None else offset + length
        tokens = np.arange(offset + 1, stop + 1, dtype=np.int64) % self._vocab_size
        if stop == size and stop > offset:
            tokens[-1] = self._eod
        return tokens

    def identity(self) -> dict[str, Any]:
        """Return what the tokens follow from."""
        return {"mock": True, "vocab_size": self._vocab_size, "eod": self._eod}
