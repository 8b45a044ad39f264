"""Where the tensors of a process lie in those of the whole model: placement as data.

A process may hold a part of a parameter (tensor parallelism) and of that a stretch of its elements, row by row (the
optimizer's pieces, rows of sharded weights). Both are boxes of the whole tensor. Nothing here communicates.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from lockstep.config.model import ModelConfig
from lockstep.config.peft import PEFTConfig
from lockstep.models.init import in_order
from lockstep.parallel.fsdp import shards_of
from lockstep.parallel.mesh import Axis, Mesh
from lockstep.parallel.plan import WORD_EMBEDDINGS, Shard, is_expert, shard_of
from lockstep.peft.apply import whole_adapters

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A box of a tensor: its first element and its size in every dimension."""

    offsets: Shape
    sizes: Shape

    def common(self, other: "Box") -> "Box | None":
        """Return what two boxes share; None where that is nothing."""
        first = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(end - begin for begin, end in zip(first, map(min, self.ends, other.ends), strict=True))
        return Box(first, sizes) if all(size > 0 for size in sizes) else None

    @property
    def ends(self) -> Shape:
        """The first elements behind the box in every dimension."""
        return tuple(map(sum, zip(self.offsets, self.sizes, strict=True)))

    def moved(self, by: Shape) -> "Box":
        """Return the box moved by so many elements in every dimension."""
        return Box(tuple(a + b for a, b in zip(self.offsets, by, strict=True)), self.sizes)


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor, and where its elements lie in the memory of a local one: first element and strides."""

    box: Box
    first: int
    strides: Shape


@dataclass(frozen=True)
class Placed:
    """A contiguous tensor of this process, whose elements are ``pieces`` of a tensor of the whole model.

    ``shape`` is that of the whole tensor. A tensor that is whole here has one piece.
    """

    tensor: torch.Tensor
    shape: Shape
    pieces: tuple[Piece, ...]

    def view(self, offsets: Shape) -> torch.Tensor:
        """Return the piece that begins at ``offsets`` of the whole tensor, as a view of the local one."""
        piece = next(piece for piece in self.pieces if piece.box.offsets == offsets)
        first = self.tensor.storage_offset() + piece.first
        return self.tensor.detach().as_strided(piece.box.sizes, piece.strides, first)

    def on_host(self) -> "Placed":
        """Return a copy in host memory."""
        return replace(self, tensor=self.tensor.detach().to("cpu", copy=True).contiguous())


def place(
    tensor: torch.Tensor, shape: Shape, shard: Shard | None, size: int, rank: int, span: tuple[int, int] | None = None
) -> Placed:
    """Return a local tensor with its place in the whole tensor of ``shape``.

    It is the part of process ``rank`` of ``size`` by ``shard`` (None: the whole), or, of that part laid out row by row,
    the elements from ``span[0]`` up to ``span[1]``.
    """
    assert tensor.is_contiguous(), "only contiguous tensors are trained"
    parts = list(split_boxes(shape, shard, size, rank))
    local = local_shape(shape, shard, size, rank)
    begin, end = span or (0, math.prod(local))
    assert tensor.numel() == end - begin, f"{tuple(tensor.shape)} is not {begin} to {end} of {local}"
    strides = _strides(local)
    pieces = []
    for stretch in stretch_boxes(local, begin, end):
        for here, there in parts:
            common = stretch.common(here)
            if common is not None:
                shift = tuple(b - a for a, b in zip(here.offsets, there.offsets, strict=True))
                first = sum(a * b for a, b in zip(common.offsets, strides, strict=True)) - begin
                pieces.append(Piece(common.moved(shift), first, strides))
    return Placed(tensor, tuple(shape), tuple(pieces))


def split_boxes(shape: Shape, shard: Shard | None, size: int, rank: int) -> Iterator[tuple[Box, Box]]:
    """Yield the boxes that one of ``size`` processes has of a tensor: in its part of it, and in the whole."""
    whole = Box((0,) * len(shape), tuple(shape))
    if shard is None:
        yield whole, whole
        return
    block = shape[shard.dim] // shard.blocks
    first, length = _stretch(block, size, rank)
    for number in range(shard.blocks):
        yield (
            _along(whole, shard.dim, number * length, length),
            _along(whole, shard.dim, number * block + first, length),
        )


def local_shape(shape: Shape, shard: Shard | None, size: int, rank: int) -> Shape:
    """Return the shape of the part that one of ``size`` processes has of a tensor."""
    if shard is None:
        return tuple(shape)
    length = shard.blocks * _stretch(shape[shard.dim] // shard.blocks, size, rank)[1]
    return (*shape[: shard.dim], length, *shape[shard.dim + 1 :])


def stretch_boxes(shape: Shape, begin: int, end: int) -> list[Box]:
    """Cut elements ``begin`` up to ``end`` of a tensor, counted row by row, into boxes: rows, and rests of rows."""
    if begin >= end:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:
        return _of_row(shape, last, begin - last * row, end - last * row)
    boxes = _of_row(shape, first - 1, begin - (first - 1) * row, row) if begin < first * row else []
    if first < last:
        boxes.append(Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])))
    return boxes + _of_row(shape, last, 0, end - last * row)


def _of_row(shape: Shape, row: int, begin: int, end: int) -> list[Box]:
    return [Box((row, *box.offsets), (1, *box.sizes)) for box in stretch_boxes(shape[1:], begin, end)]


def _stretch(length: int, size: int, rank: int) -> tuple[int, int]:
    """Return begin and length of one of ``size`` parts; the first ones are longer by one where they are not equal."""
    least, longer = divmod(length, size)
    return rank * least + min(rank, longer), least + (rank < longer)


def _along(box: Box, dim: int, offset: int, length: int) -> Box:
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[dim], sizes[dim] = offset, length
    return Box(tuple(offsets), tuple(sizes))


def _strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


class Placement:
    """The place of every tensor of this process, by the name of its parameter or buffer.

    ``shapes`` are those of the whole model's parameters, in their order. Buffers are whole on every process.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, peft: PEFTConfig | None = None) -> None:
        self._config = config
        self._mesh = mesh
        whole = whole_adapters(config, peft or PEFTConfig())
        self.shapes: dict[str, Shape] = {name: tuple(p.shape) for name, p in in_order(whole)}
        self._all = self.shapes | {name: tuple(buffer.shape) for name, buffer in whole.named_buffers()}

    def shards_of(self, name: str) -> Axis:
        """Return the processes over which a parameter is sharded, where weights are."""
        return shards_of(name, self._mesh)

    def placed(self, name: str, tensor: torch.Tensor, span: tuple[int, int] | None = None) -> Placed:
        """Return a tensor of the parameter or buffer ``name``, or of its elements ``span`` here, with its place."""
        tp, shape = self._mesh.tp, self._all[name]
        return place(tensor.detach(), shape, self._shard(name), tp.size, tp.rank, span)

    def written(self, sizes: Mapping[str, int], parameter: Callable[[str], str], *, replicated: bool) -> list[str]:
        """Return which of its tensors this process writes, so that each is written once; ``sizes`` are in bytes.

        ``parameter`` tells the name of the parameter that a tensor belongs to. Tensors that all processes with the
        same weights have (``replicated``) are shared out, so that each writes about as much as the others.
        """
        once = [name for name in sizes if not self._elsewhere(parameter(name))]
        if not replicated:
            return once
        mesh = self._mesh
        if not mesh.experts_apart:
            return _share(once, sizes, mesh.replicas)
        experts = [name for name in once if is_expert(parameter(name))]
        others = [name for name in once if not is_expert(parameter(name))]
        return _share(others, sizes, mesh.replicas) + _share(experts, sizes, mesh.expert_replicas)

    def _elsewhere(self, name: str) -> bool:
        """Tell whether another process writes what this one has: of tensor parallel, or the first of both ends."""
        apart = self._mesh.whole_experts and is_expert(name)
        whole = self._mesh.tp.rank > 0 and self._shard(name) is None and not apart
        return whole or (self._mesh.ends.rank > 0 and name == WORD_EMBEDDINGS)

    def _shard(self, name: str) -> Shard | None:
        return shard_of(name, self._config) if self._mesh.tp.size > 1 else None


def _share(names: list[str], sizes: Mapping[str, int], replicas: Axis) -> list[str]:
    """Return this process's share of tensors that all have: always the least loaded one takes the next."""
    loads = [0] * replicas.size
    mine = []
    for name in names:
        writer = loads.index(min(loads))
        loads[writer] += sizes[name]
        if writer == replicas.rank:
            mine.append(name)
    return mine
