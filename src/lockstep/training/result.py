"""What a run is called with and what it returns."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

RunStatus = Literal["finished", "stopped early"]


@dataclass(frozen=True)
class Command:
    """How a run was started: the arguments as given, and the same job in the spelling of each door.

    ``flags`` is the Megatron-LM command line, ``overrides`` the recipe with its overrides; None where a door has no
    spelling for it.
    """

    argv: list[str] = field(default_factory=list)
    flags: str | None = None
    overrides: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: mean loss per token (natural log) over ``samples`` samples after ``iteration`` iterations."""

    iteration: int
    split: Literal["valid", "test"]
    final: bool
    lm_loss: float
    ppl: float
    samples: int


@dataclass(frozen=True)
class RunResult:
    """What a run did: its directory, how it ended, the last training loss (None without training), evaluations."""

    run_dir: Path
    status: RunStatus
    iterations: int
    lm_loss: float | None
    evaluations: tuple[Evaluation, ...]
