"""JSON lines to token files: streaming, in parallel, byte for byte what Megatron-LM's preprocess_data.py writes."""

import glob
import gzip
import json
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lockstep.config.data import TokenizerConfig
from lockstep.data.indexed import IndexedDatasetWriter, WrittenFiles, optimal_dtype
from lockstep.data.progress import PrepareProgress
from lockstep.data.sidecar import Sidecar, write_sidecar
from lockstep.data.tokenizers import Tokenizer, build_tokenizer
from lockstep.errors import UserError

_CHUNK_BYTES = 1 << 18
_CHUNK_LINES = 256
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
    """The documents of a chunk for one key: all tokens, the lengths of sequences, and how many each document has."""

    tokens: np.ndarray
    lengths: list[int]
    sequences: list[int]


class Encoder:
    """Turns a chunk of JSON lines into tokens."""

    def __init__(self, tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool) -> None:
        self._tokenizer = tokenizer
        self._keys = tuple(json_keys)
        self._eod = [tokenizer.eod] if append_eod else []
        self._dtype = optimal_dtype(tokenizer.vocab_size)

    def encode(self, chunk: Chunk) -> list[Encoded]:
        """Return the documents of a chunk, an entry a key.

        Raises:
            UserError: a line is not a JSON object with the keys, or a text cannot be tokenized; names file and line.
        """
        ids: list[list[int]] = [[] for _ in self._keys]
        lengths: list[list[int]] = [[] for _ in self._keys]
        sequences: list[list[int]] = [[] for _ in self._keys]
        for number, line in enumerate(chunk.lines, chunk.first_line):
            place = f"{chunk.path}, line {number}"
            document = _parse(line, place)
            for k, key in enumerate(self._keys):
                texts = _texts(document, key, place)
                found = self._document(texts, place, ids[k])
                lengths[k].extend(found)
                sequences[k].append(len(found))
        arrays = [np.array(values, dtype=self._dtype) for values in ids]
        return [Encoded(*parts) for parts in zip(arrays, lengths, sequences, strict=True)]

    def _document(self, texts: list[str], place: str, ids: list[int]) -> list[int]:
        """Append the tokens of a document to ``ids`` and return the lengths of its sequences."""
        lengths = []
        for text in texts:
            try:
                tokens = self._tokenizer.tokenize(text)
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
            self._check_ids(tokens, place)
            if tokens:
                ids.extend(tokens)
                lengths.append(len(tokens))
        if lengths:
            ids.extend(self._eod)
            lengths[-1] += len(self._eod)
        return lengths

    def _check_ids(self, tokens: list[int], place: str) -> None:
        size = self._tokenizer.vocab_size
        if tokens and (min(tokens) < 0 or max(tokens) >= size):
            wrong = next(token for token in tokens if not 0 <= token < size)
            raise UserError(
                f"{place}: token id {wrong} is not in the vocabulary of {size} tokens; correct the text or --vocab-size"
            )


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
    """Yield the lines of all files in chunks; ``read_bytes`` counts bytes of the files as they lie on disk."""
    for path in paths:
        with path.open("rb") as raw:
            stream: BinaryIO = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]
            first, seen, lines, size = 1, 0, [], 0
            try:
                for line in stream:
                    lines.append(line)
                    size += len(line)
                    if size >= _CHUNK_BYTES or len(lines) >= _CHUNK_LINES:
                        at = raw.tell() if stream is not raw else seen + size
                        yield Chunk(str(path), first, lines, at - seen)
                        first, seen, lines, size = first + len(lines), at, [], 0
            except (gzip.BadGzipFile, EOFError) as error:
                raise UserError(f"{path} is not a whole gzip file: {error}") from None
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
        bounds = [0, *accumulate(encoded.sequences)]
        at = 0
        for first, last in pairwise(bounds):
            lengths = encoded.lengths[first:last]
            end = at + sum(lengths)
            writer = self._parts[self._next % len(self._parts)] if self._parts else self._writer
            writer.add_document(encoded.tokens[at:end], lengths)
            at = end
            self._next += 1

    def finalize(self) -> WrittenFiles:
        for part in self._parts:
            self._writer.extend(part)
            part.discard()
        return self._writer.finalize()


_worker_encoder: Encoder


def _start_worker(options: PrepareOptions) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    global _worker_encoder
    _worker_encoder = Encoder(build_tokenizer(options.tokenizer), options.json_keys, options.append_eod)


def _encode_in_worker(chunk: Chunk) -> list[Encoded]:
    return _worker_encoder.encode(chunk)


class _Encoding:
    """Encodes chunks in processes and gives results in the order of the chunks; with one worker, in this process."""

    def __init__(self, encoder: Encoder, options: PrepareOptions, workers: int) -> None:
        self._encoder = encoder
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # Forked workers have the libraries already; elsewhere than on Linux forking is not safe.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, (options,))

    def __enter__(self) -> "_Encoding":
        if self._pool is not None:
            self._pool.submit(os.getpid)  # start the processes now, before a progress bar starts its thread
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

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
