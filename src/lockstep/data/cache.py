"""Arrays kept on disk between runs: verified when read, written atomically, rebuilt when in doubt."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.errors import UserError

_VERSION = 1
_CHECKSUM_BYTES = 1 << 24

Arrays = dict[str, np.ndarray]


class IndexCache:
    """A folder of index arrays.

    Args:
        folder: where the files lie.
        required: the user named the folder, so that failing to write there is an error; otherwise a folder that
            cannot be written (read-only data) only means that the arrays are built again next time.
    """

    def __init__(self, folder: Path, required: bool) -> None:
        self._folder = folder
        self._required = required

    def load_or_build(self, kind: str, key: dict[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """Return the arrays stored for ``key`` (plain JSON values), or build and store them.

        Raises:
            UserError: the required folder cannot be written.
        """
        spelled = json.dumps({"version": _VERSION, "kind": kind, **key}, sort_keys=True)
        stem = f"{hashlib.sha256(spelled.encode()).hexdigest()[:32]}-{kind}"
        found = self._load(stem, spelled)
        if found is not None:
            return found
        arrays = build()
        try:
            self._store(stem, spelled, arrays)
        except OSError as error:
            if self._required:
                raise UserError(
                    f"cannot write index files to {self._folder} ({error.strerror}); name a writable --data-cache-path"
                ) from None
        return arrays

    def _load(self, stem: str, spelled: str) -> Arrays | None:
        try:
            description = json.loads((self._folder / f"{stem}.json").read_text())
            if description["key"] != spelled:
                return None
            arrays = {}
            for name, checksum in description["crc32"].items():
                arrays[name] = np.load(self._folder / f"{stem}-{name}.npy", mmap_mode="r", allow_pickle=False)
                if _crc32(arrays[name]) != checksum:
                    return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
            return None
        return arrays

    def _store(self, stem: str, spelled: str, arrays: Arrays) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, values in arrays.items():
            temporary = self._folder / f"{stem}-{name}.{os.getpid()}.tmp"
            with temporary.open("wb") as stream:
                np.save(stream, values, allow_pickle=False)
            os.replace(temporary, self._folder / f"{stem}-{name}.npy")
        description = {"key": spelled, "crc32": {name: _crc32(values) for name, values in arrays.items()}}
        temporary = self._folder / f"{stem}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(description))
        os.replace(temporary, self._folder / f"{stem}.json")


def _crc32(values: np.ndarray) -> int:
    checksum = zlib.crc32(f"{values.dtype.str}{values.shape}".encode())
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    for start in range(0, len(flat), _CHECKSUM_BYTES):
        checksum = zlib.crc32(flat[start : start + _CHECKSUM_BYTES], checksum)
    return checksum
