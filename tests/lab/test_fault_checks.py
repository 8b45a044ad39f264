"""A planted fault is named by the check of its stage: with that check taken out of the walk it is not."""

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lockstep.lab.localise import stages, walk
from lockstep.lab.localise.localise import Localised, judge
from lockstep.lab.localise.probes import load_probes
from lockstep.lab.localise.worker import RUN, TWIN
from tests.lab import faults

_CHECKS = {
    stages.FEATURES: "norm epsilon of the module",
    stages.DATA: "labels shifted",
    stages.WEIGHTS: "another seed",
    stages.SCHEDULE: "schedule off",
    stages.FORWARD: "norm epsilon in the kernel",
    stages.LOSS: "tokens counted twice",
    stages.GRADIENTS: "activation's backward",
    stages.REDUCED: "last micro-batch alone",
    stages.CLIPPED: "clipped twice",
    stages.UPDATE: "Adam's epsilon in the update",
}


def _named(found: Localised) -> tuple[str, str] | None:
    first = found.walked.first
    return None if first is None else (first.stage, first.name)


@pytest.mark.slow
@pytest.mark.parametrize("check", _CHECKS)
def test_without_its_check_a_fault_is_not_named(check: str, tmp_path: Path) -> None:
    name = _CHECKS[check]
    fault = faults.FAULTS[name]
    start, other = tmp_path / "a", tmp_path / "b"
    with contextlib.redirect_stdout(io.StringIO()):
        assert faults.planted(None, faults.job_of(None, start, start, fault.kind)) == 0
        assert faults.planted(name, faults.job_of(name, other, start)) == 0
    sides = tuple(
        walk.Pass(label, label, load_probes(folder, RUN), load_probes(folder, TWIN))
        for label, folder in (("A", start), ("B", other))
    )
    assert _named(judge((sides[0], sides[1]), [1])) == (fault.stage, fault.tensor)
    rows = walk._Walker.rows

    def without(self: Any, iteration: int, stage: str) -> list[walk.Row]:
        return [] if stage == check else rows(self, iteration, stage)

    patches: list[Any] = [mock.patch.object(walk._Walker, "rows", without)]
    if check == stages.FEATURES:
        patches.append(mock.patch.object(walk, "disagreements", return_value=[]))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        found = _named(judge((sides[0], sides[1]), [1]))
    assert found is None or found[0] != check
