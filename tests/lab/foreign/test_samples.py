"""Runs whose iterations have other sizes are aligned by what they consumed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lockstep.lab.compare import compare_paths
from lockstep.lab.digits import EXACT, Digits, Ruler, digits_of
from tests.lab.foreign.writers import megatron
from tests.lab.synthetic import Line, bridge_line, config, train_lines, write


def sized(size: int, count: int) -> list[Line]:
    """Lines of iterations of ``size`` samples; the loss depends on the samples seen, as if no update ever acted."""
    lines = train_lines(count)
    for line in lines:
        end = line["iteration"] * size
        losses = [10 - sample / 1000 for sample in range(end - size, end)]
        line |= {"lm_loss": math.fsum(losses) / size, "consumed_samples": end, "global_batch_size": size}
    return lines


@pytest.mark.parametrize(("size_a", "size_b"), [(16, 32), (32, 16), (32, 48), (48, 32)])
def test_other_batch_sizes_are_aligned_by_samples(size_a: int, size_b: int, tmp_path: Path):
    a = write(tmp_path / "a", train=sized(size_a, 960 // size_a), evaluations=[])
    b = tmp_path / "b"
    b.write_text("".join(bridge_line(line) + "\n" for line in sized(size_b, 960 // size_b)))
    found = compare_paths(a, b)
    assert any(f"an iteration takes {size_a} samples in A and {size_b} in B: iterations are" in n for n in found.notes)
    assert found.decision.verdict == "data"
    assert f"an iteration takes {size_a} samples in A".lower() in found.decision.cause.lower()
    common = math.lcm(size_a, size_b)
    rows = found.findings.numbers.rows
    assert [row.iteration for row in rows] == [end // size_a for end in range(common, 961, common)]
    assert not found.findings.pairs.missing_a
    assert all(row.difference is not None and abs(row.difference) < 1e-5 for row in rows)


def test_equal_curves_over_other_batch_sizes_are_never_identical(tmp_path: Path):
    lines = [{**line, "lm_loss": 3.0, "grad_norm": 1.0, "next_lr": 1e-4, "lr": 1e-4} for line in sized(16, 8)]
    double = [{**line, "lm_loss": 3.0, "grad_norm": 1.0, "next_lr": 1e-4, "lr": 1e-4} for line in sized(32, 4)]
    a = write(tmp_path / "a", train=lines, evaluations=[])
    b = tmp_path / "b"
    b.write_text("".join(bridge_line(line) + "\n" for line in double))
    assert compare_paths(a, b).decision.verdict == "data"


def test_config_of_both_names_the_batch_size(tmp_path: Path):
    a = write(tmp_path / "a", train=sized(16, 60), tree=config(train__global_batch_size=16), evaluations=[])
    b = write(tmp_path / "b", train=sized(32, 30), tree=config(train__global_batch_size=32), evaluations=[])
    found = compare_paths(a, b)
    assert found.decision.verdict == "config"
    assert "train.global_batch_size (16 against 32)" in found.decision.cause


def test_tokens_align_what_tells_no_samples(tmp_path: Path):
    a = write(tmp_path / "a", train=sized(16, 60), tree=config(model__seq_length=512), evaluations=[])
    history: list[dict[str, Any]] = [
        {"step": line["iteration"], "loss": line["lm_loss"], "num_input_tokens_seen": line["consumed_samples"] * 512}
        for line in sized(32, 30)
    ]
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": history}))
    found = compare_paths(a, state)
    assert any(
        "aligned by consumed tokens, as an iteration takes 8192 tokens in A and 16384 in B" in n for n in found.notes
    )
    assert [row.iteration for row in found.findings.numbers.rows] == list(range(2, 61, 2))


def test_equal_sizes_stay_aligned_by_iteration(tmp_path: Path):
    a = write(tmp_path / "a", train=train_lines(), evaluations=[])
    found = compare_paths(
        a, megatron(tmp_path / "b", [{**x, "consumed_samples": x["consumed_samples"] + 5} for x in train_lines()])
    )
    assert not any("aligned" in note for note in found.notes)
    assert "The consumed samples at iteration 1 is 32 against 37" in found.decision.cause


def test_digits_of_a_column():
    assert digits_of(["1.042071E+01", "9.9E+00"]) == Digits(significant=7, decimals=5)
    assert digits_of(["2.5", "10.123456789012345"]) == EXACT
    assert digits_of(["2.5", "3.1"]) == Digits(significant=4), "two digits decide nothing"
    assert Digits(decimals=5, significant=6).unit(10.4) == pytest.approx(1e-4)
    single = Digits(single=True).cut(0.1)
    assert (single == pytest.approx(0.1, rel=1e-7), single == 0.1) == (True, False)


def test_numbers_are_the_same_where_one_can_stand_behind_both():
    seven, four = {"lm_loss": Digits(significant=7)}, {"lm_loss": Digits(significant=4)}
    assert Ruler({}, seven).same("lm_loss", 10.42071449, 10.42071)
    assert not Ruler({}, seven).same("lm_loss", 10.4207151, 10.42071)
    assert not Ruler(seven, seven).same("lm_loss", 10.42071, 10.42072), "printed alike they would be written alike"
    assert Ruler(seven, seven).same("lm_loss", 10.42071, 10.42072, averaged=True)
    assert Ruler(seven, four).same("lm_loss", 10.425, 10.42), "a tie rounds either way"
    assert not Ruler(seven, four).same("lm_loss", 10.4251, 10.42)
    assert not Ruler(four, four).same("lm_loss", math.nan, math.nan)
