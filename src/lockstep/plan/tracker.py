"""Follows the memory of tensors on the meta device, which have a size and no contents, as a GPU would hold them."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Part = Literal["weights", "gradients", "optimizer", "experts", "activations", "logits", "workspace"]
PARTS: tuple[Part, ...] = get_args(Part)

_UNIT = 512  # PyTorch's CUDA allocator hands out multiples of this
# Requests from this size on get memory of their own in multiples of 2 MiB; a rest of up to 1 MiB is not handed on.
_LARGE = 10 << 20
_LARGE_UNIT = 2 << 20
_SMALLEST_REST = 1 << 20

_aten = torch.ops.aten


def block_bytes(requested: int) -> int:
    """Return what PyTorch's CUDA allocator counts for a request."""
    size = -(-requested // _UNIT) * _UNIT
    whole = -(-size // _LARGE_UNIT) * _LARGE_UNIT
    return whole if size >= _LARGE and whole - size <= _SMALLEST_REST else size


@dataclass
class _Block:
    """A storage that is alive: its bytes by part, and which of its pieces have been given a part by name."""

    default: Part
    parts: Counter[Part]
    named: dict[int, Part] = field(default_factory=dict)
    alive: Any = None


class OverLimit(BaseException):
    """More memory was asked for than there may be. Not an ``Exception``: a pipeline's schedule would wrap that."""


class MemoryTracker(TorchDispatchMode):
    """Counts, while it is entered, the memory of meta tensors by part, and what it was at its peak.

    New memory belongs to ``part``; `assign` moves a tensor to another. Values that the host reads are ones: a meta
    tensor has none. More than ``limit`` bytes raise `OverLimit`.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self._limit = limit
        self.part: Part = "activations"
        self.moment = ""
        self._blocks: dict[int, _Block] = {}
        self._now: Counter[Part] = Counter()
        self._total = 0
        self.reset_peak()

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = 0
        self.highest: Counter[Part] = Counter()
        self.peak_parts: dict[Part, int] = {}
        self.peak_moment = ""
        self._note_peak()

    @property
    def present(self) -> dict[Part, int]:
        """Bytes by part now."""
        return {part: self._now[part] for part in PARTS}

    @contextmanager
    def during(self, part: Part, moment: str | None = None) -> Iterator[None]:
        """Within it new memory belongs to ``part``, and a peak is said to be at ``moment``."""
        before = self.part, self.moment
        self.part, self.moment = part, self.moment if moment is None else moment
        try:
            yield
        finally:
            self.part, self.moment = before

    def reserve(self, part: Part, size: int) -> None:
        """Count memory that no tensor shows and that is never freed."""
        self._now[part] += size
        self._total += size

    def assign(self, tensor: Tensor, part: Part) -> None:
        """Move the memory of a tensor, which may be a piece of a larger one, to a part."""
        block = self._blocks.get(tensor.untyped_storage()._cdata)
        if block is None:
            return
        offset, before = int(tensor.storage_offset()), block.default
        before = block.named.get(offset, before)
        if before == part:
            return
        size = tensor.numel() * tensor.element_size()
        if size == tensor.untyped_storage().nbytes():
            size = block.parts[before]
        block.named[offset] = part
        for counter in (block.parts, self._now):
            counter[before] -= size
            counter[part] += size
        self.highest[part] = max(self.highest[part], self._now[part])

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the memory of its results."""
        kwargs = kwargs or {}
        special = _ON_THE_HOST.get(func)
        result = NotImplemented if special is None else special(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        self._note(result)
        return result

    def _note(self, result: Any) -> None:
        if isinstance(result, Tensor):
            if result.device.type == "meta":
                self._note_storage(result.untyped_storage())
        elif isinstance(result, tuple | list):
            for item in result:
                self._note(item)

    def _note_storage(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._blocks:
            return
        size = block_bytes(storage.nbytes())
        block = _Block(self.part, Counter({self.part: size}))
        block.alive = weakref.ref(storage, lambda _: self._forget(key))
        self._blocks[key] = block
        self._now[self.part] += size
        self.highest[self.part] = max(self.highest[self.part], self._now[self.part])
        self._total += size
        if self._total > self.peak_bytes:
            self._note_peak()
            if self._limit is not None and self._total > self._limit:
                raise OverLimit

    def _forget(self, key: int) -> None:
        block = self._blocks.pop(key)
        for part, size in block.parts.items():
            self._now[part] -= size
            self._total -= size

    def _note_peak(self) -> None:
        self.peak_bytes, self.peak_parts, self.peak_moment = self._total, self.present, self.moment
        for part, size in self.peak_parts.items():
            self.highest[part] = max(self.highest[part], size)


def _read(tensor: Tensor) -> Any:
    if tensor.device.type != "meta":
        return NotImplemented
    return torch.ones((), dtype=tensor.dtype).item()


def _copied(tensor: Tensor, **to: Any) -> Any:
    if tensor.device.type != "meta" or torch.device(to.get("device") or "meta").type == "meta":
        return NotImplemented
    return torch.ones(tensor.shape, dtype=to.get("dtype") or tensor.dtype)


def _found(tensor: Tensor) -> Any:
    """Return as many indices as there can be."""
    if tensor.device.type != "meta":
        return NotImplemented
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)


_ON_THE_HOST: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: _read,
    _aten._to_copy.default: _copied,
    _aten.nonzero.default: _found,
}
