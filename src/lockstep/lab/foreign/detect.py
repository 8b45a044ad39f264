"""Which format a file or folder has, by its content."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.errors import UserError, nearest
from lockstep.lab.foreign import hugging_face, olmo_core, table, tensorboard, torchtitan
from lockstep.lab.foreign.columns import Columns
from lockstep.lab.foreign.text import check_text, read_lines
from lockstep.lab.foreign.trace import Trace

MEGATRON = ("megatron-lm", "megatron-bridge")
FORMATS = (*MEGATRON, "torchtitan", "olmo-core", "hugging-face", "tensorboard", "csv", "jsonl")
"""Names that ``--format`` takes."""

_LINES: dict[str, Callable[[str], bool]] = {
    "torchtitan": torchtitan.recognises,
    "olmo-core": olmo_core.recognises,
    "hugging-face": hugging_face.recognises,
}


@dataclass(frozen=True)
class Reader:
    """How the user wants a side to be read: format, columns, and the steps between two lines that tell no step.

    ``aimed`` is the option that was given for this side alone, which then has to be one of another trainer.
    """

    format: str | None = None
    columns: Columns = field(default_factory=Columns)
    interval: int | None = None
    aimed: str = ""


def read_foreign(path: Path, reader: Reader, is_megatron: Callable[[str], bool]) -> Trace | None:
    """Read a file or a folder of another trainer; None for a console log of Megatron-LM, Bridge or Lockstep.

    Raises:
        UserError: no known format, or several; damaged files.
    """
    name = reader.format or detect(path, is_megatron)
    if name not in FORMATS:
        raise UserError(f"--format: {name!r} is not known; one of {', '.join(FORMATS)}.{nearest(name, FORMATS)}")
    if name in MEGATRON:
        return None
    if path.is_dir() and name not in ("hugging-face", "olmo-core", "tensorboard"):
        raise UserError(f"{path} is a folder; give the {name} file in it")
    if name == "tensorboard":
        return tensorboard.parse(path, reader.columns)
    if name == "olmo-core":
        return olmo_core.parse_files(path) if path.is_dir() else olmo_core.parse(path)
    if name == "hugging-face":
        state = _state_file(path)
        return hugging_face.parse_state(state) if state else hugging_face.parse_lines(path, reader.interval)
    if name == "csv":
        return table.parse_csv(path, reader.columns)
    return table.parse_jsonl(path, reader.columns) if name == "jsonl" else torchtitan.parse(path)


def detect(path: Path, is_megatron: Callable[[str], bool]) -> str:
    """Name the format of a file or a folder.

    Raises:
        UserError: it has none that is known, or several.
    """
    if path.is_dir():
        return _of_folder(path)
    if tensorboard.is_event_file(path):
        return "tensorboard"
    check_text(path)
    if _is_state(path):
        return "hugging-face"
    found: dict[str, None] = {}
    first = ""
    for _, text in read_lines(path):
        first = first or text.strip()
        if is_megatron(text):
            found[MEGATRON[0]] = None
        found.update({name: None for name, recognises in _LINES.items() if recognises(text)})
    if len(found) > 1:
        raise UserError(f"{path} holds lines of {' and '.join(found)}; say which by --format, or split the file")
    if found:
        return next(iter(found))
    if table.recognises_jsonl(first):
        return "jsonl"
    if table.recognises_csv(first):
        return "csv"
    raise UserError(
        f"{path} holds no training or validation line of a known format ({', '.join(FORMATS)}); "
        "give a run directory, a console log or a table with a header, or say what it is by --format"
    )


def _of_folder(path: Path) -> str:
    found = []
    if any(path.glob(tensorboard.EVENT_FILES)):
        found.append("tensorboard")
    if _state_file(path):
        found.append("hugging-face")
    if olmo_core.step_files(path):
        found.append("olmo-core")
    if len(found) > 1:
        raise UserError(f"{path} holds files of {' and '.join(found)}; say which by --format")
    if not found:
        raise UserError(
            f"{path} is neither a run directory (it has no run.json) nor a folder with TensorBoard events, "
            f"{hugging_face.STATE_FILE} or OLMo-core's metrics_step*.json"
        )
    return found[0]


def _is_state(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return path.name == hugging_face.STATE_FILE or b'"log_history"' in file.read()


def _state_file(path: Path) -> Path | None:
    """Return the state of a Trainer's folder: its own, or that of its last checkpoint."""
    if path.is_file():
        return path if _is_state(path) else None
    if (path / hugging_face.STATE_FILE).is_file():
        return path / hugging_face.STATE_FILE
    checkpoints = [
        (int(step), folder / hugging_face.STATE_FILE)
        for folder in path.glob("checkpoint-*")
        if (step := folder.name.rpartition("-")[2]).isdigit() and (folder / hugging_face.STATE_FILE).is_file()
    ]
    return max(checkpoints)[1] if checkpoints else None
