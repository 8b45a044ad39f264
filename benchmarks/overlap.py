"""Time a data-parallel job with and without communication overlap, in turns, and check that both compute the same.

    python -m torch.distributed.run --standalone --nproc_per_node=2 benchmarks/overlap.py

Every process takes steps of one model on random tokens, on its GPU or CPU. Jobs alternate, so that what else the
machine does hits both alike. The first turn of each does not count.
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.models.layers import required
from lockstep.parallel import Mesh, start_processes
from lockstep.training.device import choose_device
from lockstep.training.feed import Batch
from lockstep.training.optimizer import Optimizer
from lockstep.training.precision import params_dtype
from lockstep.training.setup import build_parallel_model, build_passes
from lockstep.training.step import StepResult, TrainStep

OVERLAPS = {
    "all-reduce": {"ddp.overlap_grad_reduce": True},
    "sharded optimizer": {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True},
}


def configure(options: argparse.Namespace, changes: dict[str, object], processes: int) -> ConfigContainer:
    """Return the configuration of the job with changes by dotted path."""
    settings = {
        "model.num_layers": options.layers,
        "model.hidden_size": options.hidden,
        "model.num_attention_heads": max(1, options.hidden // 64),
        "model.seq_length": options.length,
        "model.vocab_size": options.vocabulary,
        "model.hidden_dropout": 0.0,
        "model.attention_dropout": 0.0,
        "train.micro_batch_size": options.micro_batch,
        "train.global_batch_size": options.micro_batch * options.micro_batches * processes,
        "train.train_iters": options.steps * (1 + options.turns),
        "optimizer.lr": 1e-4,
        "mixed_precision.bf16": options.bf16,
        "tokenizer.tokenizer_type": "NullTokenizer",
        "tokenizer.vocab_size": options.vocabulary,
        "ddp.bucket_size": options.bucket_size,
    }
    config = ConfigContainer()
    for path, value in {**settings, **changes}.items():
        config.set(path, value, Origin("python"))
    return resolve(config, world_size=processes)


class Job:
    """A model that takes steps, and how long each took on average in every turn."""

    def __init__(self, config: ConfigContainer, mesh: Mesh, device: torch.device) -> None:
        self._config, self._mesh, self._device = config, mesh, device
        self._model, spans, _ = build_parallel_model(config, mesh, device, params_dtype(config))
        passes = build_passes(config, self._model, spans, mesh, device)
        self._step = TrainStep(passes, Optimizer(self._model, config, mesh), dp=mesh.dp)
        self.seconds: list[float] = []
        self.results: list[StepResult] = []

    def turn(self, number: int, steps: int) -> None:
        """Take some steps on tokens that the number of the turn and this process draw."""
        micro_batch_size = required(self._config.train.micro_batch_size)
        batches = [self._batch(1000 * (number * steps + step) + self._mesh.dp.rank) for step in range(steps)]
        dist.barrier()
        self._finish()
        started = time.perf_counter()
        self.results += [self._step(batch, micro_batch_size, 1e-4, 0.01) for batch in batches]
        self._finish()
        self.seconds.append((time.perf_counter() - started) / steps)

    def _finish(self) -> None:
        """Wait for what is under way: weights that still travel, and the GPU."""
        self._model.state_dict()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _batch(self, seed: int) -> Batch:
        model = self._config.model
        samples = required(self._config.train.global_batch_size) // self._mesh.dp.size
        length, vocabulary = required(model.seq_length), required(model.vocab_size)
        text = torch.randint(0, vocabulary, (samples, length + 1), generator=torch.Generator().manual_seed(seed))
        positions = torch.arange(length).repeat(samples, 1)
        return Batch(text[:, :-1], text[:, 1:], torch.ones(positions.shape), positions).to(self._device)


def compare(options: argparse.Namespace, kind: str, mesh: Mesh, device: torch.device) -> bool:
    """Time one kind of data parallelism, print its line, and tell whether overlap changed nothing."""
    base = {"ddp.use_distributed_optimizer": kind == "sharded optimizer"}
    jobs = [Job(configure(options, {**base, **more}, mesh.dp.size), mesh, device) for more in ({}, OVERLAPS[kind])]
    for number in range(1 + options.turns):
        for job in jobs if number % 2 else jobs[::-1]:
            job.turn(number, options.steps)
    without, overlapped = jobs
    same = without.results == overlapped.results
    best = [min(job.seconds[1:]) for job in jobs]
    middle = [statistics.median(job.seconds[1:]) for job in jobs]
    if mesh.leads:
        print(
            f"{kind}: fastest turns, {best[0] * 1e3:.1f} ms a step without, {best[1] * 1e3:.1f} ms with overlap, "
            f"ratio {best[1] / best[0]:.3f}; medians {middle[0] * 1e3:.1f} and {middle[1] * 1e3:.1f} ms, "
            f"ratio {middle[1] / middle[0]:.3f}; losses and norms {'equal' if same else 'DIFFER'}",
            flush=True,
        )
    return same


def main() -> int:
    """Time both kinds; exit code 1 where overlap changed a number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "layers": 4,
        "hidden": 256,
        "length": 128,
        "vocabulary": 4096,
        "micro-batch": 2,
        "micro-batches": 2,
        "bucket-size": 1_000_000,
        "steps": 5,
        "turns": 6,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    device = choose_device("auto")
    config = configure(options, {}, int(os.environ.get("WORLD_SIZE", "1")))
    with start_processes(config, device) as mesh:
        if mesh.leads:
            print(f"{mesh.dp.size} processes, {device.type}, torch {torch.__version__}", flush=True)
        same = [compare(options, kind, mesh, device) for kind in OVERLAPS]
    return 0 if all(same) else 1


if __name__ == "__main__":
    raise SystemExit(main())
