"""TensorBoard and Weights & Biases: the same scalars under Megatron-LM's tags."""

import time
from pathlib import Path
from typing import Any, Protocol

from lockstep.config import ConfigContainer
from lockstep.errors import UserError
from lockstep.training.console import LOSS_KEY
from lockstep.training.hooks import Hook, IterationReport, Progress, RunInfo
from lockstep.training.result import Evaluation, RunResult


def train_scalars(report: IterationReport, config: ConfigContainer, processes: int = 1) -> dict[str, float]:
    """Return the scalars of an iteration by tag."""
    step, logger = report.step, config.logger
    scalars: dict[str, float | None] = {
        "learning-rate": report.next_lr,
        "batch-size": report.global_batch_size,
        LOSS_KEY: step.lm_loss,
        **step.router_losses,
        "loss-scale": step.loss_scale if logger.log_loss_scale_to_tensorboard else None,
        "world-size": processes if logger.log_world_size_to_tensorboard else None,
        "grad-norm": step.grad_norm,
        "num-zeros": step.num_zeros,
        "params-norm": report.params_norm,
    }
    return {tag: value for tag, value in scalars.items() if value is not None}


def evaluation_scalars(evaluation: Evaluation, config: ConfigContainer) -> dict[str, float]:
    """Return the scalars of an evaluation by tag."""
    scalars = {f"{LOSS_KEY} validation": evaluation.lm_loss}
    if config.logger.log_validation_ppl_to_tensorboard:
        scalars[f"{LOSS_KEY} validation ppl"] = evaluation.ppl
    return scalars


class Times:
    """The time that iterations took since it was last asked for."""

    def __init__(self, info: RunInfo) -> None:
        self._flops_per_sample = info.flops_per_sample / info.processes
        self._throughput = info.config.logger.log_throughput
        self._seconds: list[float] = []
        self._samples = 0

    def add(self, report: IterationReport) -> None:
        """Count an iteration."""
        self._seconds.append(report.seconds)
        self._samples += report.global_batch_size

    def take(self) -> dict[str, float]:
        """Return the mean seconds of an iteration and, where it is logged, TFLOP/s per process; start anew."""
        seconds = sum(self._seconds)
        scalars = {"iteration-time": seconds / len(self._seconds)}
        if self._throughput:
            scalars["throughput"] = self._flops_per_sample * self._samples / seconds / 1e12
        self._seconds, self._samples = [], 0
        return scalars


class Tracker(Protocol):
    """Where scalars go."""

    def write(self, scalars: dict[str, float], iteration: int, consumed_samples: int) -> None:
        """Write scalars by tag."""

    def close(self) -> None:
        """Write what is left and close."""


class TrackerHook(Hook):
    """Sends the scalars of iterations and evaluations to a tracker."""

    def __init__(self, tracker: Tracker, interval: int) -> None:
        self._tracker = tracker
        self._interval = interval

    def on_start(self, info: RunInfo) -> None:
        """Keep the configuration, which says what is logged."""
        self._config, self._processes = info.config, info.processes
        self._times = Times(info)

    def after_step(self, report: IterationReport) -> None:
        """Write the scalars of an iteration when it is time."""
        logger = self._config.logger
        self._times.add(report)
        if logger.log_timers_to_tensorboard and report.iteration % logger.log_interval == 0:
            self._tracker.write(self._times.take(), report.iteration, report.consumed_samples)
        if report.iteration % self._interval:
            return
        self._tracker.write(
            train_scalars(report, self._config, self._processes), report.iteration, report.consumed_samples
        )
        if logger.log_memory_to_tensorboard:
            memory = {"mem-max-allocated-bytes": float(report.memory_bytes)}
            self._tracker.write(memory, report.iteration, report.consumed_samples)

    def after_evaluation(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """Write the scalars of an evaluation; a run that does not train writes none."""
        if evaluation is None or self._config.validation.skip_train:
            return
        scalars = evaluation_scalars(evaluation, self._config)
        self._tracker.write(scalars, evaluation.iteration, progress.consumed_samples)

    def on_finish(self, result: RunResult) -> None:
        """Close the tracker."""
        self._tracker.close()

    def on_failure(self, error: BaseException) -> None:
        """Close the tracker."""
        self._tracker.close()


class TensorBoard:
    """TensorBoard files; every tag also as ``<tag> vs samples``."""

    def __init__(self, folder: Path, queue_size: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(folder), max_queue=queue_size)

    def write(self, scalars: dict[str, float], iteration: int, consumed_samples: int) -> None:
        """Write scalars by tag, over iterations and over samples."""
        now = time.time()
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, iteration, walltime=now)
            self._writer.add_scalar(f"{tag} vs samples", value, consumed_samples, walltime=now)

    def close(self) -> None:
        """Write what is queued and close the file."""
        self._writer.close()


class WandB:
    """A Weights & Biases run.

    Raises:
        UserError: the wandb package is not installed.
    """

    def __init__(self, config: ConfigContainer, name: str, run_dir: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "logger.wandb_project is set, but the wandb package is not installed; "
                "install it with: pip install 'lockstep-lm[wandb]'"
            ) from None
        logger = config.logger
        self._run: Any = wandb.init(
            project=logger.wandb_project,
            entity=logger.wandb_entity,
            name=logger.wandb_exp_name or name,
            dir=logger.wandb_save_dir or str(run_dir),
            config=config.as_dict(),
        )

    def write(self, scalars: dict[str, float], iteration: int, consumed_samples: int) -> None:
        """Write scalars by tag, together with the samples consumed so far."""
        self._run.log({**scalars, "samples vs steps": consumed_samples}, step=iteration)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def build_trackers(config: ConfigContainer, name: str, run_dir: Path) -> list[Hook]:
    """Return the hooks of the trackers that a configuration asks for: TensorBoard always, W&B with a project.

    Raises:
        UserError: W&B is asked for and not installed.
    """
    logger = config.logger
    trackers: list[Tracker] = []
    if logger.wandb_project:
        trackers.append(WandB(config, name, run_dir))
    folder = Path(logger.tensorboard_dir) if logger.tensorboard_dir else run_dir / "tb_logs"
    trackers.append(TensorBoard(folder, logger.tensorboard_queue_size))
    return [TrackerHook(tracker, logger.tensorboard_log_interval) for tracker in trackers]
