"""What a run prints: Megatron-LM's lines, after a few of its own that say what runs where."""

import os
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from lockstep.training.hooks import Hook, IterationReport, Progress, RunInfo
from lockstep.training.result import Evaluation, RunResult

LOSS_KEY = "lm loss"


def say(text: str) -> None:
    """Print a line at once, also into a pipe; of several processes under a launcher, the first one prints."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


class Interval:
    """Losses and times since the last reset, for the averages of a console line.

    ``any_loss`` tells whether any iteration of the process was not skipped; it outlives resets.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._since: float | None = None
        self.any_loss = False
        self.reset()

    def reset(self) -> None:
        """Forget all iterations; the time of the next ones counts from now."""
        self.loss_sum = 0.0
        self.router_sums: dict[str, float] = {}
        self.advanced = 0
        self.skipped = 0
        self.nan = 0
        self._seconds = 0.0
        if self._since is not None:
            self._since = self._clock()

    def start(self) -> None:
        """Let the time run."""
        self._since = self._clock()

    def resume(self) -> None:
        """Let the time run where it is held."""
        if self._since is None:
            self.start()

    def stop(self) -> None:
        """Hold the time, as during evaluations."""
        if self._since is not None:
            self._seconds += self._clock() - self._since
            self._since = None

    def add(self, loss: float, skipped: bool, router_losses: Mapping[str, float] | None = None) -> None:
        """Count an iteration; the losses of a skipped one stay out of the averages."""
        if skipped:
            self.skipped += 1
            self.nan += loss != loss or loss in (float("inf"), float("-inf"))
        else:
            self.advanced += 1
            self.loss_sum += loss
            for name, value in (router_losses or {}).items():
                self.router_sums[name] = self.router_sums.get(name, 0.0) + value
            self.any_loss = True

    @property
    def average_loss(self) -> float:
        """Mean loss over the iterations that were not skipped."""
        return self.loss_sum / max(1, self.advanced)

    @property
    def seconds_per_iteration(self) -> float:
        """Mean wall time of an iteration, skipped ones included."""
        running = self._clock() - self._since if self._since is not None else 0.0
        return (self._seconds + running) / max(1, self.advanced + self.skipped)


def train_line(
    report: IterationReport, interval: Interval, train_iters: int, now: datetime, tflops: float | None = None
) -> str:
    """Return Megatron-LM's line of an iteration; ``tflops`` is TFLOP/s per GPU where throughput is logged."""
    step = report.step
    parts = [
        f" [{now:%Y-%m-%d %H:%M:%S.%f}] iteration {report.iteration:8d}/{train_iters:8d} |",
        f" consumed samples: {report.consumed_samples:12d} |",
        f" elapsed time per iteration (ms): {interval.seconds_per_iteration * 1000.0:.1f} |",
    ]
    if tflops is not None:
        parts.append(f" throughput per GPU (TFLOP/s/GPU): {tflops:.1f} |")
    parts += [f" learning rate: {report.next_lr:.6E} |", f" global batch size: {report.global_batch_size:5d} |"]
    # As in Megatron-LM: no loss before the first iteration that made a step, nor a negative or NaN one.
    if interval.any_loss and interval.average_loss >= 0.0:
        parts.append(f" {LOSS_KEY}: {interval.average_loss:.6E} |")
    parts += [
        f" {name}: {total / max(1, interval.advanced):.6E} |"
        for name, total in interval.router_sums.items()
        if total >= 0.0
    ]
    parts.append(f" loss scale: {step.loss_scale:.1f} |")
    if step.grad_norm is not None:
        parts.append(f" grad norm: {step.grad_norm:.3f} |")
    if step.num_zeros is not None:
        parts.append(f" num zeros: {step.num_zeros} |")
    if report.params_norm is not None:
        parts.append(f" params norm: {report.params_norm:.3f} |")
    parts += [
        f" number of skipped iterations: {interval.skipped:3d} |",
        f" number of nan iterations: {interval.nan:3d} |",
    ]
    return "".join(parts)


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Return Megatron-LM's three lines of an evaluation."""
    place = {"valid": " on validation set", "test": " on test set"}[evaluation.split] if evaluation.final else ""
    text = (
        f" validation loss at iteration {evaluation.iteration}{place} | "
        f"{LOSS_KEY} value: {evaluation.lm_loss:.6E} | {LOSS_KEY} PPL: {evaluation.ppl:.6E} | "
    )
    rule = "-" * (len(text) + 1)
    return [rule, text, rule]


def dataset_size_lines(train: int, valid: int, test: int) -> list[str]:
    """Return Megatron-LM's lines with the samples that the splits are built for."""
    return [
        " > datasets target sizes (minimum size):",
        f"    train:      {train}",
        f"    validation: {valid}",
        f"    test:       {test}",
    ]


def parameters_line(count: int) -> str:
    """Return Megatron-LM's line with the number of weights."""
    return f" > number of parameters on (tensor, gtp_weight_remat, pipeline) model parallel rank (0, 0, 0): {count}"


def timestamped(text: str) -> str:
    """Return Megatron-LM's form of an event with its time."""
    return f"[{text}] datetime: {datetime.now():%Y-%m-%d %H:%M:%S} "


class ConsoleHook(Hook):
    """Prints the lines of training and evaluation.

    The first iteration is always printed, and stays in the averages of the next line, as in Megatron-LM.
    """

    def __init__(self, log_interval: int, log_throughput: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._log_interval = log_interval
        self._log_throughput = log_throughput
        self._interval = Interval(clock)
        self._first = True

    def on_start(self, info: RunInfo) -> None:
        """Start the time of the first iteration."""
        self._info = info
        say("skipping training (--skip-train is on) ..." if info.config.validation.skip_train else "training ...")
        self._interval.start()

    def after_step(self, report: IterationReport) -> None:
        """Print the line of an iteration when it is time."""
        self._interval.add(report.step.lm_loss, report.step.skipped, report.step.router_losses)
        if not self._first and report.iteration % self._log_interval:
            return
        flops = self._info.flops_per_sample * report.global_batch_size
        flops /= self._info.processes
        tflops = flops / self._interval.seconds_per_iteration / 1e12 if self._log_throughput else None
        say(train_line(report, self._interval, self._info.train_iters, datetime.now(), tflops))
        if not self._first:
            self._interval.reset()
        self._first = False

    def after_iteration(self, progress: Progress, stopping: bool) -> None:
        """Hold the time, as checkpoints are saved now."""
        self._interval.stop()

    def before_step(self, iteration: int) -> None:
        """Let the time run on."""
        self._interval.resume()

    def before_evaluation(self, split: str, iteration: int, final: bool, samples: int, batches: int) -> None:
        """Hold the time; announce an evaluation after training."""
        self._interval.stop()
        if final:
            say(f"Evaluating on {samples} samples")

    def evaluation_progress(self, final: bool, batch: int, batches: int) -> None:
        """Show how far an evaluation after training is."""
        if final:
            say(f"Evaluating iter {batch}/{batches}")

    def after_evaluation(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """Print the result and let the time run on."""
        if evaluation is None:
            say("Exiting during evaluation, timelimit reached")
        else:
            for line in evaluation_lines(evaluation):
                say(line)
        self._interval.start()

    def on_finish(self, result: RunResult) -> None:
        """Say where the record is."""
        say(f"run record: {result.run_dir}")
