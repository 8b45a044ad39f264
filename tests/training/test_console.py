"""The printed lines, character by character."""

import re
from dataclasses import replace
from datetime import datetime

import pytest

from lockstep.training.console import ConsoleHook, Interval, dataset_size_lines, evaluation_lines, train_line
from lockstep.training.hooks import IterationReport, Progress, RunInfo
from lockstep.training.result import Evaluation
from lockstep.training.step import StepResult

_NOW = datetime(2026, 8, 22, 10, 11, 12, 345678)
_STEP = StepResult(loss_sum=84.0, valid_tokens=8, grad_norm=0.7116, num_zeros=None, skipped=False, loss_scale=1.0)
_REPORT = IterationReport(
    iteration=1,
    consumed_samples=32,
    global_batch_size=32,
    step=_STEP,
    lr=3e-4,
    next_lr=2.73e-4,
    weight_decay=0.01,
    params_norm=None,
    batch_hash="0" * 16,
    seconds=0.1,
    memory_bytes=0,
)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _interval(seconds: float = 0.15) -> Interval:
    clock = Clock()
    interval = Interval(clock)
    interval.start()
    clock.now = seconds
    interval.add(_STEP.lm_loss, skipped=False)
    return interval


def test_train_line() -> None:
    assert train_line(_REPORT, _interval(), 10, _NOW) == (
        " [2026-08-22 10:11:12.345678] iteration        1/      10 | consumed samples:           32 |"
        " elapsed time per iteration (ms): 150.0 | learning rate: 2.730000E-04 | global batch size:    32 |"
        " lm loss: 1.050000E+01 | loss scale: 1.0 | grad norm: 0.712 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def test_train_line_with_every_optional_part() -> None:
    report = replace(_REPORT, step=replace(_STEP, num_zeros=7), params_norm=12.3456)
    line = train_line(report, _interval(), 10, _NOW, tflops=1.26)
    assert " elapsed time per iteration (ms): 150.0 | throughput per GPU (TFLOP/s/GPU): 1.3 | learning rate:" in line
    assert " grad norm: 0.712 | num zeros: 7 | params norm: 12.346 | number of skipped iterations:" in line


def test_train_line_with_losses_of_routers() -> None:
    interval = Interval(Clock())
    for value in (1.0, 2.0):
        interval.add(10.5, skipped=False, router_losses={"load_balancing_loss": value, "z_loss": 0.25})
    interval.add(10.5, skipped=True, router_losses={"load_balancing_loss": 9.0, "z_loss": 9.0})
    line = train_line(_REPORT, interval, 10, _NOW)
    assert " lm loss: 1.050000E+01 | load_balancing_loss: 1.500000E+00 | z_loss: 2.500000E-01 | loss scale:" in line


def test_line_of_a_skipped_iteration() -> None:
    """The loss is left out before any iteration made a step, and zero in a later line without one."""
    interval = Interval(Clock())
    interval.add(float("nan"), skipped=True)
    step = replace(_STEP, skipped=True, grad_norm=None, loss_scale=65536.0)
    line = train_line(replace(_REPORT, step=step), interval, 10, _NOW)
    assert line.endswith(
        " global batch size:    32 | loss scale: 65536.0 | number of skipped iterations:   1 |"
        " number of nan iterations:   1 |"
    )
    interval.add(10.0, skipped=False)
    interval.reset()
    interval.add(float("nan"), skipped=True)
    line = train_line(replace(_REPORT, step=step), interval, 10, _NOW)
    assert line.endswith(
        " lm loss: 0.000000E+00 | loss scale: 65536.0 | number of skipped iterations:   1 |"
        " number of nan iterations:   1 |"
    )


def test_loss_is_averaged_over_iterations_that_were_not_skipped() -> None:
    clock = Clock()
    interval = Interval(clock)
    interval.start()
    for loss, skipped in ((4.0, False), (100.0, True), (2.0, False)):
        interval.add(loss, skipped)
    clock.now = 6.0
    assert (interval.average_loss, interval.seconds_per_iteration, interval.skipped) == (3.0, 2.0, 1)
    interval.reset()
    assert (interval.average_loss, interval.seconds_per_iteration) == (0.0, 0.0)


def test_evaluations_do_not_count_as_iteration_time() -> None:
    clock = Clock()
    interval = Interval(clock)
    interval.start()
    clock.now = 1.0
    interval.stop()
    clock.now = 50.0
    interval.start()
    clock.now = 52.0
    interval.add(1.0, skipped=False)
    assert interval.seconds_per_iteration == 3.0


def test_saving_a_checkpoint_does_not_count_as_iteration_time() -> None:
    clock = Clock()
    hook = ConsoleHook(1, False, clock)
    hook._interval.start()
    hook.before_step(1)
    clock.now = 1.0
    hook.after_iteration(Progress(iteration=1), stopping=False)
    clock.now = 50.0
    hook.before_step(2)
    clock.now = 52.0
    hook._interval.add(1.0, skipped=False)
    assert hook._interval.seconds_per_iteration == 3.0


@pytest.mark.parametrize(
    ("split", "final", "place"),
    [("valid", False, ""), ("valid", True, " on validation set"), ("test", True, " on test set")],
)
def test_evaluation_lines(split, final: bool, place: str) -> None:
    rule, line, again = evaluation_lines(Evaluation(10, split, final, 9.592936, 14661.0, 64))
    assert line == (
        f" validation loss at iteration 10{place} | lm loss value: 9.592936E+00 | lm loss PPL: 1.466100E+04 | "
    )
    assert rule == again == "-" * (len(line) + 1)


def test_dataset_sizes() -> None:
    assert dataset_size_lines(320, 128, 64) == [
        " > datasets target sizes (minimum size):",
        "    train:      320",
        "    validation: 128",
        "    test:       64",
    ]


def test_first_iteration_is_printed_and_stays_in_the_next_average(configure, capsys, tmp_path) -> None:
    hook = ConsoleHook(log_interval=3, log_throughput=False)
    hook.on_start(RunInfo(configure(), "x", tmp_path, None, 7, 1.0))  # type: ignore[arg-type]
    for iteration in range(1, 8):
        step = replace(_STEP, loss_sum=float(iteration), valid_tokens=1)
        hook.after_step(replace(_REPORT, iteration=iteration, step=step))
    out = capsys.readouterr().out
    printed = re.findall(r"iteration +(\d+)/.*lm loss: (\S+)", out)
    assert [(int(n), float(loss)) for n, loss in printed] == [(1, 1.0), (3, 2.0), (6, 5.0)]


def test_time_of_evaluations_stays_out_of_the_lines(configure, capsys, tmp_path) -> None:
    clock = Clock()
    hook = ConsoleHook(log_interval=2, log_throughput=False, clock=clock)
    hook.on_start(RunInfo(configure(), "x", tmp_path, None, 7, 1.0))  # type: ignore[arg-type]
    for iteration in (1, 2):
        clock.now += 3.0
        hook.after_step(replace(_REPORT, iteration=iteration))
        hook.before_evaluation("valid", iteration, False, 64, 2)
        clock.now += 100.0
        hook.after_evaluation(None, Progress())
    assert re.findall(r"iteration \(ms\): (\S+)", capsys.readouterr().out) == ["3000.0", "3000.0"]


def test_only_evaluations_after_training_are_announced(configure, capsys, tmp_path) -> None:
    hook = ConsoleHook(log_interval=1, log_throughput=False)
    for final in (False, True):
        hook.before_evaluation("valid", 2, final, 64, 2)
        hook.evaluation_progress(final, 1, 2)
        hook.after_evaluation(None, Progress())
    assert capsys.readouterr().out.splitlines() == [
        "Exiting during evaluation, timelimit reached",
        "Evaluating on 64 samples",
        "Evaluating iter 1/2",
        "Exiting during evaluation, timelimit reached",
    ]
