"""The training loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lockstep.parallel import Axis
from lockstep.training.batches import BatchSchedule, evaluation_due
from lockstep.training.device import peak_memory_bytes
from lockstep.training.evaluate import Evaluator, Split
from lockstep.training.exits import ExitRule
from lockstep.training.feed import Feed, batch_hashes
from lockstep.training.hooks import Hook, IterationReport, Progress, RunInfo
from lockstep.training.schedule import LearningRateSchedule, WeightDecaySchedule
from lockstep.training.step import TrainStep


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
    params_norm: Callable[[], float] | None = None
    dp: Axis = field(default_factory=Axis)


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
        report = run_iteration(info, trainer, progress)
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
    started = time.perf_counter()
    batches, done = trainer.batches, progress.stepped_samples
    lr, weight_decay = trainer.learning_rate(done), trainer.weight_decay(done)
    batch = trainer.feed.next(batches.micro_batches_at(progress.consumed_samples))
    samples = len(batch) * trainer.dp.size
    hashes = batch_hashes(batch, batches.micro_batch_size, trainer.dp, info.device, info.config.dataset.sft)
    result = trainer.step(batch.to(info.device), batches.micro_batch_size, lr, weight_decay)
    progress.iteration += 1
    progress.consumed_samples += samples
    progress.lm_loss = result.lm_loss
    if not result.skipped:
        progress.stepped_samples += samples
    return IterationReport(
        iteration=progress.iteration,
        consumed_samples=progress.consumed_samples,
        global_batch_size=samples,
        step=result,
        lr=lr,
        next_lr=trainer.learning_rate(progress.stepped_samples),
        weight_decay=weight_decay,
        params_norm=trainer.params_norm() if trainer.params_norm is not None else None,
        batch_hash=hashes.batch,
        micro_batch_hashes=hashes.micro_batches,
        seconds=time.perf_counter() - started,
        memory_bytes=peak_memory_bytes(info.device),
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
