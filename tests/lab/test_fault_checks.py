"""A planted fault is named by the check of its stage: with that check taken out of the walk it is not."""

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lockstep.lab.localise import stages, walk
from lockstep.lab.localise.localise import Localised, judge
from lockstep.lab.localise.probes import load_probes
from lockstep.lab.localise.worker import RUN, TWIN, Job
from tests.lab import faults
from tests.lab.command_pairs import trained

_CHECKS = {
    stages.FEATURES: "norm epsilon of the module",
    stages.DATA: "labels shifted",
    stages.WEIGHTS: "another seed",
    stages.STATE: "moments not restored",
    stages.SCHEDULE: "schedule off",
    stages.FORWARD: "norm epsilon in the kernel",
    stages.LOSS: "tokens counted twice",
    stages.GRADIENTS: "activation's backward",
    stages.REDUCED: "last micro-batch alone",
    stages.NORM: "norm leaves a parameter out",
    stages.CLIPPED: "clipped twice",
    stages.UPDATE: "Adam's epsilon in the update",
    stages.AFTER: "model keeps its weights",
}


def _named(found: Localised) -> tuple[str, str] | None:
    first = found.walked.first
    return None if first is None else (first.stage, first.name)


def test_every_check_is_taken_out_once() -> None:
    # The surroundings and the settings are told; no fault of a run shows there.
    assert set(_CHECKS) == {stages.FEATURES, *stages.ITERATION}


def _jobs(name: str, folder: Path) -> tuple[Job, Job]:
    """Return the jobs of the clean side and of the one with a fault."""
    fault, start, other = faults.FAULTS[name], folder / "a", folder / "b"
    clean, planted = faults.job_of(None, start, start, fault.kind), faults.job_of(name, other, start)
    if not fault.resumed:
        return clean, planted
    saved, job = str(folder / "saved"), faults.JOBS[fault.kind]
    saving = {"checkpoint.save": saved, "checkpoint.save_interval": 2}
    assert trained({**job, **saving}, str(folder / "run"), 1) == "finished"
    tree = faults.config({**job, "checkpoint.load": saved, "checkpoint.ckpt_step": 2})
    return replace(clean, iterations=[3]), replace(planted, iterations=[3], config=tree)


@pytest.mark.slow
@pytest.mark.parametrize("check", _CHECKS)
def test_without_its_check_a_fault_is_not_named(check: str, tmp_path: Path) -> None:
    name = _CHECKS[check]
    fault, (clean, planted) = faults.FAULTS[name], _jobs(name, tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        assert faults.planted(None, clean) == 0
        assert faults.planted(name, planted) == 0
    sides = tuple(
        walk.Pass(label, label, load_probes(Path(job.folder), RUN), load_probes(Path(job.folder), TWIN))
        for label, job in (("A", clean), ("B", planted))
    )
    iterations = clean.iterations
    assert _named(judge((sides[0], sides[1]), iterations)) == (fault.stage, fault.tensor)
    rows = walk._Walker.rows

    def without(self: Any, iteration: int, stage: str) -> list[walk.Row]:
        return [] if stage == check else rows(self, iteration, stage)

    patches: list[Any] = [mock.patch.object(walk._Walker, "rows", without)]
    if check == stages.FEATURES:
        patches.append(mock.patch.object(walk, "disagreements", return_value=[]))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        found = _named(judge((sides[0], sides[1]), iterations))
    assert found is None or found[0] != check
