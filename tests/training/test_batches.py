"""Batch sizes over a run, its iterations, and the samples it needs."""

import pytest

from lockstep.errors import ConfigError
from lockstep.training.batches import (
    BatchSchedule,
    build_batch_schedule,
    evaluation_due,
    num_samples,
    parse_step_schedule,
    ramp_stages,
    train_iterations,
)


def test_constant_batch(configure) -> None:
    schedule = build_batch_schedule(configure())
    assert (schedule.size_at(0), schedule.size_at(10**9), schedule.micro_batches_at(5)) == (4, 4, 2)


def test_ramp_grows_evenly_over_its_samples() -> None:
    schedule = BatchSchedule(ramp_stages([4, 4, 60], 16), 2)
    # Three increments of 20 samples each: 4 until sample 20, 8 until 40, 12 until 60.
    assert [schedule.size_at(n) for n in (0, 19, 20, 39, 40, 59, 60, 1000)] == [4, 4, 8, 8, 12, 12, 16, 16]


def test_ramp_without_samples_is_no_ramp() -> None:
    assert ramp_stages([4, 4, 0], 16) == ((0, 16),)
    assert ramp_stages([16, 4, 100], 16) == ((0, 16),)


@pytest.mark.parametrize("ramp", [[4, 5, 60], [20, 4, 60]])
def test_ramp_that_misses_the_batch_size_is_refused(ramp: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"does not reach train.global_batch_size = 16"):
        ramp_stages(ramp, 16)


def test_ramp_needs_three_numbers() -> None:
    with pytest.raises(ConfigError, match="three numbers"):
        ramp_stages([4, 4], 16)


def test_stage_that_micro_batches_do_not_divide_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"batch size 6 .from sample 30 on. is not a multiple of the micro-batch size 4"
    ):
        BatchSchedule(ramp_stages([4, 2, 60], 8), 4)


def test_step_schedule_in_samples_and_in_tokens() -> None:
    assert parse_step_schedule("0:8 1K:16,0.002M:32", None) == ((0, 8), (1000, 16), (2000, 32))
    assert parse_step_schedule("1K:16 0:8", 10) == ((0, 8), (100, 16))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "THRESHOLD:BATCH"),
        ("10:8", "first threshold must be 0"),
        ("0:8 x:16", "'x' in 'x:16' is not a number"),
        ("0:16 10:8", "must not fall"),
        ("0:8 10:16 10:32", "two thresholds"),
        ("", "first threshold must be 0"),
    ],
)
def test_malformed_step_schedule(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_step_schedule(text, None)


def test_iterations_of_a_sample_based_run() -> None:
    assert BatchSchedule(((0, 8),), 2).iterations_for(30) == 3  # the incomplete batch is dropped
    steps = BatchSchedule(((0, 4), (8, 8)), 2, round_up=True)
    assert steps.iterations_for(17) == 4  # 4 + 4 + 8 + 8
    assert BatchSchedule(((0, 4), (8, 8)), 2).iterations_for(17) == 3


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 7])
def test_samples_after_agrees_with_stepping(iterations: int) -> None:
    schedule = BatchSchedule(((0, 4), (6, 8), (20, 16)), 2)
    consumed = 0
    for _ in range(iterations):
        consumed += schedule.size_at(consumed)
    assert schedule.samples_after(iterations) == consumed


def test_train_iterations(configure) -> None:
    config = configure({"train.train_iters": None, "train.train_samples": 42})
    assert train_iterations(config, build_batch_schedule(config)) == 10


def _samples(config) -> tuple[int, int, int]:
    schedule = build_batch_schedule(config)
    return num_samples(config, schedule, train_iterations(config, schedule))


def test_numbers_of_samples(configure) -> None:
    # 10 iterations of 4; evaluations at 3, 6, 9 and at the end, each 2 batches of 4.
    changes = {"train.train_iters": 10, "validation.eval_interval": 3}
    assert _samples(configure(changes)) == (40, 32, 8)
    assert _samples(configure({**changes, "validation.start_eval_at_iter": 7})) == (40, 16, 8)
    assert _samples(configure({**changes, "validation.start_eval_at_iter": 6})) == (40, 24, 8)
    assert _samples(configure({**changes, "validation.start_eval_at_iter": 500})) == (40, 8, 8)
    assert _samples(configure({**changes, "validation.eval_interval": None})) == (40, 8, 8)
    assert _samples(configure({**changes, "validation.skip_train": True})) == (40, 8, 8)
    assert _samples(configure({**changes, "validation.eval_global_batch_size": 2})) == (40, 16, 4)
    assert _samples(configure({**changes, "validation.eval_iters": 0})) == (40, 0, 0)


def test_step_schedule_asks_for_the_samples_it_takes(configure) -> None:
    config = configure({"train.global_batch_size": None, "train.step_batch_size_schedule": "0:4 2K:8"})
    assert build_batch_schedule(config).stages == ((0, 4), (7, 8))
    assert _samples(config)[0] == 4 + 4 + 8 + 8


def test_evaluation_due(configure) -> None:
    config = configure({"validation.eval_interval": 2, "validation.start_eval_at_iter": 4})
    assert [n for n in range(1, 9) if evaluation_due(config, n)] == [4, 6, 8]
    assert not any(evaluation_due(configure({"validation.eval_interval": None}), n) for n in range(1, 9))
    assert not any(evaluation_due(configure({"validation.eval_iters": 0}), n) for n in range(1, 9))
