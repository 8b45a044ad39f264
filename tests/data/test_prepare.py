import gzip
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lockstep.config.data import TokenizerConfig
from lockstep.data import prepare as prepare_module
from lockstep.data.indexed import IndexedDataset, sha256_file
from lockstep.data.prepare import PrepareOptions, prepare
from lockstep.data.sidecar import read_sidecar
from lockstep.errors import UserError

BIN_SHA256 = "87fa8a37b506567cbb7a33dc61964f3919a160ae17e5e11193e3e1ed5c864ae0"
IDX_SHA256 = "e1be7b9b2c773f14258a652e2c4d562fe9e3d293af38cf7de83ce9f5f38cded9"
NULL = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=100)


def corpus(folder: Path, lines: Sequence[Any]) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def documents(prefix: str) -> list[list[int]]:
    data = IndexedDataset(prefix)
    bounds = data.document_bounds.tolist()
    return [[t for s in range(low, high) for t in data.get(s).tolist()] for low, high in pairwise(bounds)]


def test_reference_corpus_is_byte_identical_to_megatron_lms(tinyshakespeare: Path) -> None:
    assert sha256_file(Path(f"{tinyshakespeare}.bin")) == BIN_SHA256
    assert sha256_file(Path(f"{tinyshakespeare}.idx")) == IDX_SHA256


def test_worker_count_changes_nothing(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_CHUNK_LINES", 7)
    config = TokenizerConfig(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(shared / "data" / "tokenizer_bpe4096")
    )
    options = PrepareOptions(
        str(shared / "data" / "tinyshakespeare.jsonl"), str(tmp_path / "ts"), config, append_eod=True, workers=3
    )
    (written,) = prepare(options)
    assert (written.bin_sha256, written.idx_sha256) == (BIN_SHA256, IDX_SHA256)
    assert (written.documents, written.tokens, written.dtype) == (723, 343383, "uint16")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("before", [None, "true"])
def test_a_worker_starts_no_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, before: str | None
) -> None:
    encode, name = prepare_module.Encoder.encode, "TOKENIZERS_PARALLELISM"

    def checked(self: prepare_module.Encoder, chunk: prepare_module.Chunk) -> list[prepare_module.Encoded]:
        assert os.environ[name] == "false"
        return encode(self, chunk)

    monkeypatch.setattr(prepare_module.Encoder, "encode", checked)
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    prepare(PrepareOptions(corpus(tmp_path, [{"text": "1"}]), str(tmp_path / "out"), NULL, workers=workers))
    assert os.environ.get(name) == before


def test_empty_texts_and_lists_of_sentences(tmp_path: Path) -> None:
    lines = [{"text": ["1 2", "3"]}, {"text": []}, {"text": "4"}]
    prepare(PrepareOptions(corpus(tmp_path, lines), str(tmp_path / "out"), NULL, append_eod=True, workers=1))
    data = IndexedDataset(tmp_path / "out_text_document")
    assert data.sequence_lengths.tolist() == [2, 2, 2]
    assert data.document_bounds.tolist() == [0, 2, 2, 3]
    assert data.tokens.tolist() == [1, 2, 3, 99, 4, 99]


def test_one_pair_of_files_a_key(tmp_path: Path) -> None:
    lines = [{"a": "1", "b": "2 3", "c": 5}, {"a": "4", "b": "5"}]
    options = PrepareOptions(corpus(tmp_path, lines), str(tmp_path / "out"), NULL, json_keys=["a", "b"], workers=1)
    written = prepare(options)
    assert [files.prefix for files in written] == [str(tmp_path / "out_a_document"), str(tmp_path / "out_b_document")]
    assert documents(written[0].prefix) == [[1], [4]]
    assert documents(written[1].prefix) == [[2, 3], [5]]


def test_partitions_deal_documents_out_as_megatron_lm(tmp_path: Path) -> None:
    path = corpus(tmp_path, [{"text": str(i)} for i in range(7)])
    options = PrepareOptions(path, str(tmp_path / "out"), NULL, partitions=3, workers=3)
    (written,) = prepare(options)
    assert [d[0] for d in documents(written.prefix)] == [0, 3, 6, 1, 4, 2, 5]
    kept = PrepareOptions(path, str(tmp_path / "kept"), NULL, partitions=3, workers=3, keep_sequential_samples=True)
    assert [d[0] for d in documents(prepare(kept)[0].prefix)] == list(range(7))
    left = {p.name for p in tmp_path.iterdir()} - {"corpus.jsonl"}
    assert left == {f"{n}_text_document.{s}" for n in ("out", "kept") for s in ("bin", "idx", "lockstep.json")}


def test_several_and_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "2"}\n{"text": "3"}')
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write('{"text": "1"}\n')
    (written,) = prepare(PrepareOptions(str(tmp_path / "*.jsonl*"), str(tmp_path / "out"), NULL, workers=1))
    assert documents(written.prefix) == [[1], [2], [3]]


def test_sidecar_records_tokenizer_and_hashes(tmp_path: Path) -> None:
    path = corpus(tmp_path, [{"text": "1 2"}])
    (written,) = prepare(PrepareOptions(path, str(tmp_path / "out"), NULL, append_eod=True, workers=1))
    sidecar = read_sidecar(written.prefix)
    assert sidecar is not None
    assert sidecar.tokenizer == {"type": "NullTokenizer", "vocab_size": 100, "eod": 99, "pad": -1}
    assert sidecar.append_eod
    assert sidecar.files["bin_sha256"] == hashlib.sha256(Path(f"{written.prefix}.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "1"}, "{text: 2}"], r"corpus\.jsonl, line 2 is not JSON: .* at column 2; correct or remove"),
        ([{"text": "1"}, "", {"text": "2"}], r"line 2 is blank"),
        ([[1, 2]], "line 1: expected a JSON object, got list"),
        ([{"text": "1"}, {"txt": "2"}], r"line 2 has no key 'text' \(it has txt\); choose with --json-keys"),
        ([{"text": 5}], "line 1: 'text' must be a text or a list of texts, got int"),
        ([{"text": "1"}, {"text": "to be"}], "line 2: NullTokenizer reads numbers"),
        ([{"text": "1 100"}], "line 1: token id 100 is not in the vocabulary of 100 tokens"),
        (["[" * 100_000], r"line 1 cannot be read as JSON \(.*recursion.*\); correct or remove the line"),
        (['{"text": "1", "id": ' + "1" * 5000 + "}"], r"line 1 cannot be read as JSON \(.*digits.*\); correct"),
        ([], r"corpus\.jsonl is empty: no document has a token under key 'text'"),
        ([{"text": []}], "is empty"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_names_the_line_and_leaves_nothing(
    tmp_path: Path, lines: list[Any], message: str, workers: int
) -> None:
    path = corpus(tmp_path, lines)
    with pytest.raises(UserError, match=message):
        prepare(PrepareOptions(path, str(tmp_path / "out"), NULL, workers=workers))
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Return what limits the size of files: the system refuses to write more, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("documents", "length", "size", "refused", "left"),
    [
        pytest.param(1, 9000, 4096, "out_text_document.bin", [], id="tokens"),
        pytest.param(2, 3000, 4096, "out_text_document.bin", [], id="tokens that were held back"),
        pytest.param(1, 3000, 4096, "out_text_document.bin", [], id="last tokens"),
        pytest.param(600, 1, 4096, "out_text_document.idx", [], id="index"),
        pytest.param(1, 1, 200, "out_text_document.lockstep.json", ["bin", "idx"], id="note"),
    ],
)
def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    largest_file: Callable[[int], None],
    documents: int,
    length: int,
    size: int,
    refused: str,
    left: list[str],
) -> None:
    path = corpus(tmp_path, [{"text": " ".join(["1"] * length)}] * documents)
    monkeypatch.setattr(prepare_module, "_CHUNK_LINES", 1)
    largest_file(size)
    with pytest.raises(UserError, match=f"cannot write .*/{re.escape(refused)}: File too large; make room there"):
        prepare(PrepareOptions(path, str(tmp_path / "out"), NULL, workers=1))
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"corpus.jsonl", *(f"out_text_document.{end}" for end in left)}


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    path = corpus(tmp_path, [{"text": "1"}])
    with pytest.raises(UserError, match=r"cannot write .*out_text_document\.bin: Not a directory"):
        prepare(PrepareOptions(path, f"{path}/folder/out", NULL, workers=1))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read /proc/self/mem: Input/output error"):  # its first page is nobody's
        prepare(PrepareOptions("/proc/self/mem", str(tmp_path / "out"), NULL, workers=2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [lambda whole: whole[:-9], lambda whole: whole[:20] + b"\xff" * 20 + whole[40:]])
def test_a_damaged_gzip_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(99)))))
    with pytest.raises(UserError, match=r"corpus\.jsonl\.gz is not a whole gzip file"):
        prepare(PrepareOptions(str(path), str(tmp_path / "out"), NULL, workers=1))


INTERRUPTED = """
import os, signal, sys
from lockstep.data.cli import preprocess_main
from lockstep.data.progress import PrepareProgress
PrepareProgress.advance = lambda *_: os.killpg(0, signal.SIGINT)
sys.exit(preprocess_main())
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path: Path, workers: str) -> None:
    path = corpus(tmp_path, [{"text": "1"}])
    words = ["--input", path, "--output-prefix", str(tmp_path / "out"), "--workers", workers]
    words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    command = [sys.executable, "-c", INTERRUPTED, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, start_new_session=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_the_first_bad_line_is_the_one_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_CHUNK_LINES", 2)
    lines = [{"text": str(i)} for i in range(9)]
    lines[3] = lines[8] = {"txt": "1"}
    with pytest.raises(UserError, match="line 4 has no key"):
        prepare(PrepareOptions(corpus(tmp_path, lines), str(tmp_path / "out"), NULL, workers=2))


def test_a_text_without_tokens_for_it_is_reported_before_a_later_line_that_is_not_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_CHUNK_LINES", 3)
    lines = [*({"text": str(i)} for i in range(4)), {"text": "to be"}, "{"]
    with pytest.raises(UserError, match="line 5: NullTokenizer reads numbers"):
        prepare(PrepareOptions(corpus(tmp_path, lines), str(tmp_path / "out"), NULL, workers=1))


def test_half_a_surrogate_pair_is_an_error_of_its_line(shared: Path, tmp_path: Path) -> None:
    model = str(shared / "data" / "tokenizer_bpe4096")
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model)
    path = corpus(tmp_path, [{"text": "a"}, '{"text": "b \\ud800"}'])
    with pytest.raises(UserError, match="line 2: the text cannot be tokenized"):
        prepare(PrepareOptions(path, str(tmp_path / "out"), config, workers=1))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "1"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        prepare(PrepareOptions(str(path), str(tmp_path / "out"), NULL, workers=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "--workers 0 is not above 0"),
        ({"workers": 4, "partitions": 3}, "--workers 4 is not divisible by --partitions 3"),
        ({"partitions": 0, "workers": 1}, "--partitions 0 is not above 0"),
        ({"log_interval": 0}, "--log-interval 0 is not above 0"),
    ],
)
def test_bad_options(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(PrepareOptions(corpus(tmp_path, [{"text": "1"}]), str(tmp_path / "out"), NULL, **settings))  # type: ignore[arg-type]


def test_missing_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl does not exist; give a JSON lines file"):
        prepare(PrepareOptions(str(tmp_path / "none.jsonl"), str(tmp_path / "out"), NULL))


def test_large_vocabularies_are_written_as_int32(tmp_path: Path) -> None:
    config = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=70000)
    (written,) = prepare(
        PrepareOptions(corpus(tmp_path, [{"text": "69999"}]), str(tmp_path / "out"), config, workers=1)
    )
    assert written.dtype == "int32"
    assert documents(written.prefix) == [[69999]]


def test_progress_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus(tmp_path, [{"text": str(i)} for i in range(9)])
    prepare(PrepareOptions(path, str(tmp_path / "out"), NULL, workers=1, log_interval=5))
    assert "9 documents (" in capsys.readouterr().err
