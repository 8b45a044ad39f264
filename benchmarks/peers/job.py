"""What a peer is asked to train, and how its steps are timed: the same for each."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    """A dense decoder, or a named family, and its batches; ``batch`` counts the samples of all GPUs."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    length: int
    rotary_base: float
    micro_batch: int
    batch: int
    gpus: int
    float8: bool
    recomputed: bool

    def tokens(self, number: int, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return inputs and labels of a process's micro-batches in a step: random, the same as ours."""
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(0, self.vocabulary, (self.batch, self.length + 1), generator=generator)
        own = text.unflatten(0, (-1, self.gpus, self.micro_batch))[:, rank]
        return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in own]


def started() -> tuple[Job, int, Path | None]:
    """Return the job of the command line, how many steps to time, and where a profile goes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", type=Path)
    options = parser.parse_args()
    return Job(**json.loads(options.job)), options.steps, options.profile


def report(job: Job, take: Callable[[int], float], steps: int, profile: Path | None, words: dict[str, str]) -> None:
    """Take steps, each until its loss is known, and print what was found; the first three do not count."""
    leads = int(os.environ.get("RANK") or 0) == 0
    cuda = torch.cuda.is_available()
    losses, seconds = [], []
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for number in range(steps + 3):
        losses.append(take(number))
        ended = time.perf_counter()
        seconds.append(ended - begun)
        begun = ended
        if leads:
            print(f"step {number} {seconds[-1]:.3f} s, loss {losses[-1]:.5f}", file=sys.stderr, flush=True)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    kernels = _profiled(lambda: take(steps + 3), profile, leads)
    middle = statistics.median(seconds[3:])
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "first_step_s": round(seconds[0], 3),
        "step_s": round(middle, 5),
        "spread_s": round(max(seconds[3:]) - min(seconds[3:]), 5),
        "tokens_per_s": round(job.batch * job.length / job.gpus / middle, 1),
        "peak_gib": round(peak, 2),
        "losses": [round(loss, 5) for loss in losses],
        "kernels_ms": kernels,
        "job": asdict(job),
    }
    if leads:
        print(json.dumps(found | words), flush=True)


def _profiled(step: Callable[[], object], path: Path | None, leads: bool) -> dict[str, float] | None:
    if path is None:
        return None
    from lockstep.training.kernel_times import profiled

    return profiled(step, path, leads)
