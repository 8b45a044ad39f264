import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lockstep.data.indexed import DTYPES, IndexedDataset, IndexedDatasetWriter, optimal_dtype, sha256_file
from lockstep.errors import UserError
from tests.data.helpers import UINT16, flip, toy_documents, write_dataset


def test_toy_files_have_the_sizes_of_the_format(tmp_path: Path) -> None:
    written = write_dataset(tmp_path / "toy", toy_documents())
    assert (tmp_path / "toy.idx").stat().st_size == 442
    assert (tmp_path / "toy.bin").stat().st_size == 580
    assert (written.documents, written.sequences, written.tokens, written.dtype) == (20, 20, 290, "uint16")
    assert written.idx_sha256 == sha256_file(tmp_path / "toy.idx")
    assert written.bin_sha256 == sha256_file(tmp_path / "toy.bin")


def test_index_bytes_follow_the_layout(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", DTYPES[4]) as writer:
        writer.add_document([1, 2, 3], [2, 1])
        writer.add_document([], [])
        writer.add_document([9], [1])
        writer.finalize()
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 4)
    expected += struct.pack("<3i", 2, 1, 1) + struct.pack("<3q", 0, 8, 12) + struct.pack("<4q", 0, 2, 2, 3)
    assert (tmp_path / "d.idx").read_bytes() == expected
    assert (tmp_path / "d.bin").read_bytes() == struct.pack("<4i", 1, 2, 3, 9)


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [], [4, 5], [6, 7, 8, 9]]
    write_dataset(tmp_path / "d", documents)
    data = IndexedDataset(tmp_path / "d")
    assert [data.get(i).tolist() for i in range(len(data))] == documents
    assert data.get(3, 1).tolist() == [7, 8, 9]
    assert data.get(3, 1, 2).tolist() == [7, 8]
    assert data.num_documents == 4
    assert data.locate(4) == (2, 1)
    assert data.dtype == UINT16


def test_a_file_without_tokens_can_be_read(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [[], []])
    data = IndexedDataset(tmp_path / "d")
    assert data.num_tokens == 0
    assert data.get(1).tolist() == []


def test_multimodal_index_is_read_without_its_modes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [[1, 2], [3]])
    flip(tmp_path / "d.idx", lambda raw: raw.extend(b"\x00\x01"))
    assert IndexedDataset(tmp_path / "d").get(1).tolist() == [3]


@pytest.mark.parametrize(("vocab_size", "name"), [(65499, "uint16"), (65500, "int32"), (None, "int32")])
def test_optimal_dtype(vocab_size: int | None, name: str) -> None:
    assert optimal_dtype(vocab_size).name == name


def test_extend_joins_writers(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", UINT16) as a, IndexedDatasetWriter(tmp_path / "b", UINT16) as b:
        a.add_document([1, 2], [1, 1])
        b.add_document([3])
        b.add_document([4, 5])
        a.extend(b)
        joined = a.finalize()
    with IndexedDatasetWriter(tmp_path / "c", UINT16) as c:
        c.add_document([1, 2], [1, 1])
        c.add_document([3])
        c.add_document([4, 5])
        direct = c.finalize()
    assert (joined.bin_sha256, joined.idx_sha256) == (direct.bin_sha256, direct.idx_sha256)
    assert joined.tokens == 5


def test_nothing_is_left_behind_when_writing_stops_early(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", UINT16) as writer:
        writer.add_document([1])
    assert list(tmp_path.iterdir()) == []


def _set(offset: int, value: bytes) -> Callable[[bytearray], object]:
    return lambda raw: raw.__setitem__(slice(offset, offset + len(value)), value)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("idx", _set(0, b"X"), "not a Megatron-LM index"),
        ("idx", lambda raw: raw.clear(), "not a Megatron-LM index"),
        ("idx", _set(9, struct.pack("<Q", 2)), "has version 2; only version 1"),
        ("idx", _set(17, b"\x09"), "unknown dtype code 9"),
        ("idx", _set(17, b"\x07"), "holds float32 values, not token ids"),
        ("idx", _set(17, b"\x04"), "pointer of sequence 1 is 10"),
        ("idx", lambda raw: raw.__delitem__(slice(-1, None)), "truncated: 441 bytes, its header announces 442"),
        ("idx", lambda raw: raw.__delitem__(slice(20, None)), "truncated: 20 bytes, the header alone has 34"),
        ("idx", lambda raw: raw.extend(b"abc"), "has 445 bytes, its header announces 442"),
        ("idx", _set(34, struct.pack("<i", -3)), "sequence 0 has a negative length"),
        ("idx", _set(34, struct.pack("<i", 6)), "pointer of sequence 1"),
        ("idx", _set(442 - 8, struct.pack("<q", 19)), "document bounds do not run from 0 to 20"),
        ("bin", lambda raw: raw.__delitem__(slice(-2, None)), "truncated: 578 bytes, the .idx announces 580"),
        ("bin", lambda raw: raw.extend(b"ab"), "does not fit its index: 582 bytes"),
    ],
)
def test_damage_is_one_message_with_path_and_remedy(
    tmp_path: Path, suffix: str, change: Callable[[bytearray], object], message: str
) -> None:
    write_dataset(tmp_path / "toy", toy_documents())
    path = tmp_path / f"toy.{suffix}"
    flip(path, change)
    with pytest.raises(UserError) as caught:
        IndexedDataset(tmp_path / "toy")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "prepare the data" in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.idx does not exist; give the prefix of a \.bin/\.idx pair"):
        IndexedDataset(tmp_path / "none")
    write_dataset(tmp_path / "d", [[1]])
    with pytest.raises(UserError, match=r"give the prefix without its suffix: .*/d$"):
        IndexedDataset(tmp_path / "d.bin")
    (tmp_path / "d.bin").unlink()
    with pytest.raises(UserError, match=r"d\.bin does not exist"):
        IndexedDataset(tmp_path / "d")


def test_ids_that_do_not_fit_are_not_wrapped(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", UINT16) as writer, pytest.raises(OverflowError):
        writer.add_document(np.array([1, 70000]).tolist())
