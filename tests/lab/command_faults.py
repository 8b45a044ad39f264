"""Planted faults through the commands that users give: both sides train, then ``compare`` and ``localise`` judge them.

The fault is in the run of one side, and in the processes that ``localise`` starts for that side: as if it stood in the
code of that run. One process is run again in this one, several by way of the launcher.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from lockstep.cli import main as lockstep
from lockstep.lab.localise import localise as localising
from lockstep.lab.localise import report
from lockstep.lab.localise.localise import Localised
from lockstep.lab.localise.sides import Rerun, run_again
from lockstep.lab.localise.worker import Job
from tests.lab import command_pairs, faults
from tests.lab.faults import FAULTS, JOBS
from tests.parallel.spawn import Turn, in_turn

SAVED, LONGER = 2, {"train.train_iters": 5}
"""The iteration that a resumed side goes on after, and how long all train: moments show two iterations later."""


def trained(name: str | None, settings: dict[str, Any], run_dir: str) -> str:
    """Train with a fault planted, or with None without."""
    with FAULTS[name].plant() if name else contextlib.nullcontext():
        return command_pairs.trained(settings, run_dir, 1)


def train_all(names: Sequence[str], folder: Path) -> dict[str, tuple[Path, Path]]:
    """Train both sides of faults and return their run directories; clean runs serve all faults of their job."""
    clean: dict[str, Path] = {}
    turns, found = [], {}
    for number, name in enumerate(names):
        fault, run_dir = FAULTS[name], folder / f"fault-{number}"
        job, changes = {**JOBS[fault.kind], **LONGER}, dict(fault.layout)
        if fault.kind not in clean:
            clean[fault.kind] = folder / f"clean-{len(clean)}"
            saving = {"checkpoint.save": f"{clean[fault.kind]}-saved", "checkpoint.save_interval": SAVED}
            turns.append(Turn(1, trained, (None, {**job, **saving}, str(clean[fault.kind]))))
        if fault.resumed:
            changes |= {"checkpoint.load": f"{clean[fault.kind]}-saved", "checkpoint.ckpt_step": SAVED}
        if fault.before:
            changes["dataset.path_to_cache"] = f"{run_dir}-cache"
            turns.append(Turn(1, trained, (name, {**job, **changes, **fault.before}, f"{run_dir}-before")))
        turns.append(Turn(fault.processes, trained, (name, {**job, **changes}, str(run_dir))))
        found[name] = clean[fault.kind], run_dir
    for turn, ends in zip(turns, in_turn(turns), strict=True):
        if ends != ["finished"] * turn.processes:
            raise RuntimeError(f"{turn.arguments[0] or 'clean run'}: {ends}")
    return found


@contextmanager
def _planted_in_b(name: str) -> Iterator[None]:
    """Plant a fault in the processes that ``localise`` runs for its side B."""

    def again(side: Rerun, label: str, iterations: Sequence[int], folder: Path, start: Path | None, say: Any) -> None:
        fault = name if label == "B" else None
        if side.processes > 1:
            planting = side if fault is None else replace(side, worker=("-m", "tests.lab.faults", fault))
            run_again(planting, label, iterations, folder, start, say)
            return
        folder.mkdir(parents=True, exist_ok=True)
        job = Job(side.config, list(iterations), str(folder), None if start is None else str(start))
        with contextlib.redirect_stdout(io.StringIO()):
            if faults.planted(fault, job):
                raise RuntimeError(f"{fault or 'clean run'}: probing failed")

    with mock.patch.object(localising, "run_again", again):
        yield


def judged(name: str, a: Path, b: Path, out: Path) -> tuple[str, Localised]:
    """Give two run directories to both commands; return the verdict of ``compare`` and what ``localise`` found."""
    found: list[Localised] = []

    def kept(localised: Localised) -> Any:
        found.append(localised)
        return as_json(localised)

    as_json = report.as_json
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        lockstep(["compare", str(a), str(b), "--json", "--out", str(out / "compare")])
    verdict = str(json.loads(printed.getvalue())["verdict"])
    with (
        _planted_in_b(name),
        mock.patch.object(report, "as_json", kept),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        lockstep(["localise", str(a), str(b), "--json", "--out", str(out / "localise")])
    return verdict, found[0]
