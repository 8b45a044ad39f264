"""Pairs of sides whose probes are written in this process or in processes of one start, and judged by the walk."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.lab.localise.localise import Localised, judge
from lockstep.lab.localise.probes import load_probes
from lockstep.lab.localise.walk import Pass
from lockstep.lab.localise.worker import RUN, TWIN, Job
from tests.lab import faults
from tests.parallel.spawn import Turn, in_turn


@dataclass(frozen=True)
class Row:
    """What one pair gave: of a planted fault where ``stage`` is expected, else of a clean pair.

    ``way`` says how a fault was judged, ``compared`` what `lockstep compare` said of it.
    """

    name: str
    where: str
    found: Localised
    stage: str = ""
    tensor: str = ""
    way: str = ""
    compared: str = ""

    @property
    def named(self) -> tuple[str, str]:
        """The stage and the tensor that the walk stops at."""
        first = self.found.walked.first
        return ("", "") if first is None else (first.stage, first.name)


def as_pass(label: str, folder: Path, foreign: bool = False) -> Pass:
    """Return the probes of a folder as a side."""
    return Pass(label, folder.name, load_probes(folder, RUN), load_probes(folder, TWIN), foreign=foreign)


def alone(job: Job, name: str | None = None) -> None:
    """Do a job in this process, with a fault planted where one is named."""
    with contextlib.redirect_stdout(io.StringIO()):
        if faults.planted(name, job):
            raise RuntimeError(f"{name or 'clean run'}: probing failed")


def together(turns: Sequence[Turn]) -> None:
    """Do jobs on several processes, which are started once."""
    for turn, results in zip(turns, in_turn(turns), strict=True):
        if results != [0] * turn.processes:
            raise RuntimeError(f"{turn.arguments[0] or turn.arguments[1].config['model']}: {results}")


def judged(a: Path, b: Path) -> Localised:
    """Return what the walk makes of the probes of two folders."""
    return judge((as_pass("A", a), as_pass("B", b)), [1])
