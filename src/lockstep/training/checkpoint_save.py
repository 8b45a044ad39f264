"""Saving checkpoints while a run goes on, with torch.distributed.checkpoint in the safetensors format."""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import lockstep
from lockstep.config import ConfigContainer
from lockstep.errors import CommonError, UserError
from lockstep.parallel import Mesh
from lockstep.parallel.dropout import keeps_streams, stream_layout, stream_number
from lockstep.parallel.placement import Placed, Placement
from lockstep.parallel.watch import LostProcessError
from lockstep.peft.apply import is_adapter
from lockstep.record.schema import encode
from lockstep.training import checkpoint_files as files
from lockstep.training.checkpoint_peers import Peers
from lockstep.training.checkpoint_state import model_tensors, optimizer_step, optimizer_tensors, written_here
from lockstep.training.console import say
from lockstep.training.evaluate import Evaluator
from lockstep.training.hooks import Hook, Progress, RunInfo
from lockstep.training.loop import Trainer
from lockstep.training.setup import Parts


@dataclass(frozen=True)
class Snapshot:
    """What this process saves of a run between two iterations.

    Tensors go by canonical name, with their place; dropout streams by the name of their file. ``facts`` are plain
    values, equal on all processes. ``attached`` are files to copy beside the tensors, under their new names.
    """

    iteration: int
    tensors: dict[str, Placed]
    streams: dict[str, dict[str, torch.Tensor]]
    facts: dict[str, Any]
    attached: dict[str, Path] = field(default_factory=dict)

    def on_host(self) -> "Snapshot":
        """Return a copy in host memory that training does not touch."""
        return replace(self, tensors={name: placed.on_host() for name, placed in self.tensors.items()})


@dataclass(frozen=True)
class Saved:
    """The parts of a run that a checkpoint is made of."""

    config: ConfigContainer
    mesh: Mesh
    parts: Parts
    placement: Placement = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "placement", Placement(self.config.model, self.mesh, self.config.peft))

    def snapshot(self, progress: Progress) -> Snapshot:
        """Return the present state of the run; the tensors are the run's own."""
        trainer, settings = self.parts.trainer, self.config.checkpoint
        assert trainer is not None, "only a run that trains saves"
        optimizer, dropout = trainer.step.optimizer, trainer.step.dropout
        tensors = model_tensors(self.parts.model, self.placement)
        if self.parts.base is not None:
            tensors = {name: placed for name, placed in tensors.items() if is_adapter(name)}
        if settings.save_optim:
            tensors |= optimizer_tensors(optimizer, self.placement)
        streams = {}
        if settings.save_rng and dropout is not None and keeps_streams(self.mesh):
            streams[files.rng_file(stream_number(self.mesh))] = dropout.state_dict()
        facts = _facts(trainer, self.parts.evaluator, progress, with_optimizer=settings.save_optim)
        if self.parts.base is not None:
            facts[files.ADAPTERS] = self.parts.base
        facts |= {"streams": stream_layout(self.mesh) if settings.save_rng else {}, "layout": self.mesh.describe()}
        return Snapshot(progress.iteration, written_here(tensors, optimizer, self.placement), streams, facts)


def _facts(
    trainer: Trainer, evaluator: Evaluator | None, progress: Progress, *, with_optimizer: bool
) -> dict[str, Any]:
    optimizer = trainer.step.optimizer
    return {
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


def write_checkpoint(
    root: Path, snapshot: Snapshot, config: dict[str, Any], origin: dict[str, Any], peers: Peers
) -> None:
    """Write a snapshot as a checkpoint of ``root``, whole or not at all; all processes together.

    ``config`` and ``origin`` are kept as JSON, beside the tensors and in the manifest.

    Raises:
        UserError: on all processes, if one of them could not write.
    """
    from lockstep.training.checkpoint_storage import write_tensors  # PyTorch's checkpoints are slow to import

    scratch = peers.by_leader(lambda: files.scratch_dir(root, snapshot.iteration))
    try:
        names = write_tensors(scratch, snapshot.tensors, peers.group)
        parts = peers.everywhere(lambda: _write_streams(scratch, snapshot, names))
        facts = {name: fact for part in parts for name, fact in part.items()}
        facts |= peers.by_leader(lambda: _attach(scratch, snapshot.attached))
        peers.by_leader(lambda: _complete(root, scratch, snapshot, config, origin, facts))
    except BaseException:
        if peers.leads:
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write_streams(folder: Path, snapshot: Snapshot, written: list[str]) -> dict[str, dict[str, Any]]:
    """Write this process's random streams, and return size and SHA-256 of all files that it wrote."""
    for name, streams in snapshot.streams.items():
        save_file(streams, folder / name)
    return {name: files.settle(folder / name) for name in [*written, *snapshot.streams]}


def _attach(folder: Path, attached: dict[str, Path]) -> dict[str, dict[str, Any]]:
    for name, path in attached.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    return {name: files.settle(folder / name) for name in attached}


def _complete(
    root: Path,
    folder: Path,
    snapshot: Snapshot,
    config: dict[str, Any],
    origin: dict[str, Any],
    facts: dict[str, dict[str, Any]],
) -> None:
    """Add the configuration and, last, the manifest with the ``facts`` of all files, and publish the checkpoint."""
    files.write_json(folder / files.CONFIG, encode(config))
    manifest = {
        "format": files.FORMAT,
        "lockstep": lockstep.__version__,
        "torch": str(torch.__version__),
        **snapshot.facts,
        **origin,
        "files": {**facts, files.CONFIG: files.settle(folder / files.CONFIG)},
    }
    files.write_json(folder / files.MANIFEST, encode(manifest))
    files.publish(root, folder, snapshot.iteration)


class CheckpointHook(Hook):
    """Saves every ``checkpoint.save_interval`` iterations, before an early exit, and at the end of training.

    With ``checkpoint.async_save`` files are written in the background from a copy in host memory, one checkpoint at a
    time; a save that failed ends the run at the next save or at its end. Every process has this hook: they save
    together. ``origin`` goes into the manifest.
    """

    def __init__(
        self,
        config: ConfigContainer,
        snapshot: Callable[[Progress], Snapshot],
        origin: dict[str, Any],
        peers: Peers | None = None,
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
        self._peers = peers or Peers()
        self._writer = ThreadPoolExecutor(1, "checkpoint") if settings.async_save else None
        self._pending: Future[None] | None = None
        self._trained = False

    def on_start(self, info: RunInfo) -> None:
        """Make the folder and clear what earlier saves left unfinished."""
        self._peers.by_leader(self._prepare)

    def _prepare(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(self._root)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self._root}: {error.strerror}") from None

    def needs_state(self, iteration: int) -> bool:
        """Tell whether a save follows."""
        return iteration % self._interval == 0

    def after_iteration(self, progress: Progress, stopping: bool) -> None:
        """Save when it is time or the run stops."""
        self._trained = True
        if self.needs_state(progress.iteration) or stopping:
            self._save(progress)
        if stopping:
            self._settle()

    def after_training(self, progress: Progress) -> None:
        """Save the last iteration and wait until it is written."""
        if self._trained and progress.iteration % self._interval:
            self._save(progress)
        self._settle()

    def on_failure(self, error: BaseException) -> None:
        """Let a save in the background come to its end, which it cannot without all processes."""
        if isinstance(error, LostProcessError):
            return
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
            write_checkpoint(self._root, snapshot, self._config, self._origin, self._peers)
            self._peers.by_leader(lambda: self._prune(snapshot.iteration))
        except (OSError, SafetensorError, UserError) as error:
            raise CommonError(
                f"saving the checkpoint of iteration {snapshot.iteration} to {self._root} failed: "
                f"{' '.join(str(error).split())}; the checkpoints before it are as they were"
            ) from error
        layout = snapshot.facts["layout"]
        say(
            f"  [{datetime.now():%Y-%m-%d %H:%M:%S.%f}] successfully saved checkpoint from iteration "
            f"{snapshot.iteration:7d} to {self._root} "
            f"[ t 1/{layout['tensor_parallel']}, gtp_remat 1/1, p 1/{layout['pipeline_parallel']} ]"
        )

    def _prune(self, iteration: int) -> None:
        settings = self._settings
        recent = settings.most_recent_k if settings.most_recent_k >= 0 else None
        files.prune(self._root, iteration, recent, settings.save_retain_interval)
