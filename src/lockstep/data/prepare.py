"""JSON lines to token files: streaming, in parallel, byte for byte what Megatron-LM's preprocess_data.py writes."""

import glob
import gzip
import json
import multiprocessing
import os
import signal
import sys
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lockstep.config.data import TokenizerConfig
from lockstep.data.encoding import text_encoder
from lockstep.data.indexed import IndexedDatasetWriter, WrittenFiles, optimal_dtype
from lockstep.data.progress import PrepareProgress
from lockstep.data.sidecar import Sidecar, write_sidecar
from lockstep.data.tokenizers import Tokenizer, build_tokenizer
from lockstep.errors import UserError

_CHUNK_BYTES = 1 << 17
_CHUNK_LINES = 1024
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_CHUNKS_IN_FLIGHT = 4  # a worker; bounds memory while keeping workers busy


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare and how.

    Attributes:
        input: JSON lines file, plain or .gz; a glob pattern for several, which are read in sorted order.
        output_prefix: files are named ``<output_prefix>_<key>_document.bin`` and ``.idx``.
        tokenizer: the tokenizer's config.
        json_keys: text fields; each becomes a pair of files.
        append_eod: end every document that has tokens with the end-of-document id.
        workers: processes; all cores when None. The files do not depend on it.
        partitions: documents are dealt out to so many parts, which are joined one after another.
        keep_sequential_samples: parts are stretches of the input, so that the order of documents stays.
        log_interval: documents between two progress lines where there is no terminal.
    """

    input: str
    output_prefix: str
    tokenizer: TokenizerConfig
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    workers: int | None = None
    partitions: int = 1
    keep_sequential_samples: bool = False
    log_interval: int = 1000


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of a file; ``first_line`` counts from 1."""

    path: str
    first_line: int
    lines: list[bytes]
    read_bytes: int


@dataclass(frozen=True)
class Encoded:
    """The documents of a chunk for one key.

    Attributes:
        tokens: all tokens, as the file holds them.
        lengths: tokens of each sequence.
        sequences: how many sequences each document has.
    """

    tokens: bytes
    lengths: list[int]
    sequences: list[int]


class Encoder:
    """Turns a chunk of JSON lines into tokens."""

    def __init__(self, tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool) -> None:
        self._keys = tuple(json_keys)
        self._dtype = optimal_dtype(tokenizer.vocab_size)
        self._eod = np.array([tokenizer.eod], self._dtype).tobytes() if append_eod else b""
        self._texts = text_encoder(tokenizer, self._dtype)

    def encode(self, chunk: Chunk) -> list[Encoded]:
        """Return the documents of a chunk, an entry a key.

        Raises:
            UserError: a line is not a JSON object with the keys, or a text cannot be tokenized; names file and line.
        """
        documents: list[list[list[str]]] = []  # of each line, the texts of each key
        failure = None
        for number, line in enumerate(chunk.lines, chunk.first_line):
            place = f"{chunk.path}, line {number}"
            try:
                document = _parse(line, place)
                documents.append([_texts(document, key, place) for key in self._keys])
            except UserError as error:
                failure = error
                break
        ids = self._encode_texts(documents, chunk)
        if failure is not None:
            raise failure
        return [self._collect(documents, k, ids[k]) for k in range(len(self._keys))]

    def _encode_texts(self, documents: list[list[list[str]]], chunk: Chunk) -> list[list[bytes]]:
        """Return the ids of all texts of each key; an error is that of the first line that has one."""
        try:
            return [
                self._texts.encode([text for texts in documents for text in texts[k]]) for k in range(len(self._keys))
            ]
        except (UserError, TypeError):
            for number, texts in enumerate(documents, chunk.first_line):
                for text in chain.from_iterable(texts):
                    self._encode_one(text, f"{chunk.path}, line {number}")
            raise

    def _encode_one(self, text: str, place: str) -> None:
        try:
            self._texts.encode([text])
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        except TypeError as error:
            raise UserError(f"{place}: the text cannot be tokenized ({error}); is a surrogate alone in it?") from None

    def _collect(self, documents: list[list[list[str]]], k: int, ids: list[bytes]) -> Encoded:
        """Join the ids of texts to documents; texts without a token are no sequences."""
        tokens: list[bytes] = []
        lengths: list[int] = []
        sequences: list[int] = []
        size, eod = self._dtype.itemsize, self._eod
        at = 0
        for texts in documents:
            found = [each for each in ids[at : at + len(texts[k])] if each]
            at += len(texts[k])
            sequences.append(len(found))
            if found:
                found[-1] += eod
                tokens += found
                lengths += [len(each) // size for each in found]
        return Encoded(b"".join(tokens), lengths, sequences)


def _parse(line: bytes, place: str) -> dict[str, Any]:
    if not line.strip():
        raise UserError(f"{place} is blank; every line must be a JSON object, remove it")
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place} is not JSON: {error.msg} at column {error.colno}; correct or remove the line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise UserError(f"{place} cannot be read as JSON ({error}); correct or remove the line") from None
    if not isinstance(document, dict):
        raise UserError(f"{place}: expected a JSON object, got {type(document).__name__}; correct or remove the line")
    return document


def _texts(document: dict[str, Any], key: str, place: str) -> list[str]:
    if key not in document:
        keys = ", ".join(document) or "no keys"
        raise UserError(f"{place} has no key {key!r} (it has {keys}); choose with --json-keys")
    value = document[key]
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{place}: {key!r} must be a text or a list of texts, got {type(text).__name__}")
    return texts


def prepare(options: PrepareOptions) -> list[WrittenFiles]:
    """Tokenize JSON lines into token files and return what was written, an entry a key.

    The files appear under their names only when they are whole. Beside each pair a ``.lockstep.json`` records the
    tokenizer and the hashes, for ``verify``.

    Raises:
        UserError: unusable input or options; names the file and line.
    """
    paths = _input_paths(options.input)
    workers = _num_workers(options)
    tokenizer = build_tokenizer(options.tokenizer)
    encoder = Encoder(tokenizer, options.json_keys, options.append_eod)
    dtype = optimal_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        outputs = [
            _Output(f"{options.output_prefix}_{key}_document", dtype, options, stack) for key in options.json_keys
        ]
        results = stack.enter_context(_Encoding(encoder, options, workers))
        progress = stack.enter_context(PrepareProgress(sum(p.stat().st_size for p in paths), options.log_interval))
        for chunk, encoded in results.ordered(_read_chunks(paths)):
            for output, documents in zip(outputs, encoded, strict=True):
                output.add(documents)
            progress.advance(len(chunk.lines), chunk.read_bytes)
        for output, key in zip(outputs, options.json_keys, strict=True):
            if not output.num_tokens:
                raise UserError(f"{options.input} is empty: no document has a token under key {key!r}")
        written = [output.finalize() for output in outputs]
    for files in written:
        write_sidecar(Sidecar(tokenizer=tokenizer.identity(), append_eod=options.append_eod, files=asdict(files)))
    return written


def _input_paths(pattern: str) -> list[Path]:
    paths = [Path(pattern)] if Path(pattern).is_file() else [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise UserError(f"input {pattern} does not exist; give a JSON lines file")
    for path in paths:
        if not path.is_file():
            raise UserError(f"input {path} is not a file; give a JSON lines file")
    return paths


def _num_workers(options: PrepareOptions) -> int:
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if options.workers is not None:
        workers = options.workers
        if options.partitions > 0 and workers % options.partitions:
            raise UserError(f"--workers {workers} is not divisible by --partitions {options.partitions}")
    for flag, value in (("--workers", workers), ("--partitions", options.partitions)):
        if value < 1:
            raise UserError(f"{flag} {value} is not above 0")
    if options.log_interval < 1:
        raise UserError(f"--log-interval {options.log_interval} is not above 0")
    return workers


def _read_chunks(paths: list[Path]) -> Iterator[Chunk]:
    """Yield the lines of all files in chunks.

    Raises:
        UserError: a file cannot be read.
    """
    for path in paths:
        try:
            yield from _chunks_of(path)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path} is not a whole gzip file: {error}") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None


def _chunks_of(path: Path) -> Iterator[Chunk]:
    """Yield the lines of a file in chunks; ``read_bytes`` counts bytes of the file as it lies on disk."""
    with path.open("rb") as raw:
        stream: BinaryIO = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]
        first, seen, lines, size = 1, 0, [], 0
        for line in stream:
            lines.append(line)
            size += len(line)
            if size >= _CHUNK_BYTES or len(lines) >= _CHUNK_LINES:
                at = raw.tell() if stream is not raw else seen + size
                yield Chunk(str(path), first, lines, at - seen)
                first, seen, lines, size = first + len(lines), at, [], 0
        if lines:
            yield Chunk(str(path), first, lines, path.stat().st_size - seen)


class _Output:
    """The files of one key, with a writer for each partition where documents are dealt out."""

    def __init__(self, prefix: str, dtype: np.dtype, options: PrepareOptions, stack: ExitStack) -> None:
        self._writer = stack.enter_context(IndexedDatasetWriter(prefix, dtype))
        dealt = options.partitions > 1 and not options.keep_sequential_samples
        names = [f"{prefix}.part{i}" for i in range(options.partitions)] if dealt else []
        self._parts = [stack.enter_context(IndexedDatasetWriter(name, dtype)) for name in names]
        self._next = 0

    @property
    def num_tokens(self) -> int:
        return sum(writer.num_tokens for writer in (self._writer, *self._parts))

    def add(self, encoded: Encoded) -> None:
        if not self._parts:
            self._writer.add_documents(encoded.tokens, encoded.lengths, encoded.sequences)
            return
        size, at = self._writer.dtype.itemsize, 0
        for first, last in pairwise(accumulate(encoded.sequences, initial=0)):
            lengths = encoded.lengths[first:last]
            end = at + size * sum(lengths)
            part = self._parts[self._next % len(self._parts)]
            part.add_documents(encoded.tokens[at:end], lengths, [len(lengths)])
            at = end
            self._next += 1

    def finalize(self) -> WrittenFiles:
        for part in self._parts:
            self._writer.extend(part)
            part.discard()
        return self._writer.finalize()


_worker_encoder: Encoder


def _start_worker(inherited: Encoder | None, options: PrepareOptions) -> None:
    global _worker_encoder
    _worker_encoder = inherited or Encoder(build_tokenizer(options.tokenizer), options.json_keys, options.append_eod)


def _encode_in_worker(chunk: Chunk) -> list[Encoded]:
    return _worker_encoder.encode(chunk)


class _Encoding:
    """Encodes chunks in processes and gives results in the order of the chunks; with one worker, in this process."""

    def __init__(self, encoder: Encoder, options: PrepareOptions, workers: int) -> None:
        self._encoder = encoder
        self._workers = workers
        self._parallel: str | None = None
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # Forked workers have the libraries already; elsewhere than on Linux forking is not safe.
            forks = sys.platform == "linux"
            context = multiprocessing.get_context("fork" if forks else "spawn")
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder if forks else None, options))

    def __enter__(self) -> "_Encoding":
        # A worker is one process on one core: the library would start threads for all of them.
        self._parallel = os.environ.get(_PARALLELISM)
        os.environ[_PARALLELISM] = "false"
        if self._pool is not None:
            # Ctrl-C reaches all processes of a terminal: workers end their chunk, this one says what happened.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            self._pool.submit(os.getpid)  # start the processes now, before a progress bar starts its thread
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        del os.environ[_PARALLELISM]
        if self._parallel is not None:
            os.environ[_PARALLELISM] = self._parallel

    def ordered(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[Encoded]]]:
        """Yield each chunk with its documents; at most a few chunks a worker are held at a time."""
        if self._pool is None:
            for chunk in chunks:
                yield chunk, self._encoder.encode(chunk)
            return
        try:
            yield from self._through_pool(self._pool, chunks)
        except BrokenProcessPool:
            raise UserError("a worker process died, perhaps for lack of memory; use fewer --workers") from None

    def _through_pool(
        self, pool: ProcessPoolExecutor, chunks: Iterator[Chunk]
    ) -> Iterator[tuple[Chunk, list[Encoded]]]:
        pending: deque[tuple[Chunk, Future[list[Encoded]]]] = deque()
        for chunk in chunks:
            pending.append((chunk, pool.submit(_encode_in_worker, chunk)))
            if len(pending) >= self._workers * _CHUNKS_IN_FLIGHT:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
