"""What the host does while the device works: the next batch is taken early, and results are read late."""

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.config import ConfigContainer
from lockstep.errors import UserError
from lockstep.training import Command, RunResult, feed, run, setup
from lockstep.training.device import HostCopy
from lockstep.training.step import TrainStep

_CLOCKED = ("seconds", "tokens_per_second", "memory_bytes")


def _run(config: ConfigContainer, run_dir: Path) -> RunResult:
    config.run.dir = str(run_dir)
    return run(config, door="python", command=Command(["prog"]), name="tiny")


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _CLOCKED} for line in lines]


def _ends_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Let the training data end after so many global batches of four samples."""
    order = [[2 * number, 2 * number + 1] for number in range(2 * batches)]
    monkeypatch.setattr(setup, "sample_order", lambda *_: iter(order))


def test_the_next_batch_is_taken_before_results_are_waited_for(configure, tmp_path, monkeypatch) -> None:
    seen: list[str] = []
    for kind, name in ((feed.Feed, "_take"), (TrainStep, "launch"), (HostCopy, "read")):
        monkeypatch.setattr(kind, name, _noted(getattr(kind, name), name, seen))
    _run(configure({"train.train_iters": 3, "validation.eval_iters": 0}), tmp_path / "run")
    assert " ".join(seen) == "_take launch _take read launch _take read launch read"


def _noted(function: Any, name: str, seen: list[str]) -> Any:
    def noted(*args: Any) -> Any:
        seen.append(name)
        return function(*args)

    return noted


def test_data_that_ends_is_an_error_in_the_iteration_that_needs_it(configure, tmp_path, monkeypatch) -> None:
    _ends_after(monkeypatch, 2)
    with pytest.raises(UserError, match="the train split ended after 8 samples"):
        _run(configure(), tmp_path / "run")
    kinds = [(line["kind"], line["iteration"]) for line in _lines(tmp_path / "run")]
    assert kinds == [("train", 1), ("train", 2), ("evaluation", 2)]


def test_data_that_ends_with_the_run_is_none(configure, tmp_path, monkeypatch) -> None:
    _ends_after(monkeypatch, 2)
    result = _run(configure({"train.exit_interval": 2}), tmp_path / "run")
    assert (result.status, result.iterations) == ("stopped early", 2)
