"""Console logs: every format is read, and like is compared with like."""

import json
import math
from pathlib import Path

import pytest

from lockstep.errors import UserError
from lockstep.lab.compare import compare_paths
from lockstep.lab.logs import parse_log
from lockstep.lab.side import align, load_side
from tests.lab.synthetic import evaluation_lines, mlm_line, train_lines, write, write_log

EXCERPT = """\
[default0]:setting number of microbatches to constant 8
[default0]: > building train, validation, and test datasets for GPT ...
\x1b[32mtraining ...\x1b[0m
[before the start of training step] datetime: 2026-01-02 03:04:05
Number of parameters in transformer block in billions:  0.00
[default3]: [2026-01-02 03:04:06.123456] iteration        1/      10 | consumed samples:           32 | \
elapsed time per iteration (ms): 4210.3 | throughput per GPU (TFLOP/s/GPU): 0.4 | learning rate: 2.730000E-04 | \
global batch size:    32 | lm loss: 1.042071E+01 | loss scale: 1.0 | grad norm: 0.651 | \
number of skipped iterations:   0 | number of nan iterations:   0 |
[Rank 0] (after 1 iterations) memory (MB) | allocated: 321.0 | max allocated: 1234.5
[default3]: [2026-01-02 03:04:07.123456] iteration        2/      10 | consumed samples:           64 | \
skipped samples:            0 | elapsed time per iteration (ms): 135.2 | learning rate: 2.460000E-04 | \
global batch size:    32 | lm loss: 1.035622E+01 | mtp_1 loss: 1.100000E+01 | loss scale: 1.0 | grad norm: 0.711 | \
num zeros: 12 | params norm: 45.678 | number of skipped iterations:   0 | number of nan iterations:   0 |
(min, max) time across ranks (ms):
    evaluate .......................................: (61.02, 61.02)
[default3]:----------------------------------------------------------------------------------------
[default3]: validation loss at iteration 2 | lm loss value: 9.592936E+00 | lm loss PPL: 1.466082E+04 |{end}
[default3]:----------------------------------------------------------------------------------------
[default3]: validation-books loss at iteration 2 on validation set | lm loss value: 9.592752E+00 | \
lm loss PPL: 1.465813E+04 |{end}
[default3]: validation loss at iteration 2 on test set | lm loss value: 9.626372E+00 | lm loss PPL: 1.515940E+04 |{end}
""".replace("{end}", " ")


def test_megatron_lm_log_with_everything_around_it(tmp_path: Path):
    (tmp_path / "log").write_text(EXCERPT)
    log = parse_log(tmp_path / "log")
    assert log.printer == "Megatron-LM or Lockstep"
    assert log.train_iters == 10
    first, second = log.lines[1], log.lines[2]
    assert (first.lm_loss, first.grad_norm, first.next_lr) == (10.42071, 0.651, 2.73e-4)
    assert (first.consumed_samples, first.global_batch_size, first.loss_scale) == (32, 32, 1.0)
    assert second.lm_loss == 10.35622
    losses = {key: evaluation.lm_loss for key, evaluation in log.evaluations.items()}
    assert losses == {
        (2, "valid", False): 9.592936,
        (2, "valid-books", True): 9.592752,
        (2, "test", True): 9.626372,
    }


def test_learning_rate_is_moved_to_the_iteration_it_acts_in(tmp_path: Path):
    (tmp_path / "log").write_text(EXCERPT)
    points = load_side(tmp_path / "log", "A").points
    assert (points[1].lr, points[1].next_lr) == (None, 2.73e-4)
    assert (points[2].lr, points[2].next_lr) == (2.73e-4, 2.46e-4)


def test_megatron_lm_counts_its_first_iteration_twice(tmp_path: Path):
    """Its second line averages iterations 1 and 2, also with a log interval of 1; Bridge's does not."""
    record = load_side(write(tmp_path / "run"), "A")
    windows = {
        bridge: [
            (x.start, x.iteration)
            for x, _ in align(record, load_side(write_log(tmp_path / f"{bridge}", bridge=bridge), "B")).pairs
        ]
        for bridge in (False, True)
    }
    assert windows[False][:3] == [(1, 1), (1, 2), (3, 3)]
    assert windows[True][:3] == [(1, 1), (2, 2), (3, 3)]


def test_bridge_format_is_told_by_its_time_stamp(tmp_path: Path):
    log = parse_log(write_log(tmp_path / "log", bridge=True))
    assert log.printer == "Megatron Bridge"
    assert sorted(log.lines) == list(range(1, 11))
    assert log.interval == 1


@pytest.mark.parametrize("bridge", [False, True])
def test_record_and_its_own_log_are_identical_to_the_printed_digits(tmp_path: Path, bridge: bool):
    found = compare_paths(write(tmp_path / "run"), write_log(tmp_path / "log", bridge=bridge))
    assert (found.decision.verdict, found.exit_code) == ("identical", 0)
    assert found.decision.cause.endswith("is equal to the printed digits.")
    assert any("console log" in note for note in found.notes)
    assert [stage.state for stage in found.stages] == ["unknown", "unknown", "unknown", "equal", "equal", "equal"]


def test_logs_of_both_trainers_are_identical(tmp_path: Path):
    a, b = write_log(tmp_path / "a"), write_log(tmp_path / "b", bridge=True)
    assert compare_paths(a, b).decision.verdict == "identical"


def test_last_printed_digit_is_rounding_and_says_what_is_not_known(tmp_path: Path):
    lines = train_lines()
    lines[6]["lm_loss"] += 1e-5
    found = compare_paths(write(tmp_path / "run"), write_log(tmp_path / "log", lines))
    assert (found.decision.verdict, found.exit_code) == ("rounding", 0)
    assert "config, data and initial weights cannot be compared" in found.decision.cause


def test_logs_that_part_cannot_tell_and_say_what_to_run(tmp_path: Path):
    lines = train_lines()
    lines[6]["lm_loss"] += 0.2
    found = compare_paths(write(tmp_path / "run"), write_log(tmp_path / "log", lines))
    assert (found.decision.verdict, found.exit_code) == ("cannot tell", 1)
    assert found.decision.cause.startswith("lm_loss at iteration 7 is ")
    assert "Run B with Lockstep" in found.decision.next_step


def test_schedules_of_two_logs(tmp_path: Path):
    a, b = write_log(tmp_path / "a"), write_log(tmp_path / "b", train_lines(warmup=1), bridge=True)
    found = compare_paths(a, b)
    assert found.decision.verdict == "schedule"
    assert found.decision.cause.startswith("The learning rate of iteration 2 is 0.000273 against 0.0003, and the confi")
    assert "losses are equal through iteration 2" in found.decision.cause
    early = train_lines(warmup=1)
    early[0]["lm_loss"] += 0.2
    found = compare_paths(a, write_log(tmp_path / "c", early))
    assert found.decision.verdict == "cannot tell", "a first loss cannot come from a learning rate that differs later"


@pytest.mark.parametrize("bridge", [False, True])
def test_averages_over_the_log_interval_are_compared_with_averages(tmp_path: Path, bridge: bool):
    a = write(tmp_path / "run", train=train_lines(23))
    b = write_log(tmp_path / "log", train_lines(23), bridge=bridge, interval=5)
    assert load_side(b, "B").interval == 5
    found = compare_paths(a, b)
    assert found.decision.verdict == "identical", found.decision
    assert [(row.start, row.iteration) for row in found.findings.numbers.rows] == [(1, 5), (6, 10), (11, 15), (16, 20)]
    other = write_log(tmp_path / "other", train_lines(23), bridge=not bridge, interval=5)
    assert compare_paths(b, other).decision.verdict == "identical"


def test_one_bad_iteration_shows_in_an_average(tmp_path: Path):
    lines = train_lines(20)
    lines[12]["lm_loss"] += 1
    found = compare_paths(
        write(tmp_path / "run", train=lines), write_log(tmp_path / "log", train_lines(20), interval=5)
    )
    assert found.findings.numbers.first_outside
    assert found.findings.numbers.first_outside.iteration == 15


def test_line_that_is_not_in_the_log_is_missing(tmp_path: Path):
    lines = train_lines()
    del lines[3]
    found = compare_paths(write(tmp_path / "run"), write_log(tmp_path / "log", lines))
    assert found.decision.verdict == "cannot tell"
    assert found.decision.cause.startswith("Iteration 4 is missing in B")
    long = write_log(tmp_path / "long", train_lines(40), interval=10)
    text = [line for line in long.read_text().splitlines() if "      20/" not in line]
    (tmp_path / "gap").write_text("\n".join(text))
    pairs = align(load_side(write(tmp_path / "run40", train=train_lines(40)), "A"), load_side(tmp_path / "gap", "B"))
    assert (pairs.missing_a, pairs.missing_b) == ([], [20])


def test_loss_that_was_nan_is_not_printed_and_equals_nothing(tmp_path: Path):
    lines = train_lines()
    lines[4]["lm_loss"] = math.nan
    log = write_log(tmp_path / "log", lines)
    assert "lm loss" not in next(line for line in log.read_text().splitlines() if "        5/" in line)
    assert math.isnan(parse_log(log).lines[5].lm_loss or 0)
    found = compare_paths(log, log)
    assert found.exit_code == 1
    assert "lm_loss at iteration 5 is NaN in both, and NaN never equals NaN" in found.decision.cause.replace("L", "l")


def test_two_runs_in_one_log_are_refused(tmp_path: Path):
    first = mlm_line(train_lines()[0])
    (tmp_path / "log").write_text(f"{first}\n{first}\n")
    assert len(parse_log(tmp_path / "log").lines) == 1, "the same line twice, as two ranks may print it"
    other = mlm_line({**train_lines()[0], "lm_loss": 3.0})
    (tmp_path / "log").write_text(f"{first}\n{other}\n")
    with pytest.raises(UserError, match="prints iteration 1 twice with different numbers; split it"):
        parse_log(tmp_path / "log")


def test_reference_curves_as_a_log_of_themselves(tmp_path: Path, shared: Path):
    """The curves measured on Megatron-LM: equal to themselves, and dropout changes them beyond rounding."""
    runs = json.loads((shared / "reference" / "megatron_lm_curves.json").read_text())["runs"]
    logs = {}
    for name in ("seed", "seed_nodrop"):
        lines = [
            {**template, "lm_loss": given["lm_loss"], "grad_norm": given["grad_norm"], "next_lr": given["lr"]}
            for template, given in zip(train_lines(), runs[name]["iterations"], strict=True)
        ]
        logs[name] = write_log(tmp_path / name, lines, evaluation_lines())
    assert compare_paths(logs["seed"], logs["seed"]).decision.verdict == "identical"
    found = compare_paths(logs["seed"], logs["seed_nodrop"])
    assert found.decision.verdict == "cannot tell"
    assert found.stages[3].state == "equal"
