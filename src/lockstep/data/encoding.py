"""Many texts to token ids at once: the ids that the tokenizer gives each text alone, as bytes of a token file.

Tokenizers of the tokenizers library cut a text into words before anything else. Where the rule of the cuts is known,
texts are cut here into pieces that begin at some of them; a piece has the same ids wherever it stands, so that those of
frequent pieces are looked up. All other texts go through the tokenizer whole.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, Protocol

import numpy as np

from lockstep.data.tokenizers import Tokenizer
from lockstep.errors import UserError

_CACHE_BYTES = 1 << 26
_ENTRY_BYTES = 200  # of a piece in the cache, beside its characters and ids

# Whitespace as the tokenizers library knows it (S), and all else (N): Python counts four separators in addition.
_S, _N = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
_LINE_SAFE = r"[^\S\r\n\x1c-\x1f]"  # whitespace that ends no line

_AFTER_WORDS = re.compile(rf"{_S}?{_N}+|{_S}+(?={_S}{_N})|{_S}+")
"""GPT-2's words: of the whitespace before other characters only the last one can belong to the next word."""

_TAIL = rf"(?:{_S}*[\r\n](?={_N})|{_S}+(?={_LINE_SAFE}{_N})|{_S}+\Z)"
_AFTER_LINES = re.compile(rf"{_LINE_SAFE}?{_N}+{_TAIL}?|{_TAIL}")
"""Words of Llama 3 and Qwen: the same, but the ends of lines belong to what is before them."""

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LINE_PATTERNS = {_CONTRACTION + r"\p{N}{1,3}" + _REST, _CONTRACTION + r"\p{N}" + _REST}


class TextEncoder(Protocol):
    """Turns texts into bytes of token ids, each an element of the token file's type."""

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text.

        Raises:
            UserError: a text cannot be tokenized, or has an id outside the vocabulary.
        """


def text_encoder(tokenizer: Tokenizer, dtype: np.dtype) -> TextEncoder:
    """Return the fastest encoder that gives the ids of a tokenizer."""
    whole = WholeTexts(tokenizer, dtype)
    pattern = piece_pattern(tokenizer)
    return whole if pattern is None else CachedPieces(whole, pattern)


class WholeTexts:
    """Gives every text to the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.tokenizer = tokenizer
        self._dtype = dtype

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text; see ``TextEncoder``."""
        return self.pack(self.tokenizer.tokenize_batch(texts))

    def pack(self, ids: Sequence[Sequence[int]]) -> list[bytes]:
        """Return lists of ids as bytes.

        Raises:
            UserError: an id is outside the vocabulary.
        """
        ends = list(accumulate(map(len, ids), initial=0))
        try:
            flat = np.fromiter(chain.from_iterable(ids), np.int64, ends[-1])
        except OverflowError:
            self._refuse(chain.from_iterable(ids))
        return self.cut(flat, ends[:-1], ends[1:])

    def cut(self, ids: np.ndarray, firsts: Sequence[int], lasts: Sequence[int]) -> list[bytes]:
        """Return stretches of ids as bytes; see ``pack``."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
            self._refuse(ids.tolist())
        packed = ids.astype(self._dtype).tobytes()
        size = self._dtype.itemsize
        return [packed[size * first : size * last] for first, last in zip(firsts, lasts, strict=True)]

    def _refuse(self, ids: Any) -> None:
        size = self.tokenizer.vocab_size
        wrong = next(token for token in ids if not 0 <= token < size)
        raise UserError(f"token id {wrong} is not in the vocabulary of {size} tokens; correct the text or --vocab-size")


class CachedPieces:
    """Cuts texts into pieces and remembers their ids.

    Args:
        whole: encodes what the cache does not have.
        pattern: finds the pieces of a text.
    """

    def __init__(self, whole: WholeTexts, pattern: re.Pattern[str]) -> None:
        self._whole = whole
        self._pieces = pattern.findall
        backend = whole.tokenizer.backend
        added = backend.get_added_tokens_decoder()
        self._added = _any_of(added.values())
        self._mark = next(((token.content, i) for i, token in sorted(added.items())), None)
        self._encode_batch = backend.encode_batch_fast
        before, after = _special_ids(whole.tokenizer)
        self._before, self._after = whole.pack([before, after])
        self._cache: dict[str, bytes] = {}
        self._held = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text; see ``TextEncoder``."""
        if self._held > _CACHE_BYTES:
            self._cache.clear()
            self._held = 0
        pieces = [self._pieces(text) for text in texts]
        found = [self._join(each) for each in pieces]
        lacking = [i for i, ids in enumerate(found) if ids is None]
        self._learn(dict.fromkeys(chain.from_iterable(pieces[i] for i in lacking)))
        for i in lacking:
            found[i] = self._join(pieces[i])
        return [self._whole.encode([text])[0] if ids is None else ids for text, ids in zip(texts, found, strict=True)]

    def _learn(self, pieces: Iterable[str]) -> None:
        """Encode pieces that the cache does not have, but for those with an added token: it is cut out before words."""
        unknown = [piece for piece in pieces if piece not in self._cache and not self._added(piece)]
        packed = self._encode_between_marks(unknown) or self._whole.pack(self._ids(unknown))
        self._cache.update(zip(unknown, packed, strict=True))
        self._held += _ENTRY_BYTES * len(unknown) + sum(map(len, unknown)) + sum(map(len, packed))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._encode_batch(texts, add_special_tokens=False)]

    def _encode_between_marks(self, pieces: list[str]) -> list[bytes] | None:
        """Encode pieces as one text, an added token before each: the library takes longer for many texts.

        Added tokens are cut out before all else, so that a piece between two of them stands alone. None where there is
        no such token, or where another one takes a part of it and of a piece.
        """
        if self._mark is None:
            return None
        mark, mark_id = self._mark
        ids = np.array(self._ids(["".join(mark + piece for piece in pieces)])[0], np.int64)
        marks = np.flatnonzero(ids == mark_id).tolist()
        if len(marks) != len(pieces):
            return None
        return self._whole.cut(ids, [at + 1 for at in marks], [*marks, len(ids)][1:])

    def _join(self, pieces: list[str]) -> bytes | None:
        try:
            return self._before + b"".join(map(self._cache.__getitem__, pieces)) + self._after
        except KeyError:
            return None


def _any_of(added: Iterable[Any]) -> Callable[[str], object]:
    """Return a function that finds one of the added tokens in a piece."""
    contents = [re.escape(token.content) for token in added]
    return re.compile("|".join(contents) if contents else r"(?!)").search


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return what the tokenizer adds before and after a text."""
    special = tokenizer.tokenize_batch(["a"])[0]
    alone = tokenizer.backend.encode("a", add_special_tokens=False).ids
    at = next(i for i in range(len(special)) if special[i : i + len(alone)] == alone)
    return special[:at], special[at + len(alone) :]


def piece_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return what finds pieces of a text whose ids do not depend on the rest of it; None where no rule is known."""
    backend = tokenizer.backend
    if backend is None or backend.truncation or backend.padding or backend.encode_special_tokens:
        return None
    parts = json.loads(backend.to_str())
    harmless = (None, {"type": "NFC"})
    if parts["normalizer"] not in harmless or parts["model"].get("dropout"):
        return None
    if not all(_stands_alone(token, parts["normalizer"] is not None) for token in parts["added_tokens"]):
        return None
    if not all(step.get("type") in ("ByteLevel", "TemplateProcessing") for step in _steps(parts["post_processor"])):
        return None
    return _pattern_of(list(_steps(parts["pre_tokenizer"])))


def _stands_alone(added: dict[str, Any], normalized: bool) -> bool:
    """Say whether a token that is cut out of texts first takes no notice of what is around it, and no space with it."""
    around = added["lstrip"] or added["rstrip"] or added["single_word"] or (normalized and added["normalized"])
    return not around and bool(added["content"]) and not re.search(r"\s", added["content"])


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part of a tokenizer."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for step in part.get("pretokenizers") or part.get("processors") or []:
        yield from _steps(step)


def _pattern_of(steps: list[dict[str, Any]]) -> re.Pattern[str] | None:
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    own_words = steps[-1].get("use_regex", True)
    match steps[:-1]:
        case []:
            return _AFTER_WORDS if own_words else None
        case [{"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}]:
            return _AFTER_LINES if rule in _LINE_PATTERNS and not own_words else None
    return None
