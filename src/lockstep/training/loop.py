"""The training loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lockstep.parallel import Axis
from lockstep.training.batches import BatchSchedule, evaluation_due
from lockstep.training.device import HostCopy, is_asynchronous, peak_memory_bytes
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
    """Train to the last iteration; return the reason when the run stops before it.

    While the device works on one iteration, the host reports the one before: hooks and ``progress`` do not see that the
    next one has begun. It has not where something needs the state between the two, see ``due_now``.
    """
    ahead: Running | Exception | None = None
    while progress.iteration < info.train_iters:
        for hook in hooks:
            hook.before_step(progress.iteration + 1)
        if isinstance(ahead, Exception):
            raise ahead
        running = ahead or begin(info, trainer, progress)
        if running.iteration < info.train_iters:
            trainer.feed.prepare(trainer.batches.micro_batches_at(running.consumed_samples), info.device)
        late = is_asynchronous(info.device) and not due_now(info, trainer, evaluator, hooks, running.iteration)
        reason = exit_rule.reason(running.iteration) if late else None
        ahead = begin_early(info, trainer, running) if late and reason is None else None
        report = finish(running, progress)
        for hook in hooks:
            hook.after_step(report)
        if evaluator is not None and validates_after(info, evaluator, progress.iteration):
            run_evaluation(evaluator, "valid", hooks, progress, final=False)
        if not late:
            reason = exit_rule.reason(progress.iteration)
        for hook in hooks:
            hook.after_iteration(progress, stopping=reason is not None)
        if reason is not None:
            return reason
    return None


def due_now(
    info: RunInfo, trainer: Trainer, evaluator: Evaluator | None, hooks: Sequence[Hook], iteration: int
) -> bool:
    """Tell whether an iteration is to be reported before the next one begins; all processes give the same answer."""
    return (
        iteration >= info.train_iters
        or validates_after(info, evaluator, iteration)
        or trainer.step.observed
        or any(hook.needs_state(iteration) for hook in hooks)
    )


def validates_after(info: RunInfo, evaluator: Evaluator | None, iteration: int) -> bool:
    """Tell whether the validation split is evaluated after an iteration of training."""
    return evaluator is not None and "valid" in evaluator.splits and evaluation_due(info.config, iteration)


def run_iteration(info: RunInfo, trainer: Trainer, progress: Progress) -> IterationReport:
    """Take one step on the next global batch and move ``progress`` on."""
    return finish(begin(info, trainer, progress), progress)


def begin_early(info: RunInfo, trainer: Trainer, after: Running) -> Running | Exception:
    """Begin an iteration while the one before is not reported yet; what goes wrong waits until that is done."""
    try:
        return begin(info, trainer, after)
    except Exception as error:
        return error


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
    since, progress.known_at = max(running.started, progress.known_at), time.perf_counter()
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
        seconds=progress.known_at - since,
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
