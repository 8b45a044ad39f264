"""A run that resumed from a checkpoint, together with the runs before it."""

from dataclasses import replace
from pathlib import Path

from lockstep.errors import UserError
from lockstep.record import Run, load_run


def with_past(run: Run) -> Run:
    """Return a resumed run with the iterations and the initial weights of the runs it continues.

    Where the record of the run before cannot be read, the past stays unknown and with it the initial weights.
    Fine-tuning begins a run of its own.
    """
    seen = {run.path.absolute()}
    while (start := _start(run)) is not None:
        iteration, parent_dir = start
        parent = _read(parent_dir) if parent_dir is not None and parent_dir.absolute() not in seen else None
        if parent is None:
            return replace(run, facts={**run.facts, "initial_weights": None})
        seen.add(parent.path.absolute())
        before = [line for line in parent.train if line.iteration <= iteration]
        evaluations = [line for line in parent.evaluations if line.iteration <= iteration and not line.final]
        past = {"initial_weights": parent.facts["initial_weights"], "resumed_from": parent.facts.get("resumed_from")}
        run = replace(
            run,
            facts={**run.facts, **past},
            train=[*before, *run.train],
            evaluations=[*evaluations, *run.evaluations],
        )
    return run


def past_note(run: Run) -> str | None:
    """Return a sentence on where a run began, as its own record has it; None for a fresh run."""
    start = _start(run)
    if start is None:
        return None
    iteration, parent_dir = start
    if parent_dir is None or _read(parent_dir) is None:
        return f"resumed at iteration {iteration}; the record of the run before, {parent_dir}, cannot be read"
    return f"resumed at iteration {iteration} of {parent_dir}; the iterations before are taken from there"


def _start(run: Run) -> tuple[int, Path | None] | None:
    source = run.facts.get("resumed_from")
    if not source or source.get("finetune"):
        return None
    parent_dir = source.get("run_dir")
    return int(source["iteration"]), Path(parent_dir) if parent_dir else None


def _read(run_dir: Path) -> Run | None:
    try:
        return load_run(run_dir)
    except UserError:
        return None
