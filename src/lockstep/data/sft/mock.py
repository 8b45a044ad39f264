"""Generated texts for fine-tuning: the completion goes on counting where the prompt stopped, the same for everyone."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.data.sft.store import Counts, Store

_TEXTS = 1000
_LONGEST = 128
_SEEDS = {"train": 0, "valid": 1, "test": 2}


@dataclass(frozen=True)
class MockTexts:
    """A thousand texts of 4 to 128 tokens that count up modulo the vocabulary; the later half is the completion."""

    split: str
    vocab_size: int
    eod: int
    longest: int

    @property
    def name(self) -> str:
        """How messages call it."""
        return "mock data"

    def identity(self) -> dict[str, Any]:
        """Return what the tokens follow from."""
        return {"mock": True, "vocab_size": self.vocab_size, "eod": self.eod, "longest": self.longest}

    def build(self) -> Store:
        """Return the texts."""
        rng = np.random.default_rng(_SEEDS[self.split])
        lengths = np.minimum(rng.integers(4, _LONGEST + 1, size=_TEXTS), self.longest)
        firsts = rng.integers(0, self.vocab_size, size=_TEXTS)
        tokens = [(first + np.arange(length)) % self.vocab_size for first, length in zip(firsts, lengths, strict=True)]
        for text in tokens:
            text[-1] = self.eod
        learned = [np.arange(length) >= length // 2 for length in lengths]
        return Store(
            np.concatenate(tokens).astype(np.int32),
            np.concatenate(learned),
            np.cumsum([0, *lengths], dtype=np.int64),
            np.zeros(_TEXTS, dtype=bool),
            np.arange(1, _TEXTS + 1),
            Counts(_TEXTS, _TEXTS, 0, 0, 0),
        )
