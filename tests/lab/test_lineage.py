"""Resumed runs in comparisons: the runs they continue belong to them."""

import json
import shutil
from pathlib import Path

import pytest

from lockstep.lab.compare import compare_paths
from tests.lab.synthetic import write


@pytest.fixture
def halves(tmp_path) -> tuple[Path, Path, Path]:
    """Return an uninterrupted run, the first half of the same run, and the half that resumed from it."""
    whole, first, second = (write(tmp_path / name) for name in ("whole", "first", "second"))
    _keep(first, lambda line: line["iteration"] <= 6)
    _keep(second, lambda line: line["iteration"] > 5)
    facts = json.loads((second / "run.json").read_text())
    facts["initial_weights"]["fingerprint"] = "0" * 64
    facts["initial_weights"]["parameters"] = {
        name: {**entry, "sha256": "0" * 64} for name, entry in facts["initial_weights"]["parameters"].items()
    }
    facts["resumed_from"] = {"checkpoint": "x", "iteration": 5, "run_dir": str(first), "finetune": False}
    (second / "run.json").write_text(json.dumps(facts))
    return whole, first, second


def _keep(run: Path, wanted) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if wanted(json.loads(line))]
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))


def test_a_resumed_run_is_compared_with_its_past(halves) -> None:
    whole, first, second = halves
    outcome = compare_paths(whole, second)
    assert outcome.decision.verdict == "identical"
    assert outcome.exit_code == 0
    assert f"B resumed at iteration 5 of {first}; the iterations before are taken from there" in outcome.notes


def test_a_past_that_cannot_be_read_is_missing(halves) -> None:
    whole, first, second = halves
    shutil.rmtree(first)
    outcome = compare_paths(whole, second)
    assert outcome.decision.verdict == "cannot tell"
    assert any("resumed at iteration 5; the record of the run before" in note for note in outcome.notes)
    assert [stage.state for stage in outcome.stages if stage.name == "initial weights"] == ["unknown"]


def test_a_run_that_names_itself_as_its_past_does_not_hang(halves) -> None:
    whole, first, second = halves
    facts = json.loads((second / "run.json").read_text())
    (first / "run.json").write_text(
        json.dumps({**facts, "resumed_from": facts["resumed_from"] | {"run_dir": str(second)}})
    )
    assert compare_paths(whole, second).findings.init.state == "unknown"


def test_fine_tuning_begins_a_run_of_its_own(halves) -> None:
    whole, _, second = halves
    facts = json.loads((second / "run.json").read_text())
    facts["resumed_from"]["finetune"] = True
    (second / "run.json").write_text(json.dumps(facts))
    assert compare_paths(whole, second).findings.init.state == "differs"
