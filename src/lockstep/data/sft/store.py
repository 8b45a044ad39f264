"""Rows of a split as token ids, kept in the cache of index files."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lockstep.data.cache import Arrays, IndexCache
from lockstep.data.sft.rows import Row, Rows
from lockstep.data.sft.text import TextRules
from lockstep.errors import UserError

_VERSION = 1  # of how rows become tokens; another number makes every cache anew


@dataclass(frozen=True)
class Counts:
    """What became of the rows: those ``kept``, and those left out because there is nothing to learn from them."""

    rows: int
    kept: int
    without_completion: int
    completion_cut_away: int
    shortened: int


@dataclass(frozen=True)
class Store:
    """Texts of a split one after another.

    Attributes:
        tokens: int32 [all tokens].
        learned: bool [all tokens]; see ``Text``.
        starts: where each text begins, int64 [texts + 1].
        shortened: bool [texts].
        rows: number of the row, from 1, that each text comes from, int64 [texts].
        counts: what became of the rows.
    """

    tokens: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    shortened: np.ndarray
    rows: np.ndarray
    counts: Counts

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def places(self) -> np.ndarray:
        """Places in a sequence that each text takes, int64 [texts]: its last token is only ever predicted."""
        return np.diff(self.starts) - 1

    def text(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and flags of a text."""
        part = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.tokens[part], self.learned[part]

    def part(self, numbers: np.ndarray) -> "Store":
        """Return some of the texts, in that order; the counts stay those of all."""
        texts = [self.text(int(number)) for number in numbers]
        return Store(
            np.concatenate([tokens for tokens, _ in texts] or [self.tokens[:0]]),
            np.concatenate([learned for _, learned in texts] or [self.learned[:0]]),
            np.cumsum([0, *(len(tokens) for tokens, _ in texts)], dtype=np.int64),
            self.shortened[numbers],
            self.rows[numbers],
            self.counts,
        )


class Source(Protocol):
    """What a store is made of."""

    @property
    def name(self) -> str:
        """How messages call it."""

    def identity(self) -> dict[str, Any]:
        """Return plain values that change when any token could."""

    def build(self) -> Store:
        """Return the texts."""


@dataclass(frozen=True)
class TextSource:
    """Rows of text, and the rules by which they become tokens; kept in ``cache`` where there is one."""

    rows: Rows
    rules: TextRules
    cache: IndexCache | None

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.rows.name

    def identity(self) -> dict[str, Any]:
        """Return the files' hash, the rules and the tokenizer."""
        return {"version": _VERSION, "rows": self.rows.identity(), "rules": self.rules.identity()}

    def build(self) -> Store:
        """Return the texts, from the cache where they are in it.

        Raises:
            UserError: there are no rows, one is damaged, or there is nothing to learn from any.
        """

        def arrays() -> Arrays:
            return _arrays(read_texts(self.rows, self.rows.name, self.rules))

        found = arrays() if self.cache is None else self.cache.load_or_build("SFT", self.identity(), arrays)
        return _store(found)


def read_texts(rows: Iterable[Row], name: str, rules: TextRules) -> Store:
    """Return the texts of rows.

    Raises:
        UserError: there are no rows, one is damaged, or there is nothing to learn from any.
    """
    kind = None
    texts, numbers, without, cut_away = [], [], 0, 0
    total = 0
    for total, row in enumerate(rows, start=1):
        if kind is None:
            kind = rules.format_of(row)
        text = rules.text_of(row, kind)
        if text is None:
            without += 1
        elif not text.num_learned:
            cut_away += 1
        else:
            texts.append(text)
            numbers.append(total)
    counts = Counts(total, len(texts), without, cut_away, sum(text.cut for text in texts))
    if not texts:
        raise UserError(_nothing(name, counts, rules.longest))
    return Store(
        np.concatenate([np.array(text.tokens, dtype=np.int32) for text in texts]),
        np.concatenate([np.array(text.learned, dtype=bool) for text in texts]),
        np.cumsum([0, *(len(text.tokens) for text in texts)], dtype=np.int64),
        np.array([text.cut for text in texts], dtype=bool),
        np.array(numbers, dtype=np.int64),
        counts,
    )


def _nothing(name: str, counts: Counts, longest: int) -> str:
    if not counts.rows:
        return f"fine-tuning data {name} has no rows; give a file with at least one"
    return (
        f"fine-tuning data {name} has nothing to learn in {counts.rows} rows: {counts.without_completion} without a "
        f"completion or an answer, {counts.completion_cut_away} whose completion does not fit into {longest} tokens; "
        "give rows with completions, or longer sequences"
    )


def _arrays(store: Store) -> Arrays:
    counts = store.counts
    return {
        "tokens": store.tokens,
        "learned": store.learned,
        "starts": store.starts,
        "shortened": store.shortened,
        "rows": store.rows,
        "counts": np.array([counts.rows, counts.kept, counts.without_completion, counts.completion_cut_away]),
    }


def _store(arrays: Arrays) -> Store:
    rows, kept, without, cut_away = arrays["counts"].tolist()
    counts = Counts(rows, kept, without, cut_away, int(arrays["shortened"].sum()))
    texts = {name: arrays[name] for name in ("tokens", "learned", "starts", "shortened", "rows")}
    return Store(**texts, counts=counts)
