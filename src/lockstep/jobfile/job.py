"""What a job file says: the machines that are asked for and the training command that they run."""

import re
from dataclasses import dataclass, field

from lockstep.errors import UserError

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST_NAME = 52  # Kubernetes adds the number of the pod, and allows 63 characters
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Job:
    """A training command and what it runs on.

    Attributes:
        name: of the job; lower-case letters, digits and '-'.
        command: words after the Python interpreter: a script or ``-m module``, and its arguments.
        nodes: machines; each starts one torchrun.
        gpus_per_node: GPUs of a machine, one process each.
        python: interpreter on the machines.
        port: where torchrun's processes find each other on the first machine.
        environment: variables set to a value.
        passed_on: variables taken from the environment of whoever submits the job.
        cpus_per_node: CPU cores asked for on each machine.
        time_s: longest running time in seconds.
        image: container image.
    """

    name: str
    command: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    python: str
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    passed_on: tuple[str, ...] = ()
    cpus_per_node: int | None = None
    time_s: int | None = None
    image: str | None = None

    @property
    def world_size(self) -> int:
        """How many processes train."""
        return self.nodes * self.gpus_per_node

    @property
    def launcher(self) -> list[str]:
        """The words that start torchrun on a machine, without how many processes there are and where they meet."""
        return [self.python, "-m", "torch.distributed.run"]

    @property
    def size(self) -> list[str]:
        """Torchrun's options on how many processes there are."""
        return [f"--nnodes={self.nodes}", f"--nproc_per_node={self.gpus_per_node}"]


def check_name(name: str) -> str:
    """Return the name of a job.

    Raises:
        UserError: Kubernetes would refuse it; Slurm takes the same names here, so that they can be exchanged.
    """
    if not _LABEL.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise UserError(
            f"--name {name}: use lower-case letters, digits and '-', beginning with a letter, not ending with '-', "
            f"at most {_LONGEST_NAME} characters"
        )
    return name


def seconds_of(time: str) -> int:
    """Return the seconds of a time as Slurm writes it: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s.

    Raises:
        UserError: it is none of these, or zero.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time {time}: write minutes, h:mm:ss or days-h:mm:ss")
    numbers = [int(number) for number in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, *[*numbers, 0][:2]
    total = ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"--time {time}: give the job some time")
    return total


def split_environment(words: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Split ``NAME=VALUE`` words from ``NAME`` words.

    Raises:
        UserError: a name that no shell takes, or one that is given twice.
    """
    values: dict[str, str] = {}
    passed_on: list[str] = []
    for word in words:
        name, given, value = word.partition("=")
        if not _VARIABLE.fullmatch(name):
            raise UserError(f"--env {word}: write NAME=VALUE or NAME, of letters, digits and '_'")
        if name in values or name in passed_on:
            raise UserError(f"--env {name} is given twice; drop one")
        if given:
            values[name] = value
        else:
            passed_on.append(name)
    return values, tuple(passed_on)
