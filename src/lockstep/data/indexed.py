"""Token files in Megatron-LM's format: ``<prefix>.bin`` holds the tokens, ``<prefix>.idx`` says where sequences lie.

The ``.idx`` is little endian: magic, version, dtype code, number of sequences, number of document bounds, sequence
lengths (int32), byte offsets of the sequences in ``.bin`` (int64), document bounds as sequence numbers (int64).
"""

import contextlib
import hashlib
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lockstep.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
"""Element types by the code that the index stores."""

_HEADER = struct.Struct("<9sQBQQ")
_UINT16_BELOW_VOCAB_SIZE = 65500
_COPY_BYTES = 1 << 20
_MODE_BYTES = 1  # multimodal files end with one more int8 a sequence, which GPT data does not use


def optimal_dtype(vocab_size: int | None) -> np.dtype:
    """Return the element type Megatron-LM writes for a vocabulary: uint16 below 65,500 tokens, else int32."""
    small = vocab_size is not None and vocab_size < _UINT16_BELOW_VOCAB_SIZE
    return DTYPES[8] if small else DTYPES[4]


def dtype_code(dtype: np.dtype) -> int:
    """Return the code of an element type."""
    return next(code for code, known in DTYPES.items() if known == dtype)


def bin_path(prefix: str | Path) -> Path:
    """Return the path of the tokens of a prefix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of the index of a prefix."""
    return Path(f"{prefix}.idx")


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class _Index:
    dtype: np.dtype
    lengths: np.ndarray  # int32 [sequences]
    pointers: np.ndarray  # int64 [sequences], bytes
    document_bounds: np.ndarray  # int64 [documents + 1], sequence numbers


class IndexedDataset:
    """Read-only, memory-mapped view of a pair of token files.

    Attributes:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: element type of the tokens.
        sequence_lengths: int32 [sequences], in tokens.
        document_bounds: int64 [documents + 1]; document d is sequences ``[bounds[d], bounds[d + 1])``.

    Raises:
        UserError: a file is missing, truncated or does not fit the other; names the path and the remedy.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        _check_present(self.prefix)
        index = _read_index(idx_path(prefix))
        _check_bin(bin_path(prefix), index)
        self.dtype = index.dtype
        self.sequence_lengths = index.lengths
        self.document_bounds = index.document_bounds
        self._starts = index.pointers // index.dtype.itemsize
        self.tokens = _map_tokens(bin_path(prefix), index.dtype)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents, which may hold several sequences each."""
        return len(self.document_bounds) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all sequences."""
        return len(self.tokens)

    @cached_property
    def index_sha256(self) -> str:
        """Hash of the ``.idx`` file."""
        return sha256_file(idx_path(self.prefix))

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return tokens of a sequence from ``offset``, all that follow or ``length`` of them, in the file's dtype."""
        start = int(self._starts[sequence])
        end = start + int(self.sequence_lengths[sequence]) if length is None else start + offset + length
        return self.tokens[start + offset : end]

    @property
    def name(self) -> str:
        """How messages call the data: its prefix."""
        return self.prefix

    def identity(self) -> dict[str, Any]:
        """Return what tells this data from other data, for caches and run records."""
        return {
            "prefix": os.path.abspath(self.prefix),
            "idx_sha256": self.index_sha256,
            "bin_bytes": self.num_tokens * self.dtype.itemsize,
            "documents": self.num_documents,
            "sequences": len(self),
            "tokens": self.num_tokens,
            "dtype": self.dtype.name,
        }

    def locate(self, position: int) -> tuple[int, int]:
        """Return the sequence that holds a token and its offset there; ``position`` counts tokens from the start."""
        sequence = int(np.searchsorted(self._starts, position, side="right")) - 1
        return sequence, position - int(self._starts[sequence])


def _check_present(prefix: str) -> None:
    for path in (idx_path(prefix), bin_path(prefix)):
        if path.is_file():
            continue
        stem, _, suffix = prefix.rpartition(".")
        if suffix in ("bin", "idx") and idx_path(stem).is_file():
            raise UserError(f"data file {path} does not exist; give the prefix without its suffix: {stem}")
        raise UserError(
            f"data file {path} does not exist; give the prefix of a .bin/.idx pair (lockstep data prepare writes one)"
        )


def _read_index(path: Path) -> _Index:
    remedy = "prepare the data again or copy the whole file"
    size = path.stat().st_size
    raw = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    header = raw[: _HEADER.size].tobytes()
    if header[: len(MAGIC)] != MAGIC[:size] or not size:
        raise UserError(
            f"{path} is not a Megatron-LM index: it does not start with {MAGIC.rstrip(bytes(1))!r}; {remedy}"
        )
    if size < _HEADER.size:
        raise UserError(f"{path} is truncated: {size} bytes, the header alone has {_HEADER.size}; {remedy}")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{path} has version {version}; only version {VERSION} can be read: {remedy}")
    if code not in DTYPES:
        raise UserError(f"{path} has unknown dtype code {code}; known are 1 to 8: {remedy}")
    if DTYPES[code].kind == "f":
        raise UserError(f"{path} holds {DTYPES[code].name} values, not token ids; prepare the data with a tokenizer")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if size < expected:
        raise UserError(f"{path} is truncated: {size} bytes, its header announces {expected}; {remedy}")
    if size not in (expected, expected + _MODE_BYTES * num_sequences):
        raise UserError(f"{path} has {size} bytes, its header announces {expected}; {remedy}")
    at = _HEADER.size
    lengths = np.frombuffer(raw, "<i4", num_sequences, at)
    pointers = np.frombuffer(raw, "<i8", num_sequences, at + 4 * num_sequences)
    bounds = np.frombuffer(raw, "<i8", num_bounds, at + 12 * num_sequences)
    index = _Index(DTYPES[code], lengths, pointers, bounds)
    _check_index(path, index, remedy)
    return index


def _check_index(path: Path, index: _Index, remedy: str) -> None:
    if len(index.lengths) and int(index.lengths.min()) < 0:
        raise UserError(f"{path} is corrupt: sequence {int(index.lengths.argmin())} has a negative length; {remedy}")
    ends = np.cumsum(index.lengths, dtype=np.int64) * index.dtype.itemsize
    wrong = np.flatnonzero(index.pointers != ends - index.lengths.astype(np.int64) * index.dtype.itemsize)
    if len(wrong):
        raise UserError(
            f"{path} is corrupt: the pointer of sequence {int(wrong[0])} is {int(index.pointers[wrong[0]])}, which "
            f"does not follow from the lengths before it in {index.dtype.name}; {remedy}"
        )
    bounds = index.document_bounds
    good = (
        len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == len(index.lengths) and bool((np.diff(bounds) >= 0).all())
    )
    if not good:
        raise UserError(f"{path} is corrupt: its document bounds do not run from 0 to {len(index.lengths)}; {remedy}")


def _check_bin(path: Path, index: _Index) -> None:
    announced = int(index.lengths.sum(dtype=np.int64)) * index.dtype.itemsize
    found = path.stat().st_size
    if found != announced:
        state = "is truncated" if found < announced else "does not fit its index"
        raise UserError(
            f"{path} {state}: {found} bytes, the .idx announces {announced} ({index.dtype.name}); "
            "prepare the data again or copy both files"
        )


def _map_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


@dataclass(frozen=True)
class WrittenFiles:
    """What a writer wrote: counts, element type and hashes of both files."""

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    bin_sha256: str
    idx_sha256: str


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses, a full disk for one, into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room there or name another place") from None


class IndexedDatasetWriter:
    """Streaming writer of a pair of token files; nothing appears under the final names before ``finalize``.

    Memory grows by 12 bytes a document. As a context manager it removes its temporary files when left early.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = str(prefix)
        self.dtype = dtype
        self.num_tokens = 0
        self._lengths = array("i")
        self._bounds = array("q", [0])
        self._hash = hashlib.sha256()
        self._temporary = {path: Path(f"{path}.{os.getpid()}.tmp") for path in (bin_path(prefix), idx_path(prefix))}
        with writing(bin_path(prefix)):
            bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._temporary[bin_path(prefix)].open("w+b")

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    @property
    def num_documents(self) -> int:
        """Number of documents added so far."""
        return len(self._bounds) - 1

    def add_document(self, tokens: np.ndarray | Sequence[int], lengths: Sequence[int] | None = None) -> None:
        """Add one document: its tokens and the lengths of its sequences (one sequence of all tokens when None)."""
        values = np.asarray(tokens, dtype=self.dtype)
        self._write(values.tobytes())
        self.num_tokens += len(values)
        self._lengths.extend([len(values)] if lengths is None else lengths)
        self._bounds.append(len(self._lengths))

    def add_documents(self, tokens: bytes, lengths: Sequence[int], sequences: Sequence[int]) -> None:
        """Add documents: their tokens as the file holds them, the lengths of all sequences, and how many each has."""
        self._write(tokens)
        self.num_tokens += len(tokens) // self.dtype.itemsize
        first = len(self._lengths)
        self._lengths.extend(lengths)
        self._bounds.extend(islice(accumulate(sequences, initial=first), 1, None))

    def extend(self, other: "IndexedDatasetWriter") -> None:
        """Add all documents of another unfinished writer of the same dtype."""
        offset = len(self._lengths)
        self._lengths.extend(other._lengths)
        self._bounds.extend(array("q", (np.frombuffer(other._bounds, np.int64)[1:] + offset).tolist()))
        self.num_tokens += other.num_tokens
        with writing(bin_path(other.prefix)):
            other._bin.seek(0)
        while block := other._bin.read(_COPY_BYTES):
            self._write(block)

    def finalize(self) -> WrittenFiles:
        """Write the index and move both files to their final names."""
        with writing(bin_path(self.prefix)):
            self._bin.close()
        with writing(idx_path(self.prefix)):
            idx_hash = self._write_index(self._temporary[idx_path(self.prefix)])
        for path, temporary in self._temporary.items():
            with writing(path):
                os.replace(temporary, path)
        return WrittenFiles(
            self.prefix,
            self.dtype.name,
            self.num_documents,
            len(self._lengths),
            self.num_tokens,
            self._hash.hexdigest(),
            idx_hash,
        )

    def discard(self) -> None:
        """Remove the temporary files; does nothing after ``finalize``."""
        with contextlib.suppress(OSError):  # a full disk has no place for what is still buffered
            self._bin.close()
        for temporary in self._temporary.values():
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()

    def _write(self, data: bytes) -> None:
        with writing(bin_path(self.prefix)):
            self._bin.write(data)
        self._hash.update(data)

    def _write_index(self, path: Path) -> str:
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        pointers = (ends - lengths) * self.dtype.itemsize
        bounds = np.frombuffer(self._bounds, np.int64)
        header = _HEADER.pack(MAGIC, VERSION, dtype_code(self.dtype), len(lengths), len(bounds))
        with path.open("wb") as stream:
            stream.write(header)
            for values, kind in ((lengths, "<i4"), (pointers, "<i8"), (bounds, "<i8")):
                stream.write(values.astype(kind, copy=False).tobytes())
        return sha256_file(path)
