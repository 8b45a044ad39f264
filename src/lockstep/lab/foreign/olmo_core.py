"""OLMo-core's console log, and the metrics files that its trainer saves."""

import json
import re
from pathlib import Path
from typing import Any

from lockstep.errors import UserError
from lockstep.lab.digits import Digits
from lockstep.lab.foreign.text import read_lines
from lockstep.lab.foreign.trace import Format, Trace
from lockstep.lab.point import Point

FORMAT = Format(
    "olmo-core",
    "OLMo-core console log",
    "a block is of its step alone; its loss is over all ranks, with 4 digits; its learning rate is that of the step, "
    "with 4 decimals and therefore left out where that is less than 3 digits; evaluations are not read",
)
FILES = Format(
    "olmo-core",
    "OLMo-core metrics files",
    "a file holds the metrics of the step in its name, with every digit; its learning rate is that of the step; "
    "evaluations are not read, as files repeat older ones",
)
STEP_FILE = re.compile(r"metrics_step(\d+)\.json")
_MARKER = re.compile(r"\[step=(\d+)/[\d?]+,epoch=")
_METRIC = re.compile(r"(?:^|\s)\s{2,}(\w+/[^=\t]*)=([-+.,\w]+)\s*$")
_LOSS, _NORM, _RATE = "train/CE loss", "optim/total grad norm", "optim/LR (group 0)"
_SKIPPED, _TOKENS = "optim/step skipped", "throughput/total tokens"
_SUFFIXES = {"B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_FEW = 3


def recognises(text: str) -> bool:
    """Tell whether a line is one of OLMo-core's."""
    return bool(_MARKER.search(text))


def parse(path: Path) -> Trace:
    """Read a console log.

    Raises:
        UserError: the file cannot be read, or a metric is no number.
    """
    trace = Trace(path, FORMAT)
    step: int | None = None
    owner: str | None = None
    metrics: dict[str, float] = {}
    for rank, text in read_lines(path, trace.notes):
        if found := _MARKER.search(text):
            _close(trace, step, metrics, owner)
            step, owner, metrics = int(found[1]), rank, {}
        elif step is not None and (found := _METRIC.search(text)):
            if found[1] == _RATE and len(found[2].lstrip("0.").replace(".", "").partition("E")[0]) < _FEW:
                continue
            if found[1] in (_LOSS, _NORM, _RATE, _SKIPPED):
                metrics[found[1]] = _value(path, found[1], found[2])
        elif step is not None:
            _close(trace, step, metrics, owner)
            step, metrics = None, {}
    _close(trace, step, metrics, owner)
    coarse = Digits(significant=4, decimals=4)
    trace.digits = {"lm_loss": coarse, "grad_norm": coarse, "lr": Digits(significant=3)}
    return trace


def _close(trace: Trace, step: int | None, metrics: dict[str, float], rank: str | None) -> None:
    """End a block; a marker without metrics tells only that the step was made."""
    if step is not None and metrics:
        trace.read(_point(step, metrics), rank)


def _value(path: Path, name: str, text: str) -> float:
    factor = _SUFFIXES.get(text[-1], 1.0)
    try:
        return float((text[:-1] if factor > 1 else text).replace(",", "")) * factor
    except ValueError:
        raise UserError(f"{path}: {name}={text} is no number; restore the log") from None


def _point(step: int, metrics: dict[str, Any]) -> Point:
    skipped, tokens = metrics.get(_SKIPPED), metrics.get(_TOKENS)
    return Point(
        iteration=step,
        start=step,
        lm_loss=metrics.get(_LOSS),
        grad_norm=metrics.get(_NORM),
        lr=metrics.get(_RATE),
        consumed_tokens=None if tokens is None else int(tokens),
        skipped=None if skipped is None else bool(skipped),
    )


def step_files(folder: Path) -> list[Path]:
    """Return the metrics files of a folder, by step."""
    found = [(int(name[1]), path) for path in folder.iterdir() if (name := STEP_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def parse_files(folder: Path) -> Trace:
    """Read the metrics files of a folder.

    Raises:
        UserError: a file is cut off or damaged.
    """
    trace = Trace(folder, FILES)
    for path in step_files(folder):
        name = STEP_FILE.fullmatch(path.name)
        assert name
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float | str)}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is cut off or damaged ({error}); restore it or take it out") from None
        if _LOSS in numbers:
            trace.read(_point(int(name[1]), numbers))
    return trace
