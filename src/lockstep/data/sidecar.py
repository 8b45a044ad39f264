"""The note that preparation leaves beside token files: which tokenizer made them, and their hashes."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lockstep.data.indexed import writing
from lockstep.errors import UserError

_VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    """Attributes: the tokenizer's identity, whether documents end with its end-of-document id, ``WrittenFiles``."""

    tokenizer: dict[str, Any]
    append_eod: bool
    files: dict[str, Any]


def sidecar_path(prefix: str) -> Path:
    """Return where the note of a prefix lies."""
    return Path(f"{prefix}.lockstep.json")


def write_sidecar(sidecar: Sidecar) -> None:
    """Write the note of the files it describes."""
    path = sidecar_path(sidecar.files["prefix"])
    content = {"version": _VERSION, **asdict(sidecar)}
    content["files"] = {name: value for name, value in content["files"].items() if name != "prefix"}
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with writing(path):
            temporary.write_text(json.dumps(content, indent=2) + "\n")
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_sidecar(prefix: str) -> Sidecar | None:
    """Return the note of a prefix, None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            raise UserError(f"{path} has version {content['version']}, expected {_VERSION}; remove it or prepare again")
        return Sidecar(content["tokenizer"], content["append_eod"], content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({error}); remove it or prepare the data again") from None
