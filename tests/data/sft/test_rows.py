"""Reading: JSON lines, parquet, folders of Hugging Face; damaged files are named with the line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.data.sft.rows import joined, open_rows, splits_of
from lockstep.errors import UserError
from tests.data.sft.conftest import write_lines

ROWS = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]


def columns(path: Path, split: str | None = None) -> list[Any]:
    return [dict(row.columns) for row in open_rows(path, split)]


def test_json_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\n\n  \n" + json.dumps(ROWS[1]).encode())
    assert [row.place for row in open_rows(path)] == [f"{path}, line 1", f"{path}, line 4"]
    assert columns(path) == columns(path) == ROWS
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert columns(packed) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"x.jsonl, line 2: not JSON \(.*every line is one JSON object"),
        (b'{"a": 1}\n\n[1]\n', r"x.jsonl, line 3: expected a JSON object such as {...}, got '\[1\]'"),
        (b'{"a": "\xff"}\n', "x.jsonl, line 1: not JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(open_rows(path))


def test_a_cut_gzip_and_parquet_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-10])
    with pytest.raises(UserError, match=r"x.jsonl.gz is not a whole gzip file"):
        list(open_rows(path))
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(UserError, match=r"x.parquet is not a whole parquet file, after row 0"):
        list(open_rows(path))


def test_paths_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nothing.jsonl", "no such file or folder"),
        (tmp_path / "x.csv", "names of files end in .jsonl"),
        (tmp_path / "empty", "neither a data set that Hugging Face datasets saved"),
    ):
        with pytest.raises(UserError, match=message):
            open_rows(path)
    with pytest.raises(UserError, match="is a file, not splits of data"):
        open_rows(write_lines(tmp_path / "x.jsonl", ROWS), "train")


def test_saved_data_sets_are_read_split_by_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one, two = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    one.save_to_disk(tmp_path / "one")
    assert columns(tmp_path / "one") == ROWS
    assert [row.place for row in open_rows(tmp_path / "one")][1] == f"{tmp_path / 'one'}, row 2"
    assert splits_of(tmp_path / "one") == {}
    datasets.DatasetDict({"train": one, "validation": two}).save_to_disk(tmp_path / "both")
    assert columns(tmp_path / "both") == ROWS
    assert columns(tmp_path / "both", "validation") == ROWS[:1]
    assert splits_of(tmp_path / "both") == {"train": "train", "valid": "validation"}
    with pytest.raises(UserError, match=r"has the splits train, validation, and no valid\. Did you mean validation\?"):
        open_rows(tmp_path / "both", "valid")
    with pytest.raises(UserError, match=r"the data of .*one has no splits"):
        open_rows(tmp_path / "one", "train")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    with pytest.raises(UserError, match="one cannot be read as a saved data set"):
        open_rows(tmp_path / "one")


def test_folders_of_files_have_the_splits_of_their_names(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "data").mkdir()
    for number, row in enumerate(ROWS):
        parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "data" / f"train-0000{number}-of-00002.parquet")
    write_lines(tmp_path / "test.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("")
    assert splits_of(tmp_path) == {"train": "train", "test": "test"}
    assert columns(tmp_path) == ROWS
    assert columns(tmp_path, "test") == ROWS[:1]
    assert open_rows(tmp_path / "data" / "train-00001-of-00002.parquet").read().__next__().columns == ROWS[1]


def test_the_hash_is_that_of_the_files_in_their_order(tmp_path: Path) -> None:
    first, second = (open_rows(write_lines(tmp_path / f"{name}.jsonl", ROWS[i:])) for i, name in enumerate("ab"))
    both, turned = joined([first, second]), joined([second, first])
    assert [dict(row.columns) for row in both] == [*ROWS, ROWS[1]]
    hashes = {rows.identity()["sha256"] for rows in (first, second, both, turned)}
    assert len(hashes) == 4
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert open_rows(write_lines(moved / "a.jsonl", ROWS)).identity() == first.identity()
