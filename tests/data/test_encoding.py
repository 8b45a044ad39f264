"""The ids of many texts at once are those of each text alone, whatever cuts texts into words."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from lockstep.data import encoding
from lockstep.data.encoding import CachedPieces, WholeTexts, piece_pattern, text_encoder
from lockstep.data.tokenizers import HuggingFaceTokenizer, NullTokenizer
from lockstep.errors import UserError

END = "<|end|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = LLAMA3.replace(r"[\r\n]*|", r"[\r\n/]*|")
UINT16 = np.dtype("<u2")
# Whitespace of all kinds, characters that Python alone takes for whitespace, marks, and what words are cut at.
CHARACTERS = [
    *" \n\r\t\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u3000\u200b",
    *"aT'1½.,/<é\u0301\u212b中😀",
    "  ",
    "\n\n",
    END,
]
TRAINING = [
    "".join(CHARACTERS[(i * step + i // 7) % len(CHARACTERS)] for i in range(200)) for step in (1, 3, 5, 7, 11)
] + ["a a'T 11 .. \n\n\n  \n \t ,,\n\n a1a1 'S's \r\n\r\n.\n.\n /\n/"] * 5


def save(folder: Path, pre_tokenizer: Any, change: Callable[[Backend], None] | None = None) -> HuggingFaceTokenizer:
    """Train a small BPE that has merges of whitespace and punctuation, and open it as users do."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING, trainer)
    if change is not None:
        change(backend)
    backend.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(str(folder / "tokenizer.json"))


def split(rule: str) -> Any:
    words = pre_tokenizers.Split(Regex(rule), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def llama3(backend: Backend) -> None:
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, backend.token_to_id(END))]),
        ]
    )


def qwen(backend: Backend) -> None:
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)


TOKENIZERS: dict[str, tuple[Any, Callable[[Backend], None] | None]] = {
    "GPT-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "GPT-2 in NFC": (pre_tokenizers.ByteLevel(add_prefix_space=False), qwen),
    "Llama 3": (split(LLAMA3), llama3),
    "Qwen": (split(LLAMA3.replace("{1,3}", "")), qwen),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return save(tmp_path_factory.mktemp("tokenizer"), *TOKENIZERS[request.param])


def expected(tokenizer: HuggingFaceTokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.tokenize(text) for text in texts]


def ids(packed: list[bytes]) -> list[list[int]]:
    return [np.frombuffer(each, UINT16).tolist() for each in packed]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(CHARACTERS), max_size=30).map("".join), max_size=4))
@example(texts=["", "a", " a  ", "  \n a", f"a  {END} a", "a.\n\n\x1cb", "a\n\n1", ".\n/", "\n"])
def test_pieces_have_the_ids_of_whole_texts(tokenizer: HuggingFaceTokenizer, texts: list[str]) -> None:
    encoder = text_encoder(tokenizer, UINT16)
    assert isinstance(encoder, CachedPieces)
    assert ids(encoder.encode(texts)) == expected(tokenizer, texts)
    assert ids(encoder.encode(texts)) == expected(tokenizer, texts)  # from the cache
    assert ids(WholeTexts(tokenizer, UINT16).encode(texts)) == expected(tokenizer, texts)


def added(**settings: Any) -> Callable[[Backend], None]:
    def change(backend: Backend) -> None:
        backend.add_tokens([AddedToken(**settings)])

    return change


def prefixed(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lower(backend: Backend) -> None:
    backend.normalizer = normalizers.Lowercase()


def dropout(backend: Backend) -> None:
    backend.model.dropout = 0.5


@pytest.mark.parametrize(
    ("pre_tokenizer", "change"),
    [
        (split(O200K), None),
        (pre_tokenizers.Metaspace(), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), added(content="a a")),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), added(content="<m>", lstrip=True)),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), added(content="<m>", single_word=True)),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), prefixed),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), lower),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), dropout),
    ],
)
def test_tokenizers_with_other_rules_get_whole_texts(
    tmp_path: Path, pre_tokenizer: Any, change: Callable[[Backend], None] | None
) -> None:
    tokenizer = save(tmp_path, pre_tokenizer, change)
    assert piece_pattern(tokenizer) is None
    assert isinstance(text_encoder(tokenizer, UINT16), WholeTexts)


def test_truncation_in_the_file_does_not_cut_texts(tmp_path: Path) -> None:
    def change(backend: Backend) -> None:
        backend.enable_truncation(3)
        backend.enable_padding(length=9)

    tokenizer = save(tmp_path, pre_tokenizers.Metaspace(), change)
    texts = ["a1a1 'S's a a", "a"]
    assert ids(text_encoder(tokenizer, UINT16).encode(texts)) == expected(tokenizer, texts)
    assert len(expected(tokenizer, texts)[0]) > 3


def test_a_class_that_encodes_in_its_own_way_is_asked_itself(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))

    class Reversing(type(tokenizer._tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **settings: Any) -> Any:
            return super().__call__(text[::-1], **settings)

    tokenizer._tokenizer.__class__ = Reversing
    assert tokenizer.backend is None
    assert ids(text_encoder(tokenizer, UINT16).encode(["a1"])) == [tokenizer.tokenize("a1")]


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_CACHE_BYTES", 20 * 250)
    encoder = text_encoder(save(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False)), UINT16)
    assert isinstance(encoder, CachedPieces)
    for i in range(100):
        encoder.encode([f"a{i} 1{i}"])
        assert len(encoder._cache) <= 40


@pytest.mark.parametrize("alphabet", ["abcdefghij", "\u4e00\u4e01\u4e02\u4e03\u4e04\u4e05\u4e06\u4e07\u4e08\u4e09"])
def test_words_that_never_come_back_do_not_eat_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alphabet: str
) -> None:
    monkeypatch.setattr(encoding, "_CACHE_BYTES", 1 << 20)
    encoder = text_encoder(save(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False)), UINT16)
    digits, most = str.maketrans("0123456789", alphabet), 0
    tracemalloc.start()
    for first in range(0, 30_000, 500):
        encoder.encode([" ".join(str(i) for i in range(first, first + 500)).translate(digits)])
        most = max(most, tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert most < 1.5 * (1 << 20)


@pytest.mark.parametrize("token", [f"a{END}", f"{END}a"])
def test_an_added_token_around_the_one_that_parts_pieces(tmp_path: Path, token: str) -> None:
    tokenizer = save(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False), added(content=token, normalized=False))
    encoder = text_encoder(tokenizer, UINT16)
    assert isinstance(encoder, CachedPieces)
    texts = ["1 a", "a 1", f"1 {token} 1"]
    assert ids(encoder.encode(texts)) == expected(tokenizer, texts)


def test_pieces_where_no_token_parts_them(tokenizer: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = text_encoder(tokenizer, UINT16)
    monkeypatch.setattr(encoder, "_mark", None)
    texts = ["a 1, a", f" a {END}"]
    assert ids(encoder.encode(texts)) == expected(tokenizer, texts)


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    for text, wrong in (("1 100", 100), ("1 -1", -1), (f"1 {10**30}", 10**30)):
        with pytest.raises(UserError, match=f"token id {wrong} is not in the vocabulary of 100 tokens"):
            WholeTexts(NullTokenizer(100), UINT16).encode([text])
    assert json.dumps(ids(WholeTexts(NullTokenizer(100), UINT16).encode(["1 2", "3"]))) == "[[1, 2], [3]]"
