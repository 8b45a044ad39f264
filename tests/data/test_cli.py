import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.data.cli import preprocess_main, register
from lockstep.data.indexed import IndexedDataset
from lockstep.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "50"]


def data(*words: str) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    args = parser.parse_args(["data", *words])
    return args.func(args)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} 7"}) + "\n" for i in range(5)))
    return str(path)


def test_prepare_and_verify(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = str(tmp_path / "out")
    assert data("prepare", corpus, "--output-prefix", prefix, *NULL, "--append-eod", "--workers", "1") == 0
    assert "5 documents, 15 tokens, uint16" in capsys.readouterr().out
    assert IndexedDataset(f"{prefix}_text_document").get(3).tolist() == [3, 7, 49]
    assert data("verify", f"{prefix}_text_document", *NULL) == 0
    assert "no problem found" in capsys.readouterr().out
    assert data("verify", f"{prefix}_text_document", "--tokenizer-type", "NullTokenizer", "--vocab-size", "40") == 1
    out = capsys.readouterr().out
    assert "problem: 5 of 15 token ids are outside the vocabulary of 40 tokens" in out
    assert "problem: the data was made with another tokenizer" in out


@pytest.mark.parametrize("words", [[], ["corpus.jsonl", "--input", "other.jsonl"]])
def test_exactly_one_input(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give one input"):
        data("prepare", *words, "--output-prefix", str(tmp_path / "out"), *NULL)


@pytest.mark.parametrize(
    "words",
    [
        ["--split-sentences"],
        ["--keep-newlines"],
        ["--lang", "german"],
        ["--find-optimal-num-workers"],
        ["--workers-to-check", "2", "4"],
        ["--max-documents", "10"],
        ["--tokenizer-special-tokens", "a", "b"],
        ["--tiktoken-pattern", "v2"],
    ],
)
def test_unsupported_flags_are_refused_by_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        preprocess_main(["--input", "a", "--output-prefix", "b", *NULL, *words])
    assert caught.value.code == 2
    assert f"{words[0]} is not supported: " in capsys.readouterr().err


def test_script_takes_megatron_lms_flags(corpus: str, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
    flags = ["--input", corpus, "--output-prefix", str(tmp_path / "out"), *NULL, "--workers", "2", "--partitions", "2"]
    done = subprocess.run([*script, *flags, "--json-keys", "text"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert IndexedDataset(tmp_path / "out_text_document").tokens.tolist()[::2] == [0, 2, 4, 1, 3]


def test_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.jsonl")
    code = preprocess_main(["--input", missing, "--output-prefix", str(tmp_path / "out"), *NULL, "--workers", "1"])
    assert code != 0
    assert capsys.readouterr().err == f"error: input {missing} does not exist; give a JSON lines file\n"


def test_importing_the_commands_is_light() -> None:
    code = "import sys, lockstep.data.cli; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
