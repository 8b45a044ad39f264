"""Tensors of a checkpoint on disk: safetensors files of all processes and one index of what lies where.

This is a storage of torch.distributed.checkpoint, which plans what each process writes, checks that the parts make up
every tensor, and finds what a process needs in a checkpoint of another layout. Its own storages do not serve: one
pickles, the other holds one part of a tensor a file.
"""

import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lockstep.errors import UserError
from lockstep.parallel.placement import Placed
from lockstep.training import checkpoint_files as files
from lockstep.training.checkpoint_index import Part, read_index

FILE_BYTES = 1 << 30
"""Tensors are spread over files of about this size: each is built in memory as a whole."""


class _Entry:
    """A placed tensor as torch.distributed.checkpoint asks for it: its parts to write, and to read into."""

    def __init__(self, placed: Placed) -> None:
        self.placed = placed

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.placed.tensor.dtype)
        size = torch.Size(self.placed.shape)
        return [
            WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
            for chunk in self.__create_chunk_list__()
            for data in (TensorWriteData(chunk, properties, size),)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        boxes = (piece.box for piece in self.placed.pieces)
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None, "every part has its place"
        return self.placed.view(tuple(index.offset))


class _SavePlanner(dcp.DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        entry: _Entry = self.state_dict[index.fqn]
        return entry.__get_tensor_shard__(index)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the entries as they are: the default drops what is no tensor."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        entry: _Entry = self.state_dict[index.fqn]
        return entry.__get_tensor_shard__(index)


def write_tensors(folder: Path, tensors: Mapping[str, Placed], group: dist.ProcessGroup | None) -> list[str]:
    """Write the tensors of this process, together with the other processes of ``group`` (None: alone).

    The processes give the parts that they have; what several give is written by one. Returns the names of the files
    that this process wrote.

    Raises:
        UserError: on all processes, if one of them could not write.
    """
    writer = _Writer(folder)
    entries = {name: _Entry(placed) for name, placed in tensors.items()}
    try:
        with _quiet():
            dcp.save(entries, storage_writer=writer, planner=_SavePlanner(), process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        raise UserError(_cause(error)) from error
    return writer.written


def read_tensors(folder: Path, tensors: Mapping[str, Placed]) -> None:
    """Fill tensors in place, converting their dtype where it differs; needs no other process.

    Raises:
        UserError: a file cannot be read.
    """
    entries = {name: _Entry(placed) for name, placed in tensors.items()}
    try:
        with _quiet(), torch.no_grad():
            dcp.load(entries, storage_reader=_Reader(folder), planner=_LoadPlanner(), no_dist=True)
    except (dcp.CheckpointException, SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be read: {_cause(error)}; load another with --ckpt-step") from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _cause(error: BaseException) -> str:
    """Return what went wrong in one line: PyTorch wraps what a rank raised, with its traceback, in another error."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    return " ".join(str(error).split()) or type(error).__name__


class _Writer(dcp.StorageWriter):
    """Writes what the plan gives to this process; the coordinator then writes the index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.written: list[str] = []

    def reset(self, checkpoint_id: Any = None) -> None:
        assert checkpoint_id is None, "a writer writes one checkpoint"

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every process its number, after which its files are called."""
        return [replace(plan, storage_data=number) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's parts, in files of about ``FILE_BYTES``."""
        if not self._folder.is_dir():
            raise UserError(f"process {plan.storage_data} does not see {self._folder}; all hosts have to share it")
        results = []
        for number, items in enumerate(_spread(plan.items), start=1):
            name = f"tensors-{plan.storage_data:05d}-{number:05d}.safetensors"
            contents = {_key(item): _copy(planner.resolve_data(item)) for item in items}
            save_file(contents, self._folder / name)
            self.written.append(name)
            results += [
                WriteResult(item.index, contents[_key(item)].nbytes, storage_data=(name, _key(item))) for item in items
            ]
            contents.clear()  # else two files are in memory while the next one is filled
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index."""
        places = {result.index: result.storage_data for result in itertools.chain(*results)}
        tensors = {name: _entry(name, stored, places) for name, stored in metadata.state_dict_metadata.items()}
        files.write_json(self._folder / files.INDEX, {"tensors": tensors}, indent=None)
        self.written.append(files.INDEX)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)


def _spread(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Yield the parts of one file after another."""
    bundle: list[WriteItem] = []
    size = 0
    for item in items:
        nbytes = item.tensor_storage_size() or 0
        if bundle and size + nbytes > FILE_BYTES:
            yield bundle
            bundle, size = [], 0
        bundle.append(item)
        size += nbytes
    if bundle:
        yield bundle


def _key(item: WriteItem) -> str:
    """Return the name of a part in its file: that of the tensor, and where it begins if it is not the whole."""
    data = item.tensor_data
    assert data is not None, "only tensors are saved"
    if data.chunk.sizes == data.size:
        return item.index.fqn
    return f"{item.index.fqn}[{','.join(map(str, data.chunk.offsets))}]"


def _copy(tensor: Any) -> torch.Tensor:
    """Return a copy in host memory that shares its memory with no other: parts are views of one tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _entry(name: str, stored: Any, places: dict[MetadataIndex, tuple[str, str]]) -> dict[str, Any]:
    parts = []
    for chunk in stored.chunks:
        file, key = places[MetadataIndex(name, chunk.offsets)]
        parts.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": file, "key": key})
    dtype = str(stored.properties.dtype).removeprefix("torch.")
    return {"shape": list(stored.size), "dtype": dtype, "parts": parts}


class _Reader(dcp.StorageReader):
    """Reads what the plan asks for, each part of it from the file that holds it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[MetadataIndex, Part] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        assert checkpoint_id is None, "a reader reads one checkpoint"

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index in the terms of torch.distributed.checkpoint."""
        metadata: dict[str, Any] = {}
        for name, stored in read_index(self._folder).items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in stored.parts]
            properties = TensorProperties(dtype=getattr(torch, stored.dtype))
            metadata[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
            self._places |= {MetadataIndex(name, torch.Size(part.offsets)): part for part in stored.parts}
        return Metadata(metadata)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the index was read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what is asked for into the tensors of this process, file by file."""
        by_file = defaultdict(list)
        for item in plan.items:
            part = self._places[item.storage_index]
            by_file[part.file].append((part.key, item))
        for name, wanted in by_file.items():
            with safe_open(self._folder / name, framework="pt") as file:
                for key, item in wanted:
                    box = tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
                    values = file.get_slice(key)[box] if box else file.get_tensor(key)
                    target = planner.resolve_tensor(item)
                    target.copy_(values)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)
