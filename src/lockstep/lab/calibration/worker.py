"""Runs of one layout, one after the other: the process that a calibration starts.

``python -m lockstep.lab.calibration.worker JOBS`` or the same under torchrun; JOBS is a file with a list of `Job`.
"""

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.config import ConfigContainer, Origin
from lockstep.errors import UserError
from lockstep.guard import run as guarded
from lockstep.lab.localise.worker import config_of
from lockstep.parallel import Mesh, start_processes
from lockstep.record.schema import encode
from lockstep.training.device import choose_device, switches
from lockstep.training.exits import ExitRule
from lockstep.training.hooks import Progress, RunInfo
from lockstep.training.loop import run_iteration
from lockstep.training.setup import Alter, build

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}


@dataclass(frozen=True)
class Job:
    """One short run.

    Attributes:
        title: what it is, in a few words.
        config: the resolved tree, nested, as a record keeps it.
        iterations: how many it takes.
        output: the file for its losses and gradient norms.
        seed: of the perturbation of initial weights; None for none.
    """

    title: str
    config: dict[str, dict[str, Any]]
    iterations: int
    output: str
    seed: int | None = None


def save(jobs: list[Job], path: Path) -> None:
    """Write jobs to a file."""
    path.write_text(json.dumps([encode(asdict(job)) for job in jobs]), encoding="utf-8")


def main(argv: list[str]) -> int:
    """Do the jobs in the file that is named."""
    jobs = [Job(**entry) for entry in json.loads(Path(argv[0]).read_text(encoding="utf-8"))]
    return guarded(lambda: work(jobs))


def work(jobs: list[Job]) -> int:
    """Do all jobs; their configs have one layout and one device."""
    config = config_of(jobs[0].config)
    device = choose_device(config.run.device)
    with start_processes(config, device) as mesh:
        for job in jobs:
            config = config_of(job.config)
            with switches(config, device):
                lines = train(config, device, mesh, job)
            if mesh.leads:
                Path(job.output).write_text(json.dumps(encode(lines)), encoding="utf-8")
    return 0


def train(config: ConfigContainer, device: torch.device, mesh: Mesh, job: Job) -> list[dict[str, Any]]:
    """Take the steps of a job and return loss and gradient norm of each.

    Raises:
        UserError: the run begins from a checkpoint, or does not train.
    """
    for path in ("checkpoint.save", "run.dir"):
        config.set(path, None, Origin("file", "calibration"))
    alter = None if job.seed is None else perturbation(job.seed)
    parts = build(config, device, mesh, ExitRule(time.monotonic()), alter)
    if parts.trainer is None:
        raise UserError("the run does not train: there is no curve to calibrate")
    info = RunInfo(config, "calibration", Path(), device, parts.train_iters, parts.flops_per_sample)
    progress, lines = Progress(), []
    while progress.iteration < min(job.iterations, parts.train_iters):
        step = run_iteration(info, parts.trainer, progress).step
        lines.append({"iteration": progress.iteration, "lm_loss": step.lm_loss, "grad_norm": step.grad_norm})
    return lines


def perturbation(seed: int) -> Alter:
    """Return what moves every weight by one ulp of its dtype, up or down by chance; zeros stay zeros.

    The chances depend on the seed and the name of a parameter, not on the layout.
    """

    def alter(name: str, value: torch.Tensor) -> torch.Tensor:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        up = torch.randint(0, 2, value.shape, generator=generator).to(value.device) * 2 - 1
        exact = value.double()
        exponent = torch.frexp(exact).exponent - 1 - _MANTISSA_BITS[value.dtype]
        ulp = torch.ldexp(torch.ones_like(exact), exponent)
        return torch.where(exact == 0, exact, exact + up * ulp).to(value.dtype)

    return alter


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
