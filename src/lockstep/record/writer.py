"""Writing the record of one run."""

import dataclasses
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import lockstep
from lockstep.record.schema import FACTS, LINES, METRICS_FILE, OPTIONAL, RUN_FILE, SCHEMA, Status, encode, shape_problem


class RunWriter:
    """Writes ``run.json`` and ``metrics.jsonl`` of one run; only one process of a run holds a writer.

    ``run.json`` is replaced as a whole, so a reader never sees half of it; ``metrics.jsonl`` is flushed at each line.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._facts: dict[str, Any] = {}
        self._metrics: TextIO | None = None

    def start(self, **facts: Any) -> None:
        """Write ``run.json``. ``facts`` are entries of ``schema.FACTS``; those not known yet start out empty.

        Raises:
            ValueError: an entry that the schema does not have.
            FileExistsError: the directory already holds a run.
        """
        if (self.run_dir / RUN_FILE).exists():
            raise FileExistsError(f"{self.run_dir} already holds a run")
        empty: dict[str, Any] = {name: {} for name, kind in FACTS.items() if kind is dict and name not in OPTIONAL}
        self._facts = {
            "schema": SCHEMA,
            "lockstep_version": lockstep.__version__,
            "door": "python",
            "name": self.run_dir.name,
            "started": _now(),
            "finished": None,
            "status": "running",
            **empty,
            "initial_weights": None,
        }
        self._facts["command"] = {"argv": [], "flags": None, "overrides": None}
        self.update(**facts)

    def update(self, **facts: Any) -> None:
        """Replace entries of ``run.json``.

        Raises:
            ValueError: an entry that the schema does not have, or one of another shape.
        """
        unknown = sorted(set(facts) - set(FACTS))
        if unknown:
            raise ValueError(f"the run record has no entry {unknown[0]}")
        merged = {**self._facts, **encode(facts)}
        problem = shape_problem(merged)
        if problem:
            raise ValueError(problem)
        self._facts = {name: merged[name] for name in FACTS if name in merged}
        self._replace(json.dumps(self._facts, indent=1, allow_nan=False) + "\n")

    def metrics(self, line: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; ``line["kind"]`` is ``train`` or ``evaluation``.

        Raises:
            ValueError: another kind, or a key that its schema does not have.
        """
        kind = line.get("kind")
        if kind not in LINES:
            raise ValueError(f"metrics line of unknown kind {kind!r}")
        unknown = sorted(set(line) - {field.name for field in dataclasses.fields(LINES[kind])} - {"kind"})
        if unknown:
            raise ValueError(f"a metrics line of kind {kind} has no key {unknown[0]}")
        if self._metrics is None:
            self._metrics = (self.run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._metrics.write(json.dumps(encode(line), allow_nan=False) + "\n")
        self._metrics.flush()

    def finish(self, status: Status, **facts: Any) -> None:
        """Write how the run ended and close the record."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        self.update(status=status, finished=_now(), **facts)

    def _replace(self, text: str) -> None:
        target = self.run_dir / RUN_FILE
        scratch = target.with_name(f".{RUN_FILE}.{os.getpid()}")
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(target)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
