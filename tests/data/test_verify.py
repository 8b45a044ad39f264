import json
import struct
from pathlib import Path

import pytest

from lockstep.config.data import TokenizerConfig
from lockstep.data.indexed import DTYPES
from lockstep.data.prepare import PrepareOptions, prepare
from lockstep.data.tokenizers import HuggingFaceTokenizer, NullTokenizer
from lockstep.data.verify import VerifyReport, summary, verify
from tests.data.helpers import flip, toy_documents, write_dataset


@pytest.fixture
def prepared(tmp_path: Path, bpe: Path) -> str:
    corpus = tmp_path / "corpus.jsonl"
    texts = ["first citizen speak", "we know naïve 'tis", "resolved 1623 中文 first"] * 3
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(bpe))
    (written,) = prepare(PrepareOptions(str(corpus), str(tmp_path / "out"), config, append_eod=True, workers=1))
    return written.prefix


def the_problem(report: VerifyReport) -> str:
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


def test_good_files(prepared: str, bpe: Path) -> None:
    report = verify(prepared, HuggingFaceTokenizer(str(bpe)))
    assert report.ok
    assert report.notes == []
    assert report.facts["documents"] == 9
    assert "no problem found" in summary(report)


def test_truncation(prepared: str) -> None:
    flip(Path(f"{prepared}.bin"), lambda raw: raw.pop())
    assert "is truncated" in the_problem(verify(prepared))


def test_changed_bytes_are_noticed(prepared: str) -> None:
    flip(Path(f"{prepared}.bin"), lambda raw: raw.__setitem__(0, raw[0] ^ 1))
    assert "is not the file that was prepared: sha256" in the_problem(verify(prepared))


def test_wrong_dtype(prepared: str) -> None:
    flip(Path(f"{prepared}.idx"), lambda raw: raw.__setitem__(17, 3))
    problems = verify(prepared).problems
    assert any("says int16, but the data was prepared as uint16" in problem for problem in problems)


def test_wrong_dtype_without_a_record(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", toy_documents(), DTYPES[3])
    problem = the_problem(verify(str(tmp_path / "d"), vocab_size=300))
    assert "holds int16; a vocabulary of 300 tokens is written as uint16" in problem
    write_dataset(tmp_path / "e", toy_documents(), DTYPES[4])
    wider = verify(str(tmp_path / "e"), vocab_size=300)
    assert wider.ok
    assert any("holds int32" in note for note in wider.notes)


def test_ids_beyond_the_vocabulary_are_located(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [[1, 2], [3, 50, 60], [4, 70]])
    problem = the_problem(verify(str(tmp_path / "d"), vocab_size=50))
    assert "3 of 7 token ids are outside the vocabulary of 50 tokens" in problem
    assert f"the first is 50 in document 1, token 1, byte 6 of {tmp_path / 'd'}.bin" in problem


def test_negative_ids_are_found_without_a_vocabulary(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [[1, 2], [3, -4]], DTYPES[4])
    assert "1 of 4 token ids are negative; the first is -4 in document 1" in the_problem(verify(str(tmp_path / "d")))


def test_another_tokenizer_by_the_record(prepared: str) -> None:
    problem = the_problem(verify(prepared, NullTokenizer(300, 0)))
    assert "made with another tokenizer" in problem
    assert "type HuggingFaceTokenizer against NullTokenizer" in problem


def test_another_tokenizer_by_example(prepared: str, bpe: Path, tmp_path: Path) -> None:
    Path(f"{prepared}.lockstep.json").unlink()
    right = verify(prepared, HuggingFaceTokenizer(str(bpe)))
    assert right.ok
    assert any("cannot be checked" in note for note in right.notes)
    assert any("0 of 9 sampled sequences change" in note for note in right.notes)
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((bpe / "tokenizer.json").read_text())
    content["model"]["merges"] = []  # the same vocabulary, but text is no longer merged into words
    (other / "tokenizer.json").write_text(json.dumps(content))
    (other / "tokenizer_config.json").write_bytes((bpe / "tokenizer_config.json").read_bytes())
    wrong = verify(prepared, HuggingFaceTokenizer(str(other)))
    assert "probably made with another tokenizer" in the_problem(wrong)


def test_what_is_not_checked_is_said(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [[1, 2]])
    report = verify(str(tmp_path / "d"))
    assert report.ok
    assert len(report.notes) == 3
    null = verify(str(tmp_path / "d"), NullTokenizer(10))
    assert any("NullTokenizer fits any ids" in note for note in null.notes)


def test_a_record_that_cannot_be_read(prepared: str) -> None:
    Path(f"{prepared}.lockstep.json").write_text("{")
    assert "cannot be read" in the_problem(verify(prepared))
    Path(f"{prepared}.lockstep.json").write_text('{"version": 9}')
    assert "has version 9, expected 1" in the_problem(verify(prepared))


def test_missing_files(tmp_path: Path) -> None:
    assert "does not exist" in the_problem(verify(str(tmp_path / "none")))


def test_ids_are_scanned_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.data.verify._SCAN_TOKENS", 3)
    write_dataset(tmp_path / "d", [[1, 2, 3, 4], [5, 9, 9, 1]])
    problem = the_problem(verify(str(tmp_path / "d"), vocab_size=9))
    assert "2 of 8 token ids" in problem
    assert "document 1, token 1" in problem


def test_a_cut_off_index_is_one_message(prepared: str) -> None:
    flip(Path(f"{prepared}.idx"), lambda raw: raw.__setitem__(slice(18, 26), struct.pack("<Q", 10**12)))
    assert "is truncated" in the_problem(verify(prepared))
