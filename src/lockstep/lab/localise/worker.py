"""One side of a comparison, run again with probes on: the process that the localiser starts.

``python -m lockstep.lab.localise.worker JOB`` or the same under torchrun; JOB is a file with the fields of `Job`.
"""

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lockstep.config import ConfigContainer, Origin, all_fields
from lockstep.errors import UserError
from lockstep.guard import run as guarded
from lockstep.lab.localise.active import active_settings
from lockstep.lab.localise.probes import Probes, ProbeWriter, load_probes
from lockstep.lab.localise.recorder import Recorder
from lockstep.lab.localise.stages import AFTER, LOSS, MAIN, NORM, STATE, STREAM, WEIGHTS
from lockstep.models import GPTModel
from lockstep.parallel import Mesh, start_processes
from lockstep.parallel.dropout import stream_number
from lockstep.parallel.fsdp import is_sharded
from lockstep.parallel.placement import Placed, Placement
from lockstep.record.environment import code_version, device_facts, environment_variables, package_versions
from lockstep.record.schema import decode_number, encode
from lockstep.training.checkpoint_load import open_base, open_source, restore, restore_base
from lockstep.training.checkpoint_peers import Peers
from lockstep.training.checkpoint_state import (
    MODEL,
    OPTIMIZER,
    make_optimizer_state,
    model_tensors,
    optimizer_step,
    optimizer_tensors,
    take_model_tensors,
)
from lockstep.training.device import choose_device, switches
from lockstep.training.exits import ExitRule
from lockstep.training.feed import Batch
from lockstep.training.hooks import Progress, RunInfo
from lockstep.training.loop import Trainer, run_iteration
from lockstep.training.optimizer import Optimizer
from lockstep.training.setup import build, build_parallel_model, build_passes
from lockstep.training.step import StepResult, TrainStep

RUN, TWIN = "run", "float64"
"""The two passes: as the run computes, and in float64."""


@dataclass(frozen=True)
class Job:
    """What a side does.

    Attributes:
        config: the resolved tree, nested, as the record keeps it.
        iterations: those that are probed.
        folder: where the probes go.
        start: probes of the other side, with whose weights and optimizer state the float64 pass begins; its own where
            None.
    """

    config: dict[str, dict[str, Any]]
    iterations: list[int]
    folder: str
    start: str | None = None

    def save(self, path: Path) -> None:
        """Write the job to a file."""
        path.write_text(json.dumps(encode(asdict(self)), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Job":
        """Read a job."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def config_of(recorded: Mapping[str, Mapping[str, Any]]) -> ConfigContainer:
    """Return the tree of a record; it is resolved already.

    Raises:
        UserError: it has settings that this Lockstep does not know.
    """
    config, known = ConfigContainer(), all_fields()
    for section, values in recorded.items():
        for name, value in values.items():
            path = f"{section}.{name}"
            if path not in known:
                raise UserError(f"the record has {path}, which this Lockstep does not know; use the version it is of")
            if encode(config.get(path)) != value:
                config.set(path, decode_number(value), Origin("file", "run record"))
    return config


def main(argv: list[str]) -> int:
    """Do the job in the file that is named."""
    return guarded(lambda: probe(Job.load(Path(argv[0]))))


def probe(job: Job) -> int:
    """Run to the last of the iterations and write the probes of each, then those of the same steps in float64."""
    config = config_of(job.config)
    for path in ("checkpoint.save", "run.dir"):
        config.set(path, None, Origin("file", "probes"))
    for path in ("run.compile", "run.cuda_graphs"):  # probes look on between the operations of a layer
        config.set(path, "none", Origin("file", "probes"))
    device = choose_device(config.run.device)
    with switches(config, device), start_processes(config, device) as mesh:
        side = _Side(config, device, mesh, job)
        side.run()
        start = Path(job.start or job.folder)
        side.twin(load_probes(start, RUN))
    return 0


@dataclass(frozen=True)
class _Step:
    """What a step was taken with, to take it again in float64."""

    batch: Batch
    micro_batch_size: int
    lr: float
    weight_decay: float
    streams: dict[str, torch.Tensor] | None
    scaler: dict[str, float] | None


class _Side:
    """The parts of a side on one process."""

    def __init__(self, config: ConfigContainer, device: torch.device, mesh: Mesh, job: Job) -> None:
        self._config, self._device, self._mesh, self._job = config, device, mesh, job
        self._folder = Path(job.folder)
        self._placement: Placement | None = None
        self._steps: dict[int, _Step] = {}

    @property
    def placement(self) -> Placement:
        """Where this process's parameters lie; the config knows the vocabulary once the data are there."""
        if self._placement is None:
            self._placement = Placement(self._config.model, self._mesh, self._config.peft)
        return self._placement

    def run(self) -> None:
        """Take all steps up to the last iteration and write the probes of those in question."""
        config, mesh, wanted = self._config, self._mesh, self._job.iterations
        peers = Peers.of(mesh, timedelta(minutes=config.dist.distributed_timeout_minutes))
        base, source = open_base(config, peers), open_source(config, peers)
        parts = build(config, self._device, mesh, ExitRule(time.monotonic()))
        progress = Progress()
        if base is not None:
            parts = restore_base(base, config, mesh, parts, peers)
        if source is not None:
            parts = restore(source, config, mesh, parts, progress, peers)
        if parts.trainer is None or parts.train_iters < max(wanted):
            raise UserError(f"the run has {parts.train_iters if parts.trainer else 0} iterations, not {max(wanted)}")
        if progress.iteration >= min(wanted):
            raise UserError(f"the run begins after iteration {progress.iteration}; name a later one than {min(wanted)}")
        writer = self._writer(parts.model, parts.trainer.step.optimizer)
        writer.facts["begins_after"] = progress.iteration
        info = RunInfo(config, "probes", self._folder, self._device, parts.train_iters, parts.flops_per_sample)
        while progress.iteration < max(wanted):
            if progress.iteration + 1 in wanted:
                self._probed(writer, parts.model, parts.trainer, info, progress)
            else:
                run_iteration(info, parts.trainer, progress)
        writer.write(self._folder, RUN)
        self._meet()

    def _probed(
        self, writer: ProbeWriter, model: GPTModel, trainer: Trainer, info: RunInfo, progress: Progress
    ) -> None:
        step, iteration = trainer.step, progress.iteration + 1
        self._write_start(writer, model, step.optimizer, iteration)
        writer.number(iteration, STATE, "consumed samples", progress.consumed_samples)
        writer.number(iteration, STATE, "samples of the schedule", progress.stepped_samples)
        streams = None if step.dropout is None else step.dropout.state_dict()
        peft = self._config.peft
        chances = model.config.hidden_dropout, model.config.attention_dropout, peft.dropout if peft.scheme else 0.0
        if streams is not None and max(chances) > 0:
            for name, state in streams.items():
                title = f"{STREAM} {name} {stream_number(self._mesh)}"
                writer.number(iteration, STATE, title, _digest(state))
        scaler = None if step.optimizer.scaler is None else step.optimizer.scaler.state_dict()
        with Recorder(writer, model, step, self._mesh, self.placement, iteration) as seen:
            report = run_iteration(info, trainer, progress)
        assert seen.batch is not None, "a step has a batch"
        self._steps[iteration] = _Step(seen.batch, seen.micro, report.lr, report.weight_decay, streams, scaler)
        self._write_end(writer, model, step.optimizer, iteration, report.step)

    def twin(self, start: Probes) -> None:
        """Take the same steps in float64, from the weights and the optimizer state in ``start``."""
        config, mesh = self._config, self._mesh
        writer: ProbeWriter | None = None
        for iteration, taken in self._steps.items():
            # An optimizer leaves its hooks on a model: every iteration gets a model of its own.
            model, spans, _ = build_parallel_model(config, mesh, self._device, torch.float64)
            passes = build_passes(config, model, spans, mesh, self._device)
            optimizer = Optimizer(model, config, mesh)
            step = TrainStep(passes, optimizer, per_token=config.model.calculate_per_token_loss, dp=mesh.dp)
            writer = writer or self._writer(model, optimizer)
            self._begin(model, optimizer, start, iteration)
            if taken.streams is not None and step.dropout is not None:
                step.dropout.load_state_dict(taken.streams)
            if taken.scaler is not None and optimizer.scaler is not None:
                optimizer.scaler.load_state_dict(taken.scaler)
            with Recorder(writer, model, step, mesh, self.placement, iteration):
                result = step(taken.batch, taken.micro_batch_size, taken.lr, taken.weight_decay)
            self._write_end(writer, model, optimizer, iteration, result)
        assert writer is not None, "a job has iterations"
        writer.write(self._folder, TWIN)
        self._meet()

    def _begin(self, model: GPTModel, optimizer: Optimizer, start: Probes, iteration: int) -> None:
        """Give the float64 model the weights and the optimizer state before an iteration."""
        weights = model_tensors(model, self.placement)
        _fill({name: (WEIGHTS, name.removeprefix(MODEL)) for name in weights}, weights, start, iteration)
        take_model_tensors(model, weights)
        optimizer.weights.copy_from_model()
        saved = [f"{OPTIMIZER}{name}" for name in start.names(iteration, STATE) if not name.startswith("main.")]
        count = start.number(iteration, STATE, "updates")
        state = make_optimizer_state(optimizer, self.placement, saved, None if count is None else int(count))
        names = {name: (STATE, name.removeprefix(OPTIMIZER)) for name in state}
        _fill({name: place for name, place in names.items() if name in saved}, state, start, iteration)

    def _write_start(self, writer: ProbeWriter, model: GPTModel, optimizer: Optimizer, iteration: int) -> None:
        self._write(writer, iteration, WEIGHTS, MODEL, model_tensors(model, self.placement))
        self._write(writer, iteration, STATE, OPTIMIZER, optimizer_tensors(optimizer, self.placement))
        writer.number(iteration, STATE, "updates", optimizer_step(optimizer))

    def _write_end(
        self, writer: ProbeWriter, model: GPTModel, optimizer: Optimizer, iteration: int, result: StepResult
    ) -> None:
        writer.number(iteration, NORM, "gradient norm", result.grad_norm)
        writer.number(iteration, LOSS, "lm loss", result.lm_loss)
        weights = optimizer.weights
        for name, main, span in zip(weights.main_names, weights.main_params, weights.main_spans, strict=True):
            self._write(writer, iteration, MAIN, "", {name: self.placement.placed(name, main, span)})
        # Where these are the model's own there is nothing to copy, and nothing to get wrong.
        if weights.copies or (weights.sharded and not is_sharded(model)):
            self._write(writer, iteration, AFTER, MODEL, model_tensors(model, self.placement))

    def _write(
        self, writer: ProbeWriter, iteration: int, stage: str, prefix: str, tensors: Mapping[str, Placed]
    ) -> None:
        for name, placed in tensors.items():
            for piece in placed.pieces:
                offsets = piece.box.offsets
                box = placed.view(offsets)
                writer.tensor(iteration, stage, name.removeprefix(prefix), box, shape=placed.shape, offsets=offsets)

    def _writer(self, model: GPTModel, optimizer: Optimizer) -> ProbeWriter:
        writer = ProbeWriter(self._mesh.world.rank, self._mesh.world.size)
        writer.facts = {
            "code": code_version(),
            "packages": package_versions(),
            "device": device_facts(str(self._device)),
            "environment": environment_variables(),
            "config": self._config.as_dict(),
            "active": active_settings(model, optimizer),
            "layout": self._mesh.describe(),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        return writer

    def _meet(self) -> None:
        """Wait until all processes are here: one reads what all have written."""
        self._mesh.world.highest_(torch.zeros(1, device=self._device))


def _digest(tensor: torch.Tensor) -> int:
    """Return a number that tells states of a random generator apart; a float holds it exactly."""
    return int.from_bytes(hashlib.sha256(tensor.numpy().tobytes()).digest()[:6], "big")


@torch.no_grad()
def _fill(places: Mapping[str, tuple[str, str]], tensors: Mapping[str, Placed], start: Probes, iteration: int) -> None:
    for name, (stage, theirs) in places.items():
        found = start.logical(iteration, stage, theirs)
        if found is None or tuple(found.whole.shape) != tensors[name].shape:
            raise UserError(f"the other side has no {theirs} of this shape: the sides are different models")
        placed = tensors[name]
        for piece in placed.pieces:
            here = tuple(slice(a, b) for a, b in zip(piece.box.offsets, piece.box.ends, strict=True))
            placed.view(piece.box.offsets).copy_(found.whole[here])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
