"""The index of a checkpoint: what lies where, and whole tensors read by it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lockstep.training import checkpoint_files as files


@dataclass(frozen=True)
class Part:
    """A box of a tensor in a checkpoint: where it lies in the tensor, and its name in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: shape, dtype as PyTorch spells it without ``torch.``, and its parts."""

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]


def read_index(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by name.

    Raises:
        UserError: the index is damaged.
    """
    path = folder / files.INDEX
    try:
        entries: dict[str, Any] = files.read_json(path)["tensors"]
        index = {name: _stored(entry) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError):
        raise files.damaged(path, "it does not say where tensors lie") from None
    for name, stored in index.items():
        if sum(math.prod(part.sizes) for part in stored.parts) != math.prod(stored.shape):
            raise files.damaged(path, f"it lacks parts of {name}")
    return index


def _stored(entry: dict[str, Any]) -> Stored:
    parts = (Part(tuple(p["offsets"]), tuple(p["sizes"]), p["file"], p["key"]) for p in entry["parts"])
    return Stored(tuple(entry["shape"]), entry["dtype"], tuple(parts))


def read_whole(folder: Path, stored: Stored) -> torch.Tensor:
    """Return a whole tensor of a checkpoint, in host memory."""
    whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    for part in stored.parts:
        with safe_open(folder / part.file, framework="pt") as file:
            box = tuple(slice(a, a + n) for a, n in zip(part.offsets, part.sizes, strict=True))
            whole[box].copy_(file.get_tensor(part.key))
    return whole
