"""Saving checkpoints while a run goes on, with torch.distributed.checkpoint in the safetensors format."""

import logging
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import lockstep
from lockstep.config import ConfigContainer
from lockstep.errors import UserError
from lockstep.record.schema import encode
from lockstep.training import checkpoint_files as files
from lockstep.training.checkpoint_state import cause, describe, model_tensors, optimizer_step, optimizer_tensors
from lockstep.training.console import say
from lockstep.training.evaluate import Evaluator
from lockstep.training.hooks import Hook, Progress, RunInfo
from lockstep.training.loop import Trainer

_FILE_BYTES = 1 << 30
"""Tensors are spread over files of about this size: the writer builds each file in memory as a whole."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a run between two iterations: tensors by canonical name, dropout streams, and plain values."""

    iteration: int
    tensors: dict[str, torch.Tensor]
    streams: dict[str, torch.Tensor]
    facts: dict[str, Any]

    def on_host(self) -> "Snapshot":
        """Return a copy in host memory that training does not touch."""
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}
        return Snapshot(self.iteration, tensors, self.streams, self.facts)


def take_snapshot(
    config: ConfigContainer, model: nn.Module, trainer: Trainer, evaluator: Evaluator | None, progress: Progress
) -> Snapshot:
    """Return the present state of a run; the tensors are the run's own."""
    optimizer, dropout = trainer.step.optimizer, trainer.step.dropout
    tensors = model_tensors(model)
    with_optimizer = config.checkpoint.save_optim
    if with_optimizer:
        tensors |= optimizer_tensors(optimizer)
    facts = {
        "iteration": progress.iteration,
        "progress": {
            "consumed_samples": progress.consumed_samples,
            "stepped_samples": progress.stepped_samples,
            "evaluated_samples": evaluator.taken if evaluator is not None else {},
        },
        "schedules": {"learning_rate": asdict(trainer.learning_rate), "weight_decay": asdict(trainer.weight_decay)},
        "optimizer": {"step": optimizer_step(optimizer)} if with_optimizer else None,
        "loss_scaler": optimizer.scaler.state_dict() if with_optimizer and optimizer.scaler is not None else None,
        "micro_batch_size": trainer.batches.micro_batch_size,
    }
    streams = dropout.state_dict() if config.checkpoint.save_rng and dropout is not None else {}
    return Snapshot(progress.iteration, tensors, streams, facts)


def write_checkpoint(root: Path, snapshot: Snapshot, config: dict[str, Any], origin: dict[str, Any]) -> None:
    """Write a snapshot as a checkpoint of ``root``, whole or not at all.

    ``config`` and ``origin`` are kept as JSON, beside the tensors and in the manifest.
    """
    scratch = files.scratch_dir(root, snapshot.iteration)
    try:
        _fill(scratch, snapshot, config, origin)
        files.publish(root, scratch, snapshot.iteration)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _fill(folder: Path, snapshot: Snapshot, config: dict[str, Any], origin: dict[str, Any]) -> None:
    """Write all files of a checkpoint, the manifest last."""
    _write_tensors(folder, snapshot.tensors)
    if snapshot.streams:
        save_file(snapshot.streams, folder / files.RNG)
    files.write_json(folder / files.CONFIG, encode(config))
    manifest = {
        "format": files.FORMAT,
        "lockstep": lockstep.__version__,
        "torch": str(torch.__version__),
        **snapshot.facts,
        **origin,
        "tensors": describe(snapshot.tensors),
        "files": files.file_facts(folder),
    }
    files.write_json(folder / files.MANIFEST, encode(manifest))


def _write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one file or more; every file says which part of each tensor it holds, so that ranks can write their own."""
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_spread(tensors), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(tensors, storage_writer=writer, no_dist=True)


def _spread(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the number of the file, from 1, that each tensor goes to."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > _FILE_BYTES:
            number, size = number + 1, 0
        numbers[name] = number
        size += tensor.nbytes
    return numbers


class CheckpointHook(Hook):
    """Saves every ``checkpoint.save_interval`` iterations, before an early exit, and at the end of training.

    With ``checkpoint.async_save`` files are written in the background from a copy in host memory, one checkpoint at a
    time; a save that failed ends the run at the next save or at its end.
    """

    def __init__(
        self, config: ConfigContainer, snapshot: Callable[[Progress], Snapshot], origin: dict[str, Any]
    ) -> None:
        settings = config.checkpoint
        assert settings.save is not None, "built only where checkpoints are saved"
        assert settings.save_interval is not None, "validation asks for it"
        self._settings = settings
        self._root = Path(settings.save)
        self._interval = settings.save_interval
        self._config = {"config": config.as_dict()}
        self._origin = origin
        self._snapshot = snapshot
        self._writer = ThreadPoolExecutor(1, "checkpoint") if settings.async_save else None
        self._pending: Future[None] | None = None
        self._trained = False

    def on_start(self, info: RunInfo) -> None:
        """Make the folder and clear what earlier saves left unfinished."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(self._root)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self._root}: {error.strerror}") from None

    def after_iteration(self, progress: Progress, stopping: bool) -> None:
        """Save when it is time or the run stops."""
        self._trained = True
        if progress.iteration % self._interval == 0 or stopping:
            self._save(progress)
        if stopping:
            self._settle()

    def after_training(self, progress: Progress) -> None:
        """Save the last iteration and wait until it is written."""
        if self._trained and progress.iteration % self._interval:
            self._save(progress)
        self._settle()

    def on_failure(self, error: BaseException) -> None:
        """Let a save in the background come to its end."""
        try:
            self._settle()
        except UserError as failed:
            logging.getLogger("lockstep").error("%s", failed)

    def _save(self, progress: Progress) -> None:
        self._settle()
        say(
            f"[{datetime.now():%Y-%m-%d %H:%M:%S.%f}] saving checkpoint at iteration {progress.iteration:7d} "
            f"to {self._root} in safetensors format"
        )
        snapshot = self._snapshot(progress)
        if self._writer is None:
            self._write(snapshot)
        else:
            self._pending = self._writer.submit(self._write, snapshot.on_host())

    def _settle(self) -> None:
        """Wait for the save in the background; raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(self._root, snapshot, self._config, self._origin)
            settings = self._settings
            recent = settings.most_recent_k if settings.most_recent_k >= 0 else None
            files.prune(self._root, snapshot.iteration, recent, settings.save_retain_interval)
        except (OSError, dcp.CheckpointException) as error:
            raise UserError(
                f"saving the checkpoint of iteration {snapshot.iteration} to {self._root} failed: {cause(error)}; "
                "the checkpoints before it are as they were"
            ) from error
        say(
            f"  [{datetime.now():%Y-%m-%d %H:%M:%S.%f}] successfully saved checkpoint from iteration "
            f"{snapshot.iteration:7d} to {self._root} [ t 1/1, gtp_remat 1/1, p 1/1 ]"
        )
