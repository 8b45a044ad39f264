"""Fixtures of the data tests."""

import json
from pathlib import Path

import pytest

from lockstep.config.data import TokenizerConfig
from lockstep.data.prepare import PrepareOptions, prepare

WORDS = ["first", "citizen", "speak", "naïve", "we", "know", "中文", "'tis", "1623", "\n", "resolved"]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE trained on a few words, as a folder in Hugging Face format; its end of document is 0."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(folder / "tokenizer.json"))
    end = "<|endoftext|>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer.model.save(str(folder))
    return folder


@pytest.fixture(scope="session")
def tinyshakespeare(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the prepared reference corpus."""
    prefix = tmp_path_factory.mktemp("corpus") / "ts"
    config = TokenizerConfig(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(shared / "data" / "tokenizer_bpe4096")
    )
    corpus = str(shared / "data" / "tinyshakespeare.jsonl")
    prepare(PrepareOptions(corpus, str(prefix), config, append_eod=True, workers=1))
    return Path(f"{prefix}_text_document")
