"""Traces: which iterations they hold, and that nothing else changes."""

import gzip
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from lockstep.config import ConfigContainer
from lockstep.config.output import ProfilingConfig
from lockstep.training import Command, loop, run
from lockstep.training.kernel_times import summary
from lockstep.training.profiling import ProfileHook
from lockstep.training.step import TrainStep


def names_in(file: Path) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        return [event["name"] for event in json.load(stream)["traceEvents"] if "name" in event]


def traced(folder: Path, config: ProfilingConfig, iterations: range, ends: str = "on_finish") -> list[int]:
    """Return which of the iterations a hook traced."""
    hook, anything = ProfileHook(config), SimpleNamespace(run_dir=folder)
    hook.on_start(anything)  # type: ignore[arg-type]
    for iteration in iterations:
        hook.before_step(iteration)
        with record_function(f"iteration {iteration}"):
            torch.ones(2).sum()
        hook.after_step(SimpleNamespace(iteration=iteration))  # type: ignore[arg-type]
    getattr(hook, ends)(None)
    file = folder / "torch_profile" / "rank-0.json.gz"
    if not file.exists():
        return []
    found = {name for name in names_in(file) if name.startswith("iteration ")}
    return sorted(int(name.split()[1]) for name in found)


@pytest.mark.parametrize(
    ("start", "end", "iterations", "expected"),
    [
        (3, 5, range(1, 8), [3, 4]),
        (1, 3, range(1, 5), [1, 2]),
        (0, 2, range(1, 5), [1]),
        (2, 9, range(1, 4), [2, 3]),
        (3, 6, range(5, 9), [5]),
        (3, 6, range(6, 9), []),
        (5, 6, range(1, 5), []),
    ],
)
def test_the_iterations_of_the_span_are_traced(
    start: int, end: int, iterations: range, expected: list[int], tmp_path: Path
) -> None:
    config = ProfilingConfig(use_pytorch_profiler=True, profile_step_start=start, profile_step_end=end)
    assert traced(tmp_path, config, iterations) == expected


def test_a_failed_run_leaves_what_it_traced_and_other_ranks_nothing(tmp_path: Path) -> None:
    config = ProfilingConfig(use_pytorch_profiler=True, profile_step_start=2, profile_step_end=9)
    assert traced(tmp_path / "a", config, range(1, 4), ends="on_failure") == [2, 3]
    config.profile_ranks = [1]
    assert traced(tmp_path / "b", config, range(1, 4)) == []


def test_a_run_with_a_trace_is_the_run_without(configure: Any, tmp_path: Path, capsys: Any) -> None:
    def losses(name: str, changes: dict[str, Any]) -> list[float]:
        config: ConfigContainer = configure({"validation.eval_iters": 0, **changes})
        config.run.dir = str(tmp_path / name)
        run(config, door="python", command=Command([]), name="tiny")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["lm_loss"] for line in lines]

    profiling = {
        "profiling.use_pytorch_profiler": True,
        "profiling.profile_step_start": 2,
        "profiling.profile_step_end": 4,
        "profiling.pytorch_profiler_collect_shapes": True,
    }
    assert losses("plain", {}) == losses("traced", profiling)
    assert not (tmp_path / "plain" / "torch_profile").exists()
    names = names_in(tmp_path / "traced" / "torch_profile" / "rank-0.json.gz")
    assert "aten::mm" in names
    assert sorted(name for name in set(names) if name.startswith("ProfilerStep#")) == [
        "ProfilerStep#1",
        "ProfilerStep#2",
    ]
    with gzip.open(tmp_path / "traced" / "torch_profile" / "rank-0.json.gz", "rt") as stream:
        assert "Input Dims" in stream.read()
    assert "profile written: torch_profile/rank-0.json.gz" in capsys.readouterr().out


def test_traced_iterations_are_taken_one_by_one(configure: Any, tmp_path: Path, monkeypatch: Any) -> None:
    launch, numbers = TrainStep.launch, itertools.count(1)

    def launched(*args: Any) -> Any:
        with record_function(f"iteration {next(numbers)}"):
            return launch(*args)

    monkeypatch.setattr(TrainStep, "launch", launched)
    monkeypatch.setattr(loop, "is_asynchronous", lambda _: True)
    changes: dict[str, Any] = {"validation.eval_iters": 0, "train.train_iters": 7}
    changes |= {"profiling.use_pytorch_profiler": True, "profiling.profile_step_start": 4}
    config: ConfigContainer = configure({**changes, "profiling.profile_step_end": 6, "run.dir": str(tmp_path / "run")})
    run(config, door="python", command=Command([]), name="tiny")
    names = names_in(tmp_path / "run" / "torch_profile" / "rank-0.json.gz")
    assert sorted({name for name in names if name.startswith("iteration ")}) == ["iteration 4", "iteration 5"]


def test_kernels_by_kind_and_what_of_communication_nothing_hides() -> None:
    def kernel(name: str, begin: float, end: float, kind: str = "kernel") -> dict[str, Any]:
        return {"cat": kind, "name": name, "ts": begin, "dur": end - begin}

    found = summary(
        [
            kernel("nvjet_tst_128x256", 0, 4000),
            kernel("ncclDevKernel_ReduceScatter", 3000, 7000),
            kernel("triton_poi_fused_mul", 5000, 6000),
            kernel("Memcpy HtoD", 9000, 10000, "gpu_memcpy"),
            kernel("cudaLaunchKernel", 0, 100, "cuda_runtime"),
        ]
    )
    assert found == {
        "whole": 10.0,
        "matrix products": 4.0,
        "communication": 4.0,
        "exposed communication": 2.0,
        "idle": 2.0,
        "compiled": 1.0,
        "memory": 1.0,
    }
