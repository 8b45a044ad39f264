"""What sample order is built on: documents of tokens, from files or generated."""

from typing import Any, Protocol

import numpy as np


class TokenSource(Protocol):
    """Documents of token ids.

    Attributes:
        sequence_lengths: int32 [documents], in tokens. A document here is a sequence entry of the index.
    """

    sequence_lengths: np.ndarray

    @property
    def name(self) -> str:
        """How error messages call it: a path prefix for files."""

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return tokens of a document from ``offset``, all that follow or ``length`` of them."""

    def identity(self) -> dict[str, Any]:
        """Return plain values that change when any token could have changed."""
