"""A tokenizer of single characters, so that a hand-made mask can be read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from lockstep.config.data import DatasetConfig, TokenizerConfig
from lockstep.data.sft.text import TextRules
from lockstep.data.tokenizers import Tokenizer, build_tokenizer

CHATML = (
    "{% for message in messages %}<|{{ message['role'][0] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)
SPECIAL = ["<eos>", "<bos>", "<pad>", "<sep>", "<|s|>", "<|u|>", "<|a|>", "<|t|>", "<|end|>", "<think>", "</think>"]
CHARACTERS = [*map(chr, range(32, 127)), "\n", "é"]


def write_tokenizer(folder: Path, pieces: tuple[str, ...] = (), template: str = CHATML) -> Path:
    """Write a tokenizer of characters, and of longer pieces where these stand."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS, *pieces])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    pattern = "|".join([*pieces, "[\\s\\S]"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    # As Llama's: a whole text begins with <bos> without being asked.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    settings |= {f"{name}_token": f"<{name}>" for name in ("eos", "bos", "pad", "sep")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tokenizer of characters."""
    return write_tokenizer(tmp_path_factory.mktemp("characters"))


@pytest.fixture
def tokenizer(characters: Path) -> Tokenizer:
    """The tokenizer of characters."""
    return load(characters)


def load(folder: Path, **settings: Any) -> Tokenizer:
    """Return the tokenizer of a folder."""
    return build_tokenizer(
        TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder), **settings)
    )


@pytest.fixture
def rules(tokenizer: Tokenizer) -> Callable[..., TextRules]:
    """Return a maker of rules; keyword arguments are fields of the data section."""

    def make(longest: int = 100, **fields: Any) -> TextRules:
        return TextRules(DatasetConfig(sft=True, **fields), tokenizer, longest)

    return make


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
