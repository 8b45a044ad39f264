"""The probe file: tensors and numbers of one iteration, written by every process, put together by the reader.

A folder holds for each process and pass ``<pass>-<rank>.safetensors`` and ``<pass>-<rank>.json``. The index is

    {"schema": 1, "rank": 0, "processes": 2, "facts": {...},
     "numbers": [{"iteration", "stage", "name", "value"}, ...],
     "tensors": [{"key", "iteration", "stage", "name", "shape", "offsets", "term", "micro_batch"}, ...]}

Every stored tensor is a box of a logical tensor, which has the same name and shape in every layout: ``offsets`` is the
place of its first element in it. A part that tensor parallelism split, a part of the sequence, the micro-batches of a
data-parallel process and an optimizer's share are all boxes. Boxes at the same place are copies, and have to be equal.
``term`` names the summands of a tensor that is a sum over processes: boxes of different terms add up. ``micro_batch``
is a number of the global batch, or null. ``facts`` are anything in JSON. Any program may write the format.
"""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lockstep.errors import UserError
from lockstep.record.schema import decode_number, encode

SCHEMA = 1
"""Of this format, its names, and the job that asks for it; another commit runs a side only where its line is equal."""

Shape = tuple[int, ...]


class ProbeWriter:
    """Collects what one process saw in one pass and writes it in one go."""

    def __init__(self, rank: int = 0, processes: int = 1) -> None:
        self._head: dict[str, Any] = {"schema": SCHEMA, "rank": rank, "processes": processes}
        self.facts: dict[str, Any] = {}
        self._numbers: list[dict[str, Any]] = []
        self._entries: list[dict[str, Any]] = []
        self._tensors: dict[str, torch.Tensor] = {}

    def number(self, iteration: int, stage: str, name: str, value: float | int | None) -> None:
        """Add a number that every process which tells it has alike."""
        if value is not None:
            self._numbers.append({"iteration": iteration, "stage": stage, "name": name, "value": value})

    def tensor(
        self,
        iteration: int,
        stage: str,
        name: str,
        box: torch.Tensor,
        *,
        shape: Shape | None = None,
        offsets: Shape | None = None,
        term: str = "",
        micro_batch: int | None = None,
    ) -> None:
        """Add a box of a logical tensor of ``shape``; without a place it is the whole."""
        key = f"{len(self._entries)}"
        self._tensors[key] = box.detach().to("cpu", copy=True).contiguous()
        place = {"shape": list(shape or box.shape), "offsets": list(offsets or (0,) * box.dim())}
        entry = {"key": key, "iteration": iteration, "stage": stage, "name": name}
        self._entries.append(entry | place | {"term": term, "micro_batch": micro_batch})

    def write(self, folder: Path, kind: str) -> None:
        """Write the files of this process."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{kind}-{self._head['rank']}"
        save_file(self._tensors, folder / f"{stem}.safetensors")
        index = {**self._head, "facts": self.facts, "numbers": self._numbers, "tensors": self._entries}
        (folder / f"{stem}.json").write_text(json.dumps(encode(index), allow_nan=False), encoding="utf-8")


@dataclass(frozen=True)
class Box:
    """A stored tensor with its place, and the process and micro-batch it comes from."""

    tensor: torch.Tensor
    offsets: Shape
    term: str
    rank: int
    micro_batch: int | None

    @property
    def place(self) -> tuple[slice, ...]:
        """The elements of the logical tensor that it holds."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.tensor.shape, strict=True))


@dataclass(frozen=True)
class Copies:
    """Two processes that should have the same and have not: by how much they differ at most, where, and both values."""

    ranks: tuple[int, int]
    apart: float
    index: tuple[int, ...] = ()
    values: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Logical:
    """A tensor put together from its boxes.

    Attributes:
        whole: its values in float64, or int64 where it is of integers.
        dtype: of the boxes.
        boxes: where it comes from.
        covered: whether the boxes cover it.
        copies: copies that differ.
    """

    whole: torch.Tensor
    dtype: str
    boxes: tuple[Box, ...]
    covered: bool
    copies: tuple[Copies, ...] = ()


@dataclass(frozen=True)
class Probes:
    """What all processes of one pass of a run saw."""

    folder: Path
    facts: dict[str, Any]
    numbers: dict[tuple[int, str, str], list[tuple[int, float]]]
    entries: dict[tuple[int, str, str], list[dict[str, Any]]]
    files: dict[int, Path] = field(default_factory=dict)

    def names(self, iteration: int, stage: str) -> list[str]:
        """Return the tensors of a stage, in the order in which they were first written."""
        return [name for i, s, name in self.entries if (i, s) == (iteration, stage)]

    def number_names(self, iteration: int, stage: str) -> list[str]:
        """Return the numbers of a stage."""
        return [name for i, s, name in self.numbers if (i, s) == (iteration, stage)]

    def number(self, iteration: int, stage: str, name: str) -> float | None:
        """Return a number as the first process that tells it does, or None."""
        found = self.numbers.get((iteration, stage, name))
        return found[0][1] if found else None

    def torn(self, iteration: int, stage: str, name: str) -> Copies | None:
        """Return two processes that tell another number, or None."""
        found = self.numbers.get((iteration, stage, name)) or []
        for rank, value in found[1:]:
            if value != found[0][1]:
                return Copies((found[0][0], rank), abs(value - found[0][1]), values=(found[0][1], value))
        return None

    def logical(self, iteration: int, stage: str, name: str) -> Logical | None:
        """Return a tensor put together, or None where no process has written it."""
        entries = self.entries.get((iteration, stage, name))
        return _joined(tuple(entries[0]["shape"]), list(self._boxes(entries))) if entries else None

    def _boxes(self, entries: list[dict[str, Any]]) -> Iterator[Box]:
        with ExitStack() as stack:
            opened: dict[int, Any] = {}
            for entry in entries:
                rank = entry["rank"]
                if rank not in opened:
                    opened[rank] = stack.enter_context(safe_open(self.files[rank], framework="pt"))
                tensor = opened[rank].get_tensor(entry["key"])
                yield Box(tensor, tuple(entry["offsets"]), entry["term"], rank, entry["micro_batch"])


def load_probes(folder: Path, kind: str) -> Probes:
    """Read the probes of one pass.

    Raises:
        UserError: there are none, some processes' are missing, or a file is damaged.
    """
    numbers: dict[tuple[int, str, str], list[tuple[int, float]]] = {}
    entries: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    facts: dict[str, Any] = {}
    files: dict[int, Path] = {}
    processes = 0
    for path in sorted(folder.glob(f"{kind}-*.json")):
        index = _read(path)
        rank, processes = index["rank"], index["processes"]
        facts = index["facts"] if rank == 0 else facts
        files[rank] = path.with_suffix(".safetensors")
        for each in index["numbers"]:
            key = (each["iteration"], each["stage"], each["name"])
            numbers.setdefault(key, []).append((rank, decode_number(each["value"])))
        for each in index["tensors"]:
            key = (each["iteration"], each["stage"], each["name"])
            entries.setdefault(key, []).append(each | {"rank": rank})
    if len(files) != max(processes, 1):
        raise UserError(f"{folder} holds probes ({kind}) of {len(files)} of {processes or 'no'} processes; run again")
    return Probes(folder, facts, numbers, entries, files)


def _read(path: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if index["schema"] != SCHEMA:
            raise UserError(f"{path} has schema {index['schema']}, this Lockstep reads {SCHEMA}")
        with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
            missing = {each["key"] for each in index["tensors"]} - set(file.keys())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no index of probes, or damaged ({error}); run again") from None
    if missing:
        raise UserError(f"{path} names tensors that its file lacks; run again")
    return index


def _joined(shape: Shape, boxes: list[Box]) -> Logical:
    terms: dict[str, list[Box]] = {}
    for box in boxes:
        terms.setdefault(box.term, []).append(box)
    kind = torch.float64 if boxes[0].tensor.is_floating_point() else torch.int64
    total = torch.zeros(shape, dtype=kind)
    covered, copies = True, []
    for mine in terms.values():
        whole, owner = torch.zeros(shape, dtype=kind), torch.full(shape, -1, dtype=torch.int32)
        for box in mine:
            there = owner[box.place] >= 0
            if bool(there.any()):
                apart = (whole[box.place] - box.tensor.to(kind)).abs().where(there, 0)
                if bool((apart != 0).any()):
                    copies.append(_copies(box, whole[box.place], owner[box.place], apart.double()))
                continue
            whole[box.place] = box.tensor.to(kind)
            owner[box.place] = box.rank
        covered = covered and bool((owner >= 0).all())
        total += whole
    dtype = str(boxes[0].tensor.dtype).removeprefix("torch.")
    return Logical(total, dtype, tuple(boxes), covered, tuple(copies))


def _copies(box: Box, first: torch.Tensor, owner: torch.Tensor, apart: torch.Tensor) -> Copies:
    """Return the place of a box that is farthest from what the owners of its elements have, ``first``."""
    far = farthest_place(apart)
    index = tuple(offset + i for offset, i in zip(box.offsets, far, strict=True))
    largest = float(apart.nan_to_num(math.inf)[far])
    return Copies((int(owner[far]), box.rank), largest, index, (float(first[far]), float(box.tensor[far])))


def farthest_place(apart: torch.Tensor) -> tuple[int, ...]:
    """Return the index of the largest of some distances, NaN being larger than all."""
    place = apart.nan_to_num(math.inf).argmax()
    return tuple(int(i) for i in torch.unravel_index(place, apart.shape)) if apart.dim() else ()
