"""The training loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lockstep.parallel import Axis
from lockstep.training.batches import BatchSchedule, evaluation_due
from lockstep.training.device import HostCopy, peak_memory_bytes
from lockstep.training.evaluate import Evaluator, Split
from lockstep.training.exits import ExitRule
from lockstep.training.feed import Feed, Hashes, batch_hashes
from lockstep.training.hooks import Hook, IterationReport, Progress, RunInfo
from lockstep.training.schedule import LearningRateSchedule, WeightDecaySchedule
from lockstep.training.step import Launched, TrainStep


@dataclass(frozen=True)
class Trainer:
    """What an iteration needs beside the hooks; absent in a run that only evaluates.

    ``params_norm`` returns the norm of the weights where it is logged.
    """

    feed: Feed
    step: TrainStep
    batches: BatchSchedule
    learning_rate: LearningRateSchedule
    weight_decay: WeightDecaySchedule
    params_norm: Callable[[], torch.Tensor] | None = None
    dp: Axis = field(default_factory=Axis)


@dataclass(frozen=True)
class Running:
    """An iteration whose work the device has been given; its results are not read yet.

    ``consumed_samples`` and ``stepped_samples`` are those after it, see ``Progress``; ``started`` is on the clock of
    ``time.perf_counter``.
    """

    iteration: int
    consumed_samples: int
    stepped_samples: int
    global_batch_size: int
    step: Launched
    lr: float
    next_lr: float
    weight_decay: float
    params_norm: HostCopy | None
    hashes: Callable[[], Hashes]
    started: float
    memory_bytes: int


def train(
    info: RunInfo,
    trainer: Trainer,
    evaluator: Evaluator | None,
    hooks: Sequence[Hook],
    progress: Progress,
    exit_rule: ExitRule,
) -> str | None:
    """Train to the last iteration; return the reason when the run stops before it."""
    while progress.iteration < info.train_iters:
        for hook in hooks:
            hook.before_step(progress.iteration + 1)
        running = begin(info, trainer, progress)
        if running.iteration < info.train_iters:
            trainer.feed.prepare(trainer.batches.micro_batches_at(running.consumed_samples), info.device)
        report = finish(running, progress)
        for hook in hooks:
            hook.after_step(report)
        if evaluator is not None and "valid" in evaluator.splits and evaluation_due(info.config, progress.iteration):
            run_evaluation(evaluator, "valid", hooks, progress, final=False)
        reason = exit_rule.reason(progress.iteration)
        for hook in hooks:
            hook.after_iteration(progress, stopping=reason is not None)
        if reason is not None:
            return reason
    return None


def run_iteration(info: RunInfo, trainer: Trainer, progress: Progress) -> IterationReport:
    """Take one step on the next global batch and move ``progress`` on."""
    return finish(begin(info, trainer, progress), progress)


def begin(info: RunInfo, trainer: Trainer, after: Progress | Running) -> Running:
    """Give the device the work of the iteration that follows."""
    started = time.perf_counter()
    batches, done = trainer.batches, after.stepped_samples
    lr, weight_decay = trainer.learning_rate(done), trainer.weight_decay(done)
    batch = trainer.feed.next(batches.micro_batches_at(after.consumed_samples))
    samples = len(batch) * trainer.dp.size
    hashes = batch_hashes(batch, batches.micro_batch_size, trainer.dp, info.device, info.config.dataset.sft)
    step = trainer.step.launch(batch.to(info.device), batches.micro_batch_size, lr, weight_decay)
    stepped = done if step.skipped else done + samples
    return Running(
        iteration=after.iteration + 1,
        consumed_samples=after.consumed_samples + samples,
        stepped_samples=stepped,
        global_batch_size=samples,
        step=step,
        lr=lr,
        next_lr=trainer.learning_rate(stepped),
        weight_decay=weight_decay,
        params_norm=None if trainer.params_norm is None else HostCopy(trainer.params_norm()),
        hashes=hashes,
        started=started,
        memory_bytes=peak_memory_bytes(info.device),
    )


def finish(running: Running, progress: Progress) -> IterationReport:
    """Wait for the results of an iteration and move ``progress`` on."""
    hashes = running.hashes()  # while the device works
    result = running.step.result()
    params_norm = None if running.params_norm is None else float(running.params_norm.read())
    progress.iteration = running.iteration
    progress.consumed_samples = running.consumed_samples
    progress.stepped_samples = running.stepped_samples
    progress.lm_loss = result.lm_loss
    return IterationReport(
        iteration=running.iteration,
        consumed_samples=running.consumed_samples,
        global_batch_size=running.global_batch_size,
        step=result,
        lr=running.lr,
        next_lr=running.next_lr,
        weight_decay=running.weight_decay,
        params_norm=params_norm,
        batch_hash=hashes.batch,
        micro_batch_hashes=hashes.micro_batches,
        seconds=time.perf_counter() - running.started,
        memory_bytes=running.memory_bytes,
    )


def run_evaluation(
    evaluator: Evaluator, split: Split, hooks: Sequence[Hook], progress: Progress, *, final: bool
) -> None:
    """Evaluate a split between two iterations, or after the last one where ``final``."""
    batches = evaluator.eval_iters
    for hook in hooks:
        hook.before_evaluation(split, progress.iteration, final, evaluator.samples, batches)

    def show(batch: int) -> None:
        for hook in hooks:
            hook.evaluation_progress(final, batch, batches)

    evaluation = evaluator.evaluate(split, progress.iteration, final, show)
    if evaluation is not None:
        progress.evaluations.append(evaluation)
    for hook in hooks:
        hook.after_evaluation(evaluation, progress)
