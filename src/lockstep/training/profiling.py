"""Traces of a few iterations by PyTorch's profiler."""

import warnings
from pathlib import Path

import torch.distributed as dist
from torch.profiler import profile, schedule

from lockstep.config.output import ProfilingConfig
from lockstep.training.console import say
from lockstep.training.hooks import Hook, IterationReport, RunInfo
from lockstep.training.result import RunResult

FOLDER = "torch_profile"


class ProfileHook(Hook):
    """Traces the iterations from `profile_step_start` up to, but not including, `profile_step_end`.

    Each chosen rank writes `torch_profile/rank-<rank>.json.gz` in the run directory: a file for Perfetto or
    chrome://tracing. A run that ends earlier writes what there is.
    """

    def __init__(self, config: ProfilingConfig) -> None:
        self._config = config
        self._first = max(config.profile_step_start, 1)
        self._last = config.profile_step_end - 1
        self._profiler: profile | None = None

    def on_start(self, info: RunInfo) -> None:
        """Find out whether this rank is to be traced."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._chosen = not self._config.profile_ranks or rank in self._config.profile_ranks
        self._file = info.run_dir / FOLDER / f"rank-{rank}.json.gz"

    def needs_state(self, iteration: int) -> bool:
        """Have the traced iterations, and the one to warm up, taken one by one."""
        return self._first - 2 <= iteration <= self._last

    def before_step(self, iteration: int) -> None:
        """Start one iteration early, for the profiler to warm up, or in the middle of the span after a resume."""
        if not self._chosen or self._profiler is not None or not self._first - 1 <= iteration <= self._last:
            return
        warm_up = iteration < self._first
        traced = self._last - max(iteration, self._first) + 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Profiler won't be using warmup")  # there is no iteration for it
            plan = schedule(wait=0, warmup=int(warm_up), active=traced, repeat=1)
        self._profiler = profile(
            schedule=plan,
            on_trace_ready=self._write,
            record_shapes=self._config.pytorch_profiler_collect_shapes,
            with_stack=self._config.pytorch_profiler_collect_callstack,
        )
        self._profiler.start()

    def after_step(self, report: IterationReport) -> None:
        """Move the profiler on; it writes the trace after the last iteration."""
        if self._profiler is not None:
            self._profiler.step()
            if report.iteration == self._last:
                self._stop()

    def on_finish(self, result: RunResult) -> None:
        """Write the trace of a run that ended within the span."""
        self._stop()

    def on_failure(self, error: BaseException) -> None:
        """Write the trace of a run that failed within the span."""
        self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            self._chosen = False

    def _write(self, profiler: profile) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._file))
        say(f"profile written: {Path(FOLDER) / self._file.name} in the run directory")
