"""The one trainer: it runs a resolved configuration and never knows which door it came through."""

from lockstep.training.result import Command, Evaluation, RunResult
from lockstep.training.run import run

__all__ = ["Command", "Evaluation", "RunResult", "run"]
