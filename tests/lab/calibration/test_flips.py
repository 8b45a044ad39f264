"""Where a router chooses in low precision: what the verdict says without a measured band."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from lockstep.lab.bands import bf16_ulp
from lockstep.lab.calibration.band import FACTOR, Curve, write_band
from lockstep.lab.compare import Comparison, compare_paths
from tests.lab.calibration.flips import EXPERTS
from tests.lab.calibration.rates import curve
from tests.lab.calibration.test_band import band
from tests.lab.faults import FAULTS
from tests.lab.synthetic import Line, config, train_lines, write

ROUTED: dict[str, Any] = {"model__num_moe_experts": 8}


def off(key: str, iteration: int, ulps: float) -> list[Line]:
    lines = train_lines()
    lines[iteration - 1][key] += ulps * bf16_ulp(lines[iteration - 1][key])
    return lines


def pair(folder: Path, lines: list[Line], **settings: Any) -> Comparison:
    tree = config(**settings)
    return compare_paths(write(folder / "a", tree=tree), write(folder / "b", tree=tree, train=lines))


@pytest.mark.parametrize(
    ("key", "iteration", "ulps", "verdict"),
    [
        ("grad_norm", 1, 0.9, "rounding"),
        ("grad_norm", 1, 2.5, "cannot tell"),
        ("grad_norm", 1, 40, "bug"),
        ("grad_norm", 5, 60, "cannot tell"),
        ("grad_norm", 5, 300, "bug"),
        ("lm_loss", 5, 4, "cannot tell"),
        ("lm_loss", 5, 10, "bug"),
        ("loss_scale", 5, 1, "bug"),
    ],
)
def test_only_what_flips_cannot_cause_is_a_bug(tmp_path: Path, key: str, iteration: int, ulps: float, verdict: str):
    found = pair(tmp_path, off(key, iteration, ulps), **ROUTED)
    assert found.decision.verdict == verdict
    if verdict == "cannot tell":
        assert "a router chooses experts by numbers rounded to BF16" in found.decision.cause
        assert f"`lockstep calibrate {tmp_path / 'a'}`" in found.decision.next_step


@pytest.mark.parametrize("settings", [{}, {**ROUTED, "mixed_precision__bf16": False}])
def test_without_a_choice_or_in_float32_it_is_a_bug(tmp_path: Path, settings: dict[str, Any]):
    assert pair(tmp_path, off("grad_norm", 1, 2.5), **settings).decision.verdict == "bug"


@pytest.mark.parametrize(
    ("width", "ulps", "verdict"), [(1.5, 1.2, "rounding"), (1.5, 2.5, "bug"), (60, 40, "cannot tell"), (60, 80, "bug")]
)
def test_a_measured_band_decides(tmp_path: Path, width: float, ulps: float, verdict: str):
    write_band(band(width * bf16_ulp(0.6) / FACTOR), write(tmp_path / "a", tree=config(**ROUTED)))
    b = write(tmp_path / "b", tree=config(**ROUTED), train=off("grad_norm", 1, ulps))
    assert compare_paths(tmp_path / "a", b).decision.verdict == verdict


def test_a_ledger_that_differs_is_no_flip(tmp_path: Path):
    def ledger(divisor: int, lines: list[Line]) -> list[Line]:
        return [line | {"ledger": {"tokens": [8], "divisors": [divisor]}} for line in lines]

    a = write(tmp_path / "a", tree=config(**ROUTED), train=ledger(8, train_lines()))
    b = write(tmp_path / "b", tree=config(**ROUTED), train=ledger(16, off("grad_norm", 1, 2.5)))
    assert compare_paths(a, b).decision.verdict == "bug"


def test_the_command_asks_for_the_layout_of_b(tmp_path: Path):
    a = write(tmp_path / "a", tree=config(**ROUTED), features={"layout": {"processes": 1}})
    settings = {"model__tensor_model_parallel_size": 2, "model__expert_tensor_parallel_size": 1}
    tree = config(**ROUTED, **settings)
    b = write(tmp_path / "b", tree=tree, train=off("grad_norm", 1, 2.5), features={"layout": {"processes": 2}})
    said = compare_paths(a, b).decision.next_step.split("`")[1]
    layout = "model.tensor_model_parallel_size=2 model.expert_tensor_parallel_size=1 processes=2"
    assert shlex.split(said) == ["lockstep", "calibrate", str(a), "--layout", layout]


def lines_of(found: Curve) -> list[Line]:
    return [line | dict(found[line["iteration"]]) for line in train_lines(12)]


@pytest.mark.parametrize("name", ["labels shifted", "norm epsilon in the kernel"])
def test_flips_are_no_bug_and_a_planted_fault_is_no_rounding(tmp_path: Path, name: str):
    a = write(tmp_path / "a", tree=config(**ROUTED), train=lines_of(curve(EXPERTS)))
    moved = write(tmp_path / "b", tree=config(**ROUTED), train=lines_of(curve(EXPERTS, 1)))
    assert compare_paths(a, moved).decision.verdict == "cannot tell"
    with FAULTS[name].plant():
        faulty = write(tmp_path / "c", tree=config(**ROUTED), train=lines_of(curve(EXPERTS)))
    verdicts = {"labels shifted": "bug", "norm epsilon in the kernel": "cannot tell"}
    assert compare_paths(a, faulty).decision.verdict == verdicts[name]
