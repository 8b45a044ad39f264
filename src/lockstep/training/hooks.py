"""Hooks of the training loop: fixed names, called in the order the run lists them."""

import gc
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lockstep.config import ConfigContainer
from lockstep.errors import UserError
from lockstep.record.schema import OPTIONAL_KEYS, EvaluationLine, TrainLine
from lockstep.record.writer import RunWriter
from lockstep.training.result import Evaluation, RunResult
from lockstep.training.step import StepResult


@dataclass(frozen=True)
class RunInfo:
    """What stays the same over a run.

    ``flops_per_sample`` counts the floating-point operations of one training sample, forward and backward.
    """

    config: ConfigContainer
    name: str
    run_dir: Path
    device: torch.device
    train_iters: int
    flops_per_sample: float
    processes: int = 1


@dataclass
class Progress:
    """How far a run is: completed iterations, consumed samples, evaluations, and the loss of the last iteration.

    ``stepped_samples`` counts only samples of successful optimizer steps: the position in the schedules. The results of
    the last iteration were known at ``known_at``, on the clock of ``time.perf_counter``.
    """

    iteration: int = 0
    consumed_samples: int = 0
    stepped_samples: int = 0
    lm_loss: float | None = None
    known_at: float = 0.0
    evaluations: list[Evaluation] = field(default_factory=list)


@dataclass(frozen=True)
class IterationReport:
    """One finished iteration. ``lr`` and ``weight_decay`` were applied; ``next_lr`` is what the next one applies.

    ``seconds`` go from where the iteration began, or the results of the one before were known if that was later, to
    where its own were known.
    """

    iteration: int
    consumed_samples: int
    global_batch_size: int
    step: StepResult
    lr: float
    next_lr: float
    weight_decay: float
    params_norm: float | None
    batch_hash: str
    seconds: float
    memory_bytes: int
    micro_batch_hashes: list[str] = field(default_factory=list)


LEDGER_MICRO_BATCHES = 1024
"""Above this many micro-batches an iteration, the ledger has no entry for each."""


class Hook:
    """Called by the loop at fixed points; every method does nothing unless a subclass overrides it.

    On a GPU the next iteration may be on its way when an iteration is reported: a hook that looks at weights, at other
    state, or at what the device does says so in ``needs_state``, in the same way on all processes.
    """

    def needs_state(self, iteration: int) -> bool:
        """Tell whether the next iteration must not begin before everything after ``iteration`` is done."""
        return False

    def on_start(self, info: RunInfo) -> None:
        """Set-up is done; the first iteration or evaluation follows."""

    def before_step(self, iteration: int) -> None:
        """Iteration ``iteration`` (from 1) begins."""

    def after_step(self, report: IterationReport) -> None:
        """An iteration is finished, its update applied."""

    def before_evaluation(self, split: str, iteration: int, final: bool, samples: int, batches: int) -> None:
        """An evaluation begins, on ``samples`` samples in ``batches`` batches."""

    def evaluation_progress(self, final: bool, batch: int, batches: int) -> None:
        """Batch ``batch`` (from 1) of an evaluation begins."""

    def after_evaluation(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """An evaluation is finished; None when the time of the run ended it."""

    def after_iteration(self, progress: Progress, stopping: bool) -> None:
        """An iteration and what follows it is done; ``stopping`` tells that the run ends early here."""

    def after_training(self, progress: Progress) -> None:
        """The last iteration is done; the final evaluation follows."""

    def on_finish(self, result: RunResult) -> None:
        """The run ended as it should."""

    def on_failure(self, error: BaseException) -> None:
        """The run ended with an error."""


class RecordHook(Hook):
    """Writes the iterations and evaluations to the run record."""

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer

    def after_step(self, report: IterationReport) -> None:
        """Write the line of an iteration."""
        tokens = report.global_batch_size * self._seq_length
        line = TrainLine(
            iteration=report.iteration,
            lm_loss=report.step.lm_loss,
            grad_norm=report.step.grad_norm,
            lr=report.lr,
            next_lr=report.next_lr,
            weight_decay=report.weight_decay,
            loss_scale=report.step.loss_scale,
            consumed_samples=report.consumed_samples,
            global_batch_size=report.global_batch_size,
            valid_tokens=report.step.valid_tokens,
            batch_hash=report.batch_hash,
            skipped=report.step.skipped,
            seconds=report.seconds,
            tokens_per_second=tokens / report.seconds,
            memory_bytes=report.memory_bytes,
            router_losses=report.step.router_losses or None,
            ledger=_ledger(report),
        )
        self._writer.metrics(_line("train", line))

    def after_evaluation(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """Write the line of an evaluation."""
        if evaluation is not None:
            self._writer.metrics(_line("evaluation", EvaluationLine(**vars(evaluation))))

    def on_start(self, info: RunInfo) -> None:
        """Take note of the sample length, for tokens per second."""
        self._seq_length = info.config.model.seq_length or 0

    def on_finish(self, result: RunResult) -> None:
        """Close the record."""
        summary = {"ended": result.status, "iterations": result.iterations, "lm_loss": result.lm_loss}
        self._writer.finish("finished", summary=summary)

    def on_failure(self, error: BaseException) -> None:
        """Close the record as that of a failed run, with the error."""
        self._writer.finish("failed", summary={"error": f"{type(error).__name__}: {error}"})


def _ledger(report: IterationReport) -> dict[str, Any] | None:
    """Return the ledger of an iteration; of very many micro-batches only what does not grow with them."""
    if report.step.ledger is None:
        return None
    entries = {**vars(report.step.ledger), "hashes": report.micro_batch_hashes}
    if len(report.micro_batch_hashes) > LEDGER_MICRO_BATCHES:
        entries = {name: value for name, value in entries.items() if not isinstance(value, list)}
    return {name: value for name, value in entries.items() if value is not None}


def _line(kind: str, line: Any) -> dict[str, Any]:
    values = {key: value for key, value in vars(line).items() if key not in OPTIONAL_KEYS or value is not None}
    return {"kind": kind, **values}


class FiniteCheck(Hook):
    """Ends the run when a loss or gradient norm is not finite."""

    def after_step(self, report: IterationReport) -> None:
        """Check the numbers of an iteration.

        Raises:
            UserError: one of them is NaN or infinite.
        """
        for name, value in (("loss", report.step.lm_loss), ("gradient norm", report.step.grad_norm)):
            if value is not None and not math.isfinite(value):
                raise UserError(
                    f"iteration {report.iteration}: the {name} is {value}; lower optimizer.lr, or set "
                    "rerun_state_machine.check_for_nan_in_loss=false (--no-check-for-nan-in-loss-and-grad) to go on"
                )


class GarbageHook(Hook):
    """Collects Python garbage by hand: every ``interval`` iterations (0: never), and around evaluations."""

    def __init__(self, interval: int, around_evaluation: bool) -> None:
        self._interval = interval
        self._around_evaluation = around_evaluation

    def on_start(self, info: RunInfo) -> None:
        """Switch the automatic collector off."""
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()

    def after_step(self, report: IterationReport) -> None:
        """Collect when it is time."""
        if self._interval and report.iteration % self._interval == 0:
            gc.collect()

    def before_evaluation(self, split: str, iteration: int, final: bool, samples: int, batches: int) -> None:
        """Collect everything."""
        if self._around_evaluation:
            gc.collect()

    def after_evaluation(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """Collect what the evaluation left."""
        if self._around_evaluation:
            gc.collect(generation=0)

    def on_finish(self, result: RunResult) -> None:
        """Switch the automatic collector back on."""
        self._restore()

    def on_failure(self, error: BaseException) -> None:
        """Switch the automatic collector back on."""
        self._restore()

    def _restore(self) -> None:
        if self._was_enabled:
            gc.enable()


class CacheHook(Hook):
    """Gives cached GPU memory back: at level 1 after evaluations, at level 2 also after every iteration."""

    def __init__(self, level: int) -> None:
        self._level = level

    def after_step(self, report: IterationReport) -> None:
        """Empty the cache at level 2."""
        if self._level >= 2:
            torch.cuda.empty_cache()

    def after_evaluation(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """Empty the cache."""
        torch.cuda.empty_cache()
