"""The terminal view of a run record."""

import dataclasses
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lockstep.config import all_fields
from lockstep.record.reader import Run
from lockstep.record.schema import TrainLine, encode

EDGE_ROWS = 5
"""Iterations shown at either end of the loss table."""

PIPE_WIDTH = 120
"""Columns when the output is not a terminal."""


def as_json(run: Run) -> dict[str, Any]:
    """Return the whole record as plain JSON values: ``run.json`` and the lines of ``metrics.jsonl``."""
    return {
        "path": str(run.path),
        "run": run.facts,
        "train": [encode(dataclasses.asdict(line)) for line in run.train],
        "evaluations": [encode(dataclasses.asdict(line)) for line in run.evaluations],
    }


def show(run: Run, console: Console | None = None) -> None:
    """Print the record: command, what differs from the defaults, data, device, losses and evaluations."""
    console = console or Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    _show_head(run, console)
    _show_settings(run, console)
    for title, entries in (
        ("Data", run.facts["data"]),
        ("Seeds", run.facts["seeds"]),
        ("Device", run.facts["device"]),
        ("Features", run.facts["features"]),
        ("Environment", run.facts["environment"]),
    ):
        if entries:
            console.print(_mapping(title, entries))
    if run.train:
        console.print(_losses(run.train))
    if run.evaluations:
        console.print(_evaluations(run))
    if run.facts["summary"]:
        console.print(_mapping("Summary", run.facts["summary"]))


def _show_head(run: Run, console: Console) -> None:
    facts = run.facts
    code = facts["code"]
    core = f"core {code['core']}, " if code.get("core") else ""
    commit = f"{code.get('commit') or 'unknown'}{' (with local changes)' if code.get('dirty') else ''}"
    ended = f", ended {facts['finished']}" if facts["finished"] else ""
    weights, source = facts["initial_weights"], facts.get("resumed_from")
    rows = {
        "Run": f"{facts['name']} ({run.path})",
        "Status": f"{facts['status']}, started {facts['started']}{ended}",
        "Door": {"megatron_lm": "Megatron-LM flags", "bridge": "Megatron Bridge recipe"}.get(facts["door"], "Python"),
        "As flags": facts["command"].get("flags"),
        "As a recipe": facts["command"].get("overrides"),
        "Code": f"lockstep {facts['lockstep_version']}, {core}commit {commit}",
        "Packages": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        "Resumed from": source and f"{source['checkpoint']}, iteration {source['iteration']}",
        "Initial weights": weights and f"{weights['fingerprint']} ({len(weights['parameters'])} parameters)",
    }
    for name, value in rows.items():
        if value:
            console.print(Text(f"{name}: ", style="bold").append(str(value), style="not bold"), soft_wrap=True)


def _show_settings(run: Run, console: Console) -> None:
    known = all_fields()
    table = Table("Key", "Value", "Default", "From", title="Differs from the defaults", title_justify="left")
    for path, value in run.config.items():
        default = encode(known[path].default) if path in known else None
        if path not in known or value != default:
            table.add_row(path, _text(value), _text(default), Text(run.origins.get(path, "")))
    console.print(table)


def _mapping(title: str, entries: dict[str, Any]) -> Table:
    table = Table("", "", title=title, title_justify="left", show_header=False)
    for name, value in entries.items():
        table.add_row(name, _text(value))
    return table


def _losses(lines: list[TrainLine]) -> Table:
    table = Table(title=f"Training, {len(lines)} iterations", title_justify="left")
    for name in ("Iteration", "lm loss", "Grad norm", "LR", "Samples", "Tokens/s"):
        table.add_column(name, justify="right")
    shown = lines if len(lines) <= 2 * EDGE_ROWS + 1 else [*lines[:EDGE_ROWS], None, *lines[-EDGE_ROWS:]]
    for line in shown:
        if line is None:
            table.add_row(*["..."] * 6)
            continue
        loss = _number(line.lm_loss) + (" (skipped)" if line.skipped else "")
        speed = "" if line.tokens_per_second is None else f"{line.tokens_per_second:,.0f}"
        table.add_row(
            str(line.iteration), loss, _number(line.grad_norm), _number(line.lr), _text(line.consumed_samples), speed
        )
    return table


def _evaluations(run: Run) -> Table:
    table = Table(title="Evaluations", title_justify="left")
    for name in ("Iteration", "Split", "lm loss", "PPL", "Samples"):
        table.add_column(name, justify="right")
    for line in run.evaluations:
        split = f"{line.split} (final)" if line.final else line.split
        table.add_row(str(line.iteration), split, _number(line.lm_loss), _number(line.ppl), _text(line.samples))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


def _text(value: Any) -> Text:
    if value is None:
        return Text("-")
    return Text(value if isinstance(value, str) else json.dumps(value))
