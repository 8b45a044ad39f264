"""What a GPU has room for, and what it holds beside the tensors of a run."""

from dataclasses import dataclass

from lockstep.errors import UserError, nearest

GIB = 1 << 30
_MIB = 1 << 20

# Seen by no allocator of PyTorch: the CUDA context with its kernels, and the buffers of NCCL where there are peers.
_CONTEXT_BYTES = 600 * _MIB
_NCCL_BYTES = 1024 * _MIB
# A caching allocator cannot use all: blocks of unlike sizes leave gaps between them.
_GAPS = 0.03


@dataclass(frozen=True)
class Gpu:
    """A type of GPU.

    Attributes:
        name: as the user gives it.
        memory_bytes: all memory, as PyTorch reports it.
        workspace_bytes: what cuBLAS asks of PyTorch's allocator for each thread that multiplies matrices.
    """

    name: str
    memory_bytes: int
    workspace_bytes: int

    def outside_bytes(self, processes: int) -> int:
        """Return what the run needs beside its tensors: CUDA context, NCCL, gaps between blocks of memory."""
        return int(_CONTEXT_BYTES + (_NCCL_BYTES if processes > 1 else 0) + _GAPS * self.memory_bytes)


# Memory in GiB; cuBLAS takes 32 MiB on Hopper and later, and 8.125 MiB before, where PyTorch chooses.
_KNOWN: dict[str, tuple[float, float]] = {
    "h100": (79.1, 32),
    "h200": (139.7, 32),
    "b200": (178.3, 32),
    "a100": (79.1, 8.125),
    "a100-40gb": (39.4, 8.125),
    "l40s": (44.4, 8.125),
    "l4": (22.0, 8.125),
    "rtx4090": (23.5, 8.125),
}


def known_gpus() -> list[str]:
    """Return the names of the GPU types."""
    return list(_KNOWN)


def gpu_type(name: str, memory_gib: float | None = None) -> Gpu:
    """Return a type of GPU, with another memory size where one is given.

    Raises:
        UserError: no such type, or a size that is not above 0.
    """
    found = _KNOWN.get(name.lower())
    if found is None:
        names = ", ".join(_KNOWN)
        raise UserError(
            f"--gpu {name}: known are {names}; for another give the nearest, and its size with --gpu-memory."
            f"{nearest(name.lower(), _KNOWN)}"
        )
    if memory_gib is not None and not memory_gib > 0:
        raise UserError(f"--gpu-memory {memory_gib:g}: give GiB above 0")
    return Gpu(name.lower(), int((memory_gib or found[0]) * GIB), int(found[1] * _MIB))
