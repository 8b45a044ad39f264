"""Hugging Face Trainer: ``trainer_state.json``, and the dictionaries that it prints."""

import ast
import json
import re
from pathlib import Path
from typing import Any

from lockstep.errors import UserError
from lockstep.lab.digits import Digits
from lockstep.lab.foreign.settings import Collector, hugging_face_folder
from lockstep.lab.foreign.text import read_lines
from lockstep.lab.foreign.trace import Format, Trace
from lockstep.lab.point import Point

STATE_FILE = "trainer_state.json"
FORMAT = Format(
    "hugging-face",
    "Hugging Face trainer_state.json",
    "a loss is the mean over the steps since the last entry and over all ranks, whole or with 4 decimals by version",
)
LINES = Format(
    "hugging-face",
    "Hugging Face Trainer console log",
    "a loss is the mean over the steps since the last line and over all ranks, with 4 digits; lines tell no step and "
    "are counted",
)
_ENTRY = re.compile(r"\{'(?:loss|eval_loss|train_runtime)':.*?\}")
_LOGGING_STEPS = re.compile(r"\blogging_steps=(\d+)(?:\.0)?\b")
_SINCE = (4, 51)
"""The first version of transformers that logs the learning rate of the step itself, not of the following one."""

_DECIMALS = 4


def recognises(text: str) -> bool:
    """Tell whether a line is one that the Trainer prints."""
    return "{'loss':" in text and bool(_ENTRY.search(text))


def parse_state(path: Path) -> Trace:
    """Read a ``trainer_state.json``.

    Raises:
        UserError: the file is cut off, or is another one.
    """
    trace = Trace(path, FORMAT)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        history = [entry for entry in state["log_history"] if isinstance(entry, dict)]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}); restore it or take an earlier checkpoint's") from None
    except (KeyError, TypeError):
        raise UserError(f"{path} holds no log_history; give the {STATE_FILE} of a Trainer checkpoint") from None
    trace.settings = hugging_face_folder(path.parent, state)
    own = _logs_own_rate(path, trace)
    previous, losses = 0, []
    for entry in history:
        step = entry.get("step")
        if not isinstance(step, int):
            raise UserError(f"{path}: an entry of log_history has no step; restore the file")
        if "loss" in entry:
            start = previous + 1 if previous < step else step
            trace.read(_point(step, start, _numbers(path, entry), own))
            losses.append(trace.readings[-1].point.lm_loss)
            previous = step
        _evaluations(trace, step, _numbers(path, entry))
    rounded = all(loss is None or round(loss, _DECIMALS) == loss for loss in losses)
    trace.digits = {"lm_loss": Digits(decimals=_DECIMALS)} if rounded and losses else {}
    return trace


def _logs_own_rate(path: Path, trace: Trace) -> bool:
    """Tell which learning rate an entry has, by the version of transformers in the ``config.json`` beside it."""
    try:
        version = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))["transformers_version"]
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    except (OSError, ValueError, KeyError, TypeError):
        trace.notes.append(
            "tells no version of transformers: its learning rates are taken as those of the steps themselves, as since "
            "4.51; before that they were those of the following steps"
        )
        return True
    return numbers >= _SINCE


def _point(step: int, start: int, entry: dict[str, float], own: bool) -> Point:
    rate, tokens = entry.get("learning_rate"), entry.get("num_input_tokens_seen")
    return Point(
        iteration=step,
        start=start,
        lm_loss=entry["loss"],
        grad_norm=entry.get("grad_norm"),
        lr=rate if own else None,
        next_lr=None if own else rate,
        consumed_tokens=None if tokens is None else int(tokens),
    )


def _evaluations(trace: Trace, step: int, entry: dict[str, float]) -> None:
    for name, value in entry.items():
        if found := re.fullmatch(r"eval_(?:(.+)_)?loss", name):
            trace.evaluate(step, value, f"valid-{found[1]}" if found[1] else "valid")


def _numbers(path: Path, entry: dict[str, Any]) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in entry.items() if isinstance(value, int | float | str)}
    except ValueError as error:
        raise UserError(f"{path}: {error} in an entry of the history; restore the file") from None


def parse_lines(path: Path, interval: int | None) -> Trace:
    """Read a console log; ``interval`` is the run's logging_steps where the log does not print its arguments.

    Raises:
        UserError: the number of steps between two lines is not known.
    """
    trace = Trace(path, LINES)
    collector = Collector()
    step = 0
    for rank, text in read_lines(path):
        collector.line(text)
        if interval is None and (told := _LOGGING_STEPS.search(text)):
            interval = int(told[1])
        for found in _ENTRY.finditer(text):
            entry = _literal(path, found[0])
            if "loss" in entry:
                if interval is None:
                    raise UserError(
                        f"{path}: the Trainer's lines tell no step; give its logging_steps as --interval N, "
                        f"or the {STATE_FILE} of a checkpoint"
                    )
                step += interval
                trace.read(_point(step, step - interval + 1, entry, own=True), rank)
            _evaluations(trace, step, entry)
    ranks = {reading.rank for reading in trace.readings}
    if len(ranks) > 1:
        raise UserError(f"{path}: lines of several ranks are counted as one; give the log of one rank, or {STATE_FILE}")
    coarse = Digits(significant=4)
    trace.digits = {"lm_loss": coarse, "grad_norm": coarse, "lr": coarse}
    trace.interval = interval
    trace.settings = collector.settings()
    return trace


def _literal(path: Path, text: str) -> dict[str, float]:
    spelled = re.sub(r"(?<=: )(nan|-?inf)\b", r"'\1'", text)
    try:
        return _numbers(path, ast.literal_eval(spelled))
    except (ValueError, SyntaxError):
        raise UserError(f"{path}: {text[:60]!r} is damaged; restore the log") from None
