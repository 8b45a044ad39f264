import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.config.data import TokenizerConfig
from lockstep.data.tokenizers import (
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    NullTokenizer,
    _is_generic,
    build_tokenizer,
    padded_vocab_size,
)
from lockstep.errors import UserError

TEXT = "first citizen: naïve 中文!\n<|endoftext|> we know"


def test_null_tokenizer_is_the_current_one() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=32000))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad, tokenizer.bos) == (32000, 31999, -1, None)
    assert tokenizer.tokenize("5 17 31999") == [5, 17, 31999]
    assert tokenizer.detokenize([5, 17]) == "5 17"


def test_null_tokenizer_ids_can_be_set() -> None:
    config = TokenizerConfig(
        tokenizer_type="NullTokenizer", vocab_size=10, null_tokenizer_eod_id=0, null_tokenizer_pad_id=3
    )
    tokenizer = build_tokenizer(config)
    assert (tokenizer.eod, tokenizer.pad) == (0, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerConfig(), "set --tokenizer-type"),
        (TokenizerConfig(tokenizer_type="NullTokenizer"), "NullTokenizer needs --vocab-size"),
        (TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=0), "--vocab-size 0 is not above 0"),
        (
            TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=4, null_tokenizer_eod_id=4),
            "--null-tokenizer-eod-id 4 is not in the vocabulary of 4 tokens",
        ),
        (TokenizerConfig(tokenizer_type="HuggingFaceTokenizer"), "HuggingFaceTokenizer needs --tokenizer-model"),
        (
            TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="no/such"),
            "tokenizer no/such does not exist",
        ),
        (TokenizerConfig(tokenizer_type="GPT2BPETokenizer"), "GPT2BPETokenizer needs --vocab-file"),
        (TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file="v"), "GPT2BPETokenizer needs --merge-file"),
        (
            TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file="v", merge_file="m"),
            "tokenizer file v does not exist",
        ),
        (TokenizerConfig(tokenizer_type="Llama2Tokenizer"), "tokenizer type Llama2Tokenizer is not supported"),
        (TokenizerConfig(tokenizer_type="TikTokenizer"), "tokenizer type TikTokenizer is not supported"),
    ],
)
def test_refused(config: TokenizerConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tokenizer(config)


def test_null_tokenizer_reads_numbers_only() -> None:
    with pytest.raises(UserError, match=r"reads numbers .* got 'to be'"):
        NullTokenizer(10).tokenize("to be")


def test_hugging_face_folder_and_file_are_one_tokenizer(bpe: Path) -> None:
    folder = HuggingFaceTokenizer(str(bpe))
    assert (folder.vocab_size, folder.eod, folder.bos, folder.pad) == (300, 0, 0, -1)
    assert folder.detokenize(folder.tokenize(TEXT)) == TEXT
    file = HuggingFaceTokenizer(str(bpe / "tokenizer.json"))
    assert file.identity() == folder.identity()


WITHOUT_TORCH = """
import sys
from lockstep.data.tokenizers import HuggingFaceTokenizer
HuggingFaceTokenizer(sys.argv[1])
print("torch" in sys.modules)
"""


def test_a_folder_of_the_generic_class_is_read_without_torch(bpe: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(bpe)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("of_a_model", [False, True])
def test_a_folder_is_read_as_auto_tokenizer_reads_it(bpe: Path, tmp_path: Path, of_a_model: bool) -> None:
    import transformers

    folder = shutil.copytree(bpe, tmp_path / "tokenizer")
    added = {str(i): {"content": f"<{i}>", "special": i > 300} for i in (300, 301)}
    settings = json.loads((bpe / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if of_a_model:
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert _is_generic(folder) is not of_a_model
    ours, theirs = HuggingFaceTokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    assert type(ours._tokenizer) is type(theirs)
    assert (ours._tokenizer.get_vocab(), ours.eod) == (theirs.get_vocab(), theirs.eos_token_id)
    assert ours.tokenize(f"{TEXT} <300><301>") == theirs(f"{TEXT} <300><301>").input_ids


def test_a_lone_tokenizer_json_has_no_end_of_document(bpe: Path, tmp_path: Path) -> None:
    alone = tmp_path / "mine.json"
    alone.write_bytes((bpe / "tokenizer.json").read_bytes())
    tokenizer = HuggingFaceTokenizer(str(alone))
    assert tokenizer.tokenize("speak") == HuggingFaceTokenizer(str(bpe)).tokenize("speak")
    with pytest.raises(UserError, match="has no end-of-document token; set eos_token"):
        _ = tokenizer.eod


def test_malformed_hugging_face_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"tokenizer {tmp_path} cannot be read"):
        HuggingFaceTokenizer(str(tmp_path))


def test_special_tokens_are_added_unless_asked_not_to(shared: Path) -> None:
    folder = str(shared / "data" / "tokenizer_bpe4096")
    with_special = HuggingFaceTokenizer(folder)
    without = HuggingFaceTokenizer(folder, include_special_tokens=False)
    assert (with_special.vocab_size, with_special.eod, with_special.pad) == (4096, 0, 0)
    assert without.detokenize(without.tokenize(TEXT)) == TEXT


def test_gpt2_bpe_equals_transformers(bpe: Path) -> None:
    import transformers

    files = (str(bpe / "vocab.json"), str(bpe / "merges.txt"))
    ours = GPT2BPETokenizer(*files)
    theirs = transformers.GPT2Tokenizer.from_pretrained(bpe)
    assert ours.tokenize(TEXT) == theirs(TEXT).input_ids
    assert ours.vocab_size == len(theirs) == 300
    assert ours.eod == theirs.eos_token_id == 0
    assert ours.pad == -1
    assert ours.detokenize(ours.tokenize(TEXT)) == TEXT


def test_identity_tells_tokenizers_apart_wherever_they_lie(bpe: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bpe / name).read_bytes())
    same, first = HuggingFaceTokenizer(str(tmp_path)), HuggingFaceTokenizer(str(bpe))
    assert same.identity() == first.identity()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert HuggingFaceTokenizer(str(tmp_path)).identity() != first.identity()
    assert NullTokenizer(10).identity() != NullTokenizer(11).identity()
    assert NullTokenizer(10, 3).identity() != NullTokenizer(10, 4).identity()


@pytest.mark.parametrize(
    ("size", "divisor", "tp", "pad", "expected"),
    [(32000, 128, 1, True, 32000), (4097, 128, 1, True, 4224), (4097, 128, 2, True, 4352), (4097, 128, 2, False, 4097)],
)
def test_padded_vocab_size(size: int, divisor: int, tp: int, pad: bool, expected: int) -> None:
    assert padded_vocab_size(size, divisor, tp, pad) == expected
