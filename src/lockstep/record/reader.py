"""Reading the record of a run: strict, with the file and line of what is wrong."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lockstep.config.fields import members
from lockstep.core.state import recorded_core
from lockstep.errors import UserError
from lockstep.record.schema import (
    FACTS,
    METRICS_FILE,
    OPTIONAL,
    READABLE,
    RUN_FILE,
    SCHEMA,
    EvaluationLine,
    TrainLine,
    decode_numbers,
    shape_problem,
)

_SPELLED = ('"nan"', '"inf"', '"-inf"')
"""What numbers that JSON has none for are written as; most lines have none."""


@dataclass(frozen=True)
class Run:
    """A run that was read back: ``facts`` are the entries of ``run.json`` (see ``schema.FACTS``)."""

    path: Path
    facts: dict[str, Any]
    train: list[TrainLine]
    evaluations: list[EvaluationLine]

    @property
    def status(self) -> str:
        """``running`` (or killed), ``finished`` or ``failed``."""
        return self.facts["status"]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved tree by dotted path."""
        return {f"{section}.{key}": v for section, keys in self.facts["config"].items() for key, v in keys.items()}

    @property
    def origins(self) -> dict[str, str]:
        """Where each value that is not a default came from, by dotted path."""
        return self.facts["origins"]


def load_run(path: Path | str) -> Run:
    """Read a run directory.

    Raises:
        UserError: no run there, a file that is cut off or damaged, or a schema this version does not know.
    """
    run_dir = Path(path)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a run directory: there is no such directory")
    facts = _read_facts(run_dir / RUN_FILE)
    train, evaluations = _read_metrics(run_dir / METRICS_FILE, live=facts["status"] == "running")
    return Run(run_dir, facts, train, evaluations)


def _read_facts(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file.parent} is not a run directory: it has no {RUN_FILE}")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is cut off or damaged ({error}); run again or restore it") from None
    if not isinstance(facts, dict) or "schema" not in facts:
        raise UserError(f"{file} is not a Lockstep run record: it states no schema")
    if facts["schema"] not in READABLE:
        raise UserError(
            f"{file} has schema {facts['schema']!r}, this Lockstep reads schemas {' and '.join(map(str, READABLE))}; "
            "read it with the version that wrote it"
        )
    for name, kind in FACTS.items():
        if name not in facts:
            if name in OPTIONAL:
                continue
            raise UserError(f"{file} is damaged: the entry {name} is missing")
        if not isinstance(facts[name], kind):
            raise UserError(f"{file} is damaged: the entry {name} holds {type(facts[name]).__name__}")
    unknown = sorted(set(facts) - set(FACTS))
    if unknown:
        raise UserError(f"{file} is damaged: schema {SCHEMA} has no entry {unknown[0]}")
    problem = shape_problem(facts)
    if problem:
        raise UserError(f"{file} is damaged: {problem}")
    core = recorded_core(facts)
    if core is not None:
        facts["code"]["core"] = core
    return facts


def _read_metrics(file: Path, live: bool) -> tuple[list[TrainLine], list[EvaluationLine]]:
    train: dict[int, TrainLine] = {}
    evaluations: dict[tuple[int, str, bool], EvaluationLine] = {}
    if not file.is_file():
        return [], []
    for number, text in _whole_lines(file, live):
        line = _parse_line(f"{file}:{number}", text)
        if isinstance(line, TrainLine):
            if line.iteration in train:
                raise UserError(f"{file}:{number}: iteration {line.iteration} is there twice; the record is damaged")
            train[line.iteration] = line
        else:
            key = (line.iteration, line.split, line.final)
            if key in evaluations:
                raise UserError(f"{file}:{number}: the evaluation of {line.split} at {line.iteration} is there twice")
            evaluations[key] = line
    return list(train.values()), list(evaluations.values())


def _whole_lines(file: Path, live: bool) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers; the file is never in memory as a whole."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, text in enumerate(lines, start=1):
            if text.endswith("\n"):
                yield number, text
            # A run that is still going, or was killed, may have written a part of its last line; a closed one may not.
            elif not live:
                raise UserError(f"{file}:{number}: the last line is cut off; the record is not whole, run again")


def _parse_line(where: str, text: str) -> TrainLine | EvaluationLine:
    try:
        values = json.loads(text)
    except ValueError:
        raise UserError(f"{where}: not a line of JSON; the record is damaged, run again") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if kind not in ("train", "evaluation"):
        raise UserError(f"{where}: a metrics line has the kind train or evaluation, this one has {kind!r}")
    cls = TrainLine if kind == "train" else EvaluationLine
    accepted = _accepted(cls)
    numbers = values
    if any(spelled in text for spelled in _SPELLED):
        numbers = {name: value if name == "batch_hash" else decode_numbers(value) for name, value in values.items()}
    for name, value in numbers.items():
        if name not in accepted:
            raise UserError(f"{where}: schema {SCHEMA} has no key {name} in a line of kind {kind}")
        if not _fits(value, accepted[name]):
            raise UserError(f"{where}: {name} has the value {value!r}; the record is damaged")
    missing = [name for name in _required(cls) if name not in numbers]
    if missing:
        raise UserError(f"{where}: the key {missing[0]} is missing; the record is damaged")
    return cls(**numbers)


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


@cache
def _required(cls: type[TrainLine] | type[EvaluationLine]) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING)


@cache
def _accepted(cls: type) -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(cls)
    return {
        name: tuple(typing.get_origin(member) or member for member in members(hint)) for name, hint in hints.items()
    }
