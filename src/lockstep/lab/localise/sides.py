"""The two sides of a localisation: what they are, and running them again with probes on."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lockstep.errors import UserError
from lockstep.record import Run, load_run
from lockstep.record.schema import RUN_FILE

WORKER = ("-m", "lockstep.lab.localise.worker")
TRANSFORMERS, REFERENCE = "transformers", "reference"
HERE, COMMIT = "here", "commit:"
"""B as the same run by other code: that which is here, or that of a commit."""

_SHOWN_LINES = 12


@dataclass(frozen=True)
class Rerun:
    """A run of Lockstep that can be run again.

    Attributes:
        title: what to call it.
        config: its resolved tree, nested.
        processes: how many it had.
        record: what it wrote about itself; None for one that has not run yet.
        variables: environment that it had and that decides how many threads compute.
        commit: of the code that it ran by, or is to be run by; None where no commit tells it.
        dirty: that code had changes which are not in the commit.
        source: folder to import that code from; None for the code that is here.
        place: folder to run in; None for the current one.
        worker: the Python words that start one of its processes; the job follows.
    """

    title: str
    config: dict[str, dict[str, Any]]
    processes: int = 1
    record: Run | None = None
    variables: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool = False
    source: Path | None = None
    place: Path | None = None
    worker: tuple[str, ...] = WORKER

    @property
    def begins_after(self) -> int:
        """The iteration that it resumed from; 0 for a fresh run."""
        resumed = (self.record.facts.get("resumed_from") if self.record else None) or {}
        return 0 if resumed.get("finetune") else int(resumed.get("iteration", 0))


@dataclass(frozen=True)
class Foreign:
    """Another decoder that takes the steps of A: ``transformers``, ``reference`` or a Hugging Face folder."""

    kind: str
    folder: Path | None = None


def open_sides(a: str, b: str) -> tuple[Rerun, Rerun | Foreign]:
    """Return what the two words of the command name.

    Raises:
        UserError: A is no run, or B nothing that can be compared.
    """
    if a in (TRANSFORMERS, REFERENCE, HERE) or a.startswith(COMMIT) or _is_hf(Path(a)):
        raise UserError(f"{a} needs a run beside it: name the run first, as in `lockstep localise RUN {a}`")
    first = from_record(load_run(a))
    if b in (TRANSFORMERS, REFERENCE):
        return first, Foreign(b)
    if _is_hf(Path(b)):
        return first, Foreign("folder", Path(b))
    if b == HERE:
        return first, replace(first, title=f"{first.title} by the code here", record=None, commit=None, dirty=False)
    if b.startswith(COMMIT):
        return first, replace(first, record=None, commit=b.removeprefix(COMMIT), dirty=False)
    return first, from_record(load_run(b))


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / RUN_FILE).is_file()


def from_record(run: Run) -> Rerun:
    """Return a recorded run as a side.

    Raises:
        UserError: the record does not tell what it takes to run again.
    """
    layout = run.facts["features"].get("layout")
    if not layout or not run.config:
        raise UserError(f"{run.path} does not tell its layout: it ended before training; run it again")
    config = {section: dict(values) for section, values in run.facts["config"].items()}
    resumed = run.facts.get("resumed_from")
    if resumed and config["checkpoint"].get("load"):
        config["checkpoint"]["ckpt_step"] = int(resumed["iteration"])
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE")
    variables = {name: run.facts["environment"][name] for name in names if name in run.facts["environment"]}
    code = run.facts["code"]
    by = {"commit": code.get("commit"), "dirty": bool(code.get("dirty"))}
    return Rerun(str(run.path), config, int(layout["processes"]), run, variables, **by)


def from_checkpoint(side: Rerun, before: int) -> Rerun:
    """Return a side that begins at its own newest checkpoint before an iteration, where it saved one.

    What it does from there on is what the run did if resuming is exact; a fault of resuming would be taken in.
    """
    from lockstep.training.checkpoint_files import saved_iterations

    folder = side.config["checkpoint"].get("save")
    saved = [number for number in saved_iterations(Path(folder)) if number < before] if folder else []
    if not saved or max(saved) <= side.begins_after:
        return side
    start = {"load": folder, "ckpt_step": max(saved), "pretrained_checkpoint": None, "finetune": False}
    return replace(side, config={**side.config, "checkpoint": {**side.config["checkpoint"], **start}})


def run_again(
    side: Rerun, label: str, iterations: Sequence[int], folder: Path, start: Path | None, say: Callable[[str], None]
) -> None:
    """Run a side to the last of the iterations, in processes of its own, and have it write its probes.

    Raises:
        UserError: it fails; shows the last lines of its output.
    """
    from lockstep.lab.localise.worker import Job

    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.json"
    Job(side.config, list(iterations), str(folder), None if start is None else str(start.absolute())).save(job)
    words = [sys.executable, *side.worker, str(job)]
    if side.processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={side.processes}"]
        words = [sys.executable, *launcher, *side.worker, str(job)]
    count = "1 process" if side.processes == 1 else f"{side.processes} processes"
    say(f"[{label}] {side.title}: again to iteration {max(iterations)}, on {count}, then in float64")
    environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    if side.source is not None:
        paths = (str(side.source), environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    log = folder / "output.log"
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, **side.variables},
            cwd=side.place,
            check=False,
        ).returncode
    if code:
        raise UserError(f"{label} ended with exit code {code} ({log}): {_reason(log)}")


_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _reason(log: Path) -> str:
    """Return what a failed side said: its message to the user, or its last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line for line in lines if line.startswith("error: ")]
    return told[0].removeprefix("error: ") if told else "\n" + "\n".join(lines[-_SHOWN_LINES:])
