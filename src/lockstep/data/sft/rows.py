"""Rows of fine-tuning data: JSON lines, parquet files, and folders that Hugging Face datasets saved."""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import UserError, nearest

_JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_PARQUET = ".parquet"
_NAMES = {"train": ("train", "training"), "valid": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Names under which the splits of a data set are known."""


@dataclass(frozen=True)
class Row:
    """A row of a file, and where it stands: ``train.jsonl, line 3``."""

    place: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows that are read anew each time; ``files`` are what they are read from, ``name`` is for messages."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.read()

    def identity(self) -> dict[str, Any]:
        """Return a hash over the files, which does not depend on where they lie."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return {"files": [file.name for file in self.files], "sha256": digest.hexdigest()}


def open_rows(path: Path, split: str | None = None) -> Rows:
    """Return the rows of a file or folder; ``split`` picks one where a folder has several.

    Raises:
        UserError: there is no such path, it is of no known kind, or the folder has no such split.
    """
    if path.is_dir():
        return _open_folder(path, split)
    if not path.is_file():
        raise UserError(f"fine-tuning data {path}: no such file or folder; give the path of JSON lines or parquet")
    if split is not None:
        raise UserError(
            f"dataset.hf_dataset_split (--hf-dataset-split) = {split}: {path} is a file, not splits of data"
        )
    return _open_file(path)


def splits_of(path: Path) -> dict[str, str]:
    """Return the splits of a folder by what they are for: ``{"train": "train", "valid": "validation"}``."""
    names = [*_saved_splits(path), *_files_by_split(path)] if path.is_dir() else []
    return {use: name for use, known in _NAMES.items() for name in names if name in known}


def joined(parts: list[Rows]) -> Rows:
    """Return rows one after another."""
    if len(parts) == 1:
        return parts[0]
    files = tuple(file for part in parts for file in part.files)
    return Rows(", ".join(part.name for part in parts), files, lambda: (row for part in parts for row in part))


def _open_file(path: Path) -> Rows:
    if path.name.endswith(_JSON_LINES):
        return Rows(str(path), (path,), lambda: _json_lines(path))
    if path.suffix == _PARQUET:
        return Rows(str(path), (path,), lambda: _parquet_rows(path))
    raise UserError(f"fine-tuning data {path}: names of files end in {', '.join(_JSON_LINES)} or {_PARQUET}")


def _json_lines(path: Path) -> Iterator[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                place = f"{path}, line {number}"
                if line.strip():
                    yield Row(place, _object_of(line, place))
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file, after line {number}: {error}") from None


def _object_of(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{place}: not JSON ({error}); every line is one JSON object") from None
    if not isinstance(found, dict):
        raise UserError(f"{place}: expected a JSON object such as {{...}}, got {str(found)[:40]!r}; mend the line")
    return found


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow; install lockstep-lm[datasets], or give JSON lines") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for columns in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole parquet file, after row {number}: {error}") from None


def _open_folder(path: Path, split: str | None) -> Rows:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _open_saved(path, _chosen(path, _saved_splits(path), split))
    files = _files_by_split(path)
    if not files:
        raise UserError(
            f"fine-tuning data {path}: the folder has neither a data set that Hugging Face datasets saved "
            f"(save_to_disk) nor files that end in {', '.join(_JSON_LINES)} or {_PARQUET}"
        )
    chosen = _chosen(path, [name for name in files if name], split)
    return joined([_open_file(file) for file in files[chosen or ""]])


def _chosen(path: Path, names: list[str], split: str | None) -> str | None:
    """Return the split to read; None where the folder has one data set without splits."""
    if not names:
        if split is None:
            return None
        raise UserError(f"dataset.hf_dataset_split (--hf-dataset-split) = {split}: the data of {path} has no splits")
    wanted = split or next((name for name in names if name in _NAMES["train"]), None)
    if wanted in names:
        return wanted
    has = f"{path} has the splits {', '.join(names)}"
    if wanted is None:
        raise UserError(f"{has}; name one in dataset.hf_dataset_split (--hf-dataset-split)")
    raise UserError(f"{has}, and no {wanted}.{nearest(wanted, names)}")


def _saved_splits(path: Path) -> list[str]:
    listing = path / "dataset_dict.json"
    if not listing.is_file():
        return []
    try:
        return [str(name) for name in json.loads(listing.read_text(encoding="utf-8"))["splits"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{listing} is damaged ({error}); save the data set again") from None


def _open_saved(path: Path, split: str | None) -> Rows:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: data sets that Hugging Face datasets saved need that library; install lockstep-lm[datasets], "
            "or export JSON lines with its to_json"
        ) from None
    folder = path / split if split else path
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds for damaged folders
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder} cannot be read as a saved data set: {reason}") from None

    def read() -> Iterator[Row]:
        for number, columns in enumerate(found, start=1):
            yield Row(f"{folder}, row {number}", columns)

    files = sorted(file for file in folder.iterdir() if file.suffix in (".arrow", ".json"))
    return Rows(str(folder), tuple(files), read)


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder by the split that their name begins with; one that names none has ``""``."""
    found: dict[str, list[Path]] = {}
    known = {name for names in _NAMES.values() for name in names}
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return {}
    for file in sorted({*path.iterdir(), *path.glob("data/*")}):
        if file.is_file() and (file.name.endswith(_JSON_LINES[::2]) or file.suffix == _PARQUET):
            first = file.name.replace("-", ".").replace("_", ".").partition(".")[0].lower()
            found.setdefault(first if first in known else "", []).append(file)
    if len(found) > 1:
        found.pop("", None)
    return found
