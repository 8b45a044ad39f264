"""What the host does while the device works: the next batch is taken early, and results are read late."""

import importlib
import itertools
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lockstep.config import ConfigContainer
from lockstep.errors import UserError
from lockstep.training import Command, RunResult, exits, feed, loop, run, setup
from lockstep.training.device import HostCopy
from lockstep.training.exits import ExitRule
from lockstep.training.hooks import Hook, IterationReport, Progress
from lockstep.training.step import TrainStep
from tests.parallel.spawn import Turn
from tests.training.checkpoint_runs import recorded, take, train

_CLOCKED = ("seconds", "tokens_per_second", "memory_bytes")
_RUN = importlib.import_module("lockstep.training.run")

Patch = pytest.MonkeyPatch


def _run(config: ConfigContainer, run_dir: Path) -> RunResult:
    config.run.dir = str(run_dir)
    return run(config, door="python", command=Command(["prog"]), name="tiny")


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _CLOCKED} for line in lines]


def _ends_after(batches: int) -> Callable[[Patch], None]:
    """Let the training data end after so many global batches of four samples."""
    order = [[2 * number, 2 * number + 1] for number in range(2 * batches)]
    return lambda patch: patch.setattr(setup, "sample_order", lambda *_: iter(order))


def _noted(function: Any, name: str, seen: list[str]) -> Any:
    def noted(*args: Any) -> Any:
        seen.append(name)
        return function(*args)

    return noted


@pytest.fixture
def order(monkeypatch) -> list[str]:
    """Return a list that fills with what the host does."""
    seen: list[str] = []
    for kind, name in ((feed.Feed, "_take"), (TrainStep, "launch"), (HostCopy, "read")):
        monkeypatch.setattr(kind, name, _noted(getattr(kind, name), name, seen))
    return seen


def test_the_next_batch_is_taken_before_results_are_waited_for(configure, tmp_path, order) -> None:
    _run(configure({"train.train_iters": 3, "validation.eval_iters": 0}), tmp_path / "run")
    assert " ".join(order) == "_take launch _take read launch _take read launch read"


def test_results_are_read_when_the_next_iteration_has_begun(configure, tmp_path, order, monkeypatch) -> None:
    monkeypatch.setattr(loop, "is_asynchronous", lambda _: True)
    saving = {"checkpoint.save": str(tmp_path / "saves"), "checkpoint.save_interval": 3}
    _run(configure({"train.train_iters": 5, "validation.eval_iters": 0, **saving}), tmp_path / "run")
    assert " ".join(order) == (
        "_take launch _take launch read _take launch read _take read "  # the third is saved
        "launch _take launch read read"
    )


def test_data_that_ends_is_an_error_in_the_iteration_that_needs_it(configure, tmp_path, monkeypatch) -> None:
    _ends_after(2)(monkeypatch)
    with pytest.raises(UserError, match="the train split ended after 8 samples"):
        _run(configure(), tmp_path / "run")
    kinds = [(line["kind"], line["iteration"]) for line in _lines(tmp_path / "run")]
    assert kinds == [("train", 1), ("train", 2), ("evaluation", 2)]


def test_data_that_ends_with_the_run_is_none(configure, tmp_path, monkeypatch) -> None:
    _ends_after(2)(monkeypatch)
    result = _run(configure({"train.exit_interval": 2}), tmp_path / "run")
    assert (result.status, result.iterations) == ("stopped early", 2)


class _Spy(Hook):
    """Notes what hooks are told, in order."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def before_step(self, iteration: int) -> None:
        self.seen.append(("before", iteration))

    def after_step(self, report: IterationReport) -> None:
        self.seen.append(("step", {k: v for k, v in vars(report).items() if k not in _CLOCKED}))

    def after_iteration(self, progress: Progress, stopping: bool) -> None:
        self.seen.append(("iteration", {k: v for k, v in asdict(progress).items() if k != "known_at"}, stopping))


def _in_the_third(job: Callable[[TrainStep], None]) -> Callable[[Patch], None]:
    """Have something done when the third step is launched."""

    def plant(patch: Patch) -> None:
        launch, count = TrainStep.launch, itertools.count(1)

        def launched(self: TrainStep, *args: Any) -> Any:
            if next(count) == 3:
                job(self)
            return launch(self, *args)

        patch.setattr(TrainStep, "launch", launched)

    return plant


@torch.no_grad()
def _break_a_weight(step: TrainStep) -> None:
    step.optimizer.weights.model_params[0].fill_(torch.nan)


def _fail(_: TrainStep) -> None:
    raise UserError("no memory is left")


def _send_a_signal(_: TrainStep) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def _out_of_time_after_three(patch: Patch) -> None:
    asked = itertools.count(1)
    patch.setattr(ExitRule, "out_of_time", lambda _: next(asked) >= 3)


_ALONE: dict[str, Any] = {"validation.eval_iters": 0, "train.train_iters": 5}
_SIGNAL: dict[str, Any] = {"train.exit_signal_handler": True, "train.exit_signal": "SIGUSR1"}
_RAMP: dict[str, Any] = {"train.rampup_batch_size": [2, 2, 8], "train.train_iters": None, "train.train_samples": 20}
_FP16: dict[str, Any] = {"mixed_precision.fp16": True, "mixed_precision.hysteresis": 1, "train.train_iters": 24}
_LOGGED: dict[str, Any] = {"logger.log_params_norm": True, "logger.log_num_zeros_in_grad": True}
_CASES: dict[str, tuple[dict[str, Any], Callable[[Patch], None] | None]] = {
    "plain": ({**_ALONE, **_LOGGED, "model.hidden_dropout": 0.1}, None),
    "ramp": ({**_ALONE, **_RAMP}, None),
    "evaluation between": ({"train.train_iters": 5}, None),
    "saves between": ({**_ALONE, "checkpoint.save_interval": 2}, None),
    "saves in the background": ({**_ALONE, "checkpoint.save_interval": 3, "checkpoint.async_save": True}, None),
    "NaN": ({**_ALONE, "checkpoint.save_interval": 4}, _in_the_third(_break_a_weight)),
    "an error while it begins": ({**_ALONE, "checkpoint.save_interval": 4}, _in_the_third(_fail)),
    "exit by iteration": ({**_ALONE, "train.exit_interval": 3}, None),
    "exit by time": ({**_ALONE, "train.exit_duration_in_mins": 1}, _out_of_time_after_three),
    "exit by a signal": ({**_ALONE, **_SIGNAL}, _in_the_third(_send_a_signal)),
    "fp16": ({"validation.eval_iters": 0, **_FP16}, None),
    "the end of data": (_ALONE, _ends_after(3)),
    "the end of data, unneeded": ({**_ALONE, "train.exit_interval": 3}, _ends_after(3)),
}


@pytest.mark.parametrize("name", _CASES)
def test_late_reading_changes_nothing(configure, tmp_path, monkeypatch, capsys, name) -> None:
    changes, plant = _CASES[name]
    found = {}
    for late in (False, True):
        folder, spy = tmp_path / f"late-{late}", _Spy()
        saving = {"checkpoint.save": str(folder / "saves"), "checkpoint.save_interval": 100}
        with monkeypatch.context() as patch:
            patch.setattr(loop, "is_asynchronous", lambda _, late=late: late)
            patch.setattr(_RUN, "_process_hooks", lambda *_, spy=spy: [spy])
            if plant is not None:
                plant(patch)
            error = ""
            try:
                _run(configure({**saving, **changes}), folder / "run")
            except UserError as raised:
                error = str(raised)
        # A save in the background prints when it is done.
        said = "" if "checkpoint.async_save" in changes else _said(capsys, folder)
        found[late] = _lines(folder / "run"), _saved(folder / "saves"), spy.seen, said, error
    assert found[True] == found[False]
    assert len(found[True][0]) > 1
    assert bool(found[True][-1]) == (name in ("NaN", "an error while it begins", "the end of data"))


def _said(capsys: Any, folder: Path) -> str:
    """Return what was printed, without times."""
    text = capsys.readouterr().out.replace(str(folder), "")
    return re.sub(r"\d+-\d+-\d+ \d+:\d+:\d+(\.\d+)?|\(ms\): [\d.]+|after [\d.e-]+ minutes", "", text)


def _saved(folder: Path) -> dict[str, Any]:
    """Return what all checkpoints of a folder hold."""
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            files[name] = path.read_bytes()
        elif path.name.endswith("manifest.json"):
            files[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("run_dir", "files")}
        else:
            files[name] = None
    return files


class _Reads(TorchFunctionMode):
    """Notes what asks a tensor for its values."""

    _ASKING = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "__bool__", "__float__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._allowed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if not self._allowed and name in (*self._ASKING, "__int__", "__index__", "__array__"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))

    def allowing(self, function: Any) -> Any:
        """Return a function that may ask: it works on tensors of the host."""

        def allowed(*args: Any) -> Any:
            before, self._allowed = self._allowed, True
            try:
                return function(*args)
            finally:
                self._allowed = before

        return allowed


def test_only_results_are_asked_for(configure, tmp_path, monkeypatch) -> None:
    reads = _Reads()
    monkeypatch.setattr(loop, "is_asynchronous", lambda _: True)
    monkeypatch.setattr(loop, "finish", reads.allowing(loop.finish))
    monkeypatch.setattr(feed.Feed, "_take", reads.allowing(feed.Feed._take))
    inner = _RUN.train

    def watched(*args: Any) -> Any:
        with reads:
            return inner(*args)

    monkeypatch.setattr(_RUN, "train", watched)
    changes = {**_ALONE, **_LOGGED, "model.hidden_dropout": 0.1, "optimizer.clip_grad": 1.0}
    result = _run(configure(changes), tmp_path / "run")
    assert result.iterations == 5
    assert reads.seen == []


def test_seconds_add_up_to_the_time_of_all_iterations(configure, tmp_path, monkeypatch) -> None:
    clock = itertools.count(1)
    times: list[int] = []

    def now() -> int:
        times.append(next(clock) ** 2)
        return times[-1]

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=now))
    monkeypatch.setattr(loop, "is_asynchronous", lambda _: True)
    _run(configure(_ALONE), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(times) == 2 * len(lines)
    assert sum(line["seconds"] for line in lines) == times[-1] - times[0]


def _train(folder: Path, late: bool) -> None:
    changes = {"checkpoint.save": str(folder / f"saves-{late}"), "checkpoint.save_interval": 3, **_PARALLEL}
    with mock.patch.object(loop, "is_asynchronous", return_value=late):
        train(changes, folder / f"run-{late}")


_PARALLEL: dict[str, Any] = {
    "ddp.use_distributed_optimizer": True,
    "model.hidden_dropout": 0.1,
    "train.train_iters": 7,
    "validation.eval_interval": 5,
    "train.check_weight_hash_across_dp_replicas_interval": 4,
    "train.exit_duration_in_mins": 60,
    "train.exit_signal_handler": True,
    **_LOGGED,
}


def test_late_reading_changes_nothing_on_two_processes(tmp_path) -> None:
    turns = [Turn(2, _train, (tmp_path, late)) for late in (False, True)]
    stops = [Turn(2, _stop_early, (tmp_path, late, signalled)) for late in (False, True) for signalled in (False, True)]
    take([*turns, *stops])
    for run_dir in ("signal-False", "signal-True", "time-False", "time-True"):
        assert [line["iteration"] for line in recorded(tmp_path / run_dir)] == [1, 2, 3]
    now, late = (recorded(tmp_path / f"run-{late}") for late in (False, True))
    assert [line["iteration"] for line in now if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7]
    assert now == late
    assert _saved(tmp_path / "saves-False") == _saved(tmp_path / "saves-True") != {}


def _stop_early(folder: Path, late: bool, signalled: bool) -> None:
    """Train until one process gets a signal in the third step, or the first one's time is over then."""
    changes = {**_PARALLEL, "validation.eval_iters": 0}
    name = f"{'signal' if signalled else 'time'}-{late}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "is_asynchronous", lambda _: late)
        if signalled and os.environ["RANK"] == "1":
            _in_the_third(lambda _: os.kill(os.getpid(), signal.SIGTERM))(patch)
        if not signalled and os.environ["RANK"] == "0":
            asked = itertools.count(1)
            patch.setattr(exits, "time", SimpleNamespace(monotonic=lambda: 1e9 if next(asked) >= 3 else 0.0))
        assert train(changes, folder / name) == "stopped early"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graphs", ["none", "micro-batches"])
def test_a_step_on_a_gpu_is_launched_without_waiting(configure, tmp_path, monkeypatch, graphs) -> None:
    begin, count = loop.begin, itertools.count(1)

    def begun(*args: Any) -> Any:
        # The first steps set things up.
        torch.cuda.set_sync_debug_mode("error" if next(count) > 3 else "default")
        try:
            return begin(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "begin", begun)
    changes = {**_ALONE, **_LOGGED, "run.device": "cuda", "mixed_precision.bf16": True, "run.cuda_graphs": graphs}
    assert _run(configure(changes), tmp_path / "run").iterations == 5
