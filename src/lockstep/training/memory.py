"""Running out of memory, told as what it is."""

import contextlib
import re
from collections.abc import Iterator

import torch

from lockstep.errors import UserError

_REMEDY = "`lockstep plan` tells what a command needs, in which layouts it fits and what saves most"
_ON_CPU = re.compile(r"DefaultCPUAllocator: can't allocate memory: you tried to allocate (\d+) bytes")
_ON_GPU = re.compile(
    r"Tried to allocate ([\d.]+ \w+)\. GPU \d+ has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+)"
)


@contextlib.contextmanager
def told_when_full(device: torch.device, doing: str, *, graphs: bool = False) -> Iterator[None]:
    """Turn a failed allocation into an error that says how much was asked for, and while ``doing`` what.

    ``graphs``: micro-batches are CUDA graphs, which hold memory of their own.

    Raises:
        UserError: memory has run out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = _told(error)
        if told is None:
            raise
        remedy = f"--cuda-graphs none needs less, and {_REMEDY}" if graphs else _REMEDY
        raise UserError(f"out of memory on {device} while {doing}: {told}; {remedy}") from error


def _told(error: BaseException) -> str | None:
    """Return what is known of a failed allocation; None where that is not the error."""
    if isinstance(error, torch.OutOfMemoryError):
        found = _ON_GPU.search(str(error))
        if found is None:
            return str(error).splitlines()[0]
        asked, whole, free = found.groups()
        return f"{asked} were asked for, {free} of {whole} are free"
    if found := _ON_CPU.search(str(error)):
        return f"{int(found[1]) / 2**30:.1f} GiB were asked for at once"
    return "the system gives no more" if isinstance(error, MemoryError) else None
