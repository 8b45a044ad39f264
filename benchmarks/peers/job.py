"""What a peer is asked to train, and how its steps are timed: the same for each."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# Steps before those that count.
WARM_UP = 3


@dataclass(frozen=True)
class Job:
    """A decoder, with latent attention where it has experts, and its batches; ``batch`` counts samples of all GPUs.

    Attributes:
        experts: how many each layer has, how many a token takes, the width of one, and how many all tokens take; None
            of a dense decoder.
        float8: the scaling of float8 linears, tensorwise or rowwise; None of a job in BF16.
        recomputed: whether every layer is recomputed in the backward pass.
        compiled: whether layers and loss are compiled.
    """

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
    float8: str | None
    recomputed: bool
    compiled: bool
    experts: tuple[int, int, int, int] | None = None

    def tokens(self, number: int, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return inputs and labels of a process's micro-batches in a step: random, the same as ours.

        A step of the warm-up has at most two.
        """
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(0, self.vocabulary, (self.batch, self.length + 1), generator=generator)
        own = text.unflatten(0, (-1, self.gpus, self.micro_batch))[: 2 if number < WARM_UP else None, rank]
        return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in own]


Batches = list[tuple[torch.Tensor, torch.Tensor]]
Take = Callable[[int, Batches, bool], float]
"""Takes the step of a number with its micro-batches; returns its loss where that is to be read, else anything."""


@dataclass(frozen=True)
class Turn:
    """A job, how many of its steps count, and where a profile of one more goes."""

    job: Job
    steps: int
    profile: Path | None

    @classmethod
    def of_command_line(cls) -> "Turn":
        """Return the turn that the command line asks for."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--job", required=True)
        parser.add_argument("--steps", type=int, default=8)
        parser.add_argument("--profile", type=Path)
        options = parser.parse_args()
        return cls(Job(**json.loads(options.job)), options.steps, options.profile)

    def report(self, take: Take, words: dict[str, str]) -> None:
        """Take steps and print what was found: the mean time of those that count, between which nothing is read."""
        job, cuda, rank = self.job, torch.cuda.is_available(), int(os.environ.get("RANK") or 0)
        leads, last = rank == 0, WARM_UP + self.steps - 1
        batches = [job.tokens(number, rank) for number in range(last + 1)]
        losses, ends = [], [0.0]
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for number, batch in enumerate(batches):
            read = number < WARM_UP or number == last
            loss = take(number, batch, read)
            if read:
                losses.append(loss)
                ends.append(time.perf_counter() - begun)
                if leads:
                    print(f"step {number}: {ends[-1]:.3f} s so far, loss {loss:.5f}", file=sys.stderr, flush=True)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        kernels = self._profiled(lambda: take(last, batches[last], True), leads)
        mean = (ends[-1] - ends[WARM_UP]) / self.steps
        found: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": torch.__version__,
            "gpus": job.gpus,
            "first_step_s": round(ends[1], 3),
            "step_s": round(mean, 5),
            "tokens_per_s": round(job.batch * job.length / job.gpus / mean, 1),
            "peak_gib": round(peak, 2),
            "losses": [round(loss, 5) for loss in losses],
            "kernels_ms": kernels,
            "job": asdict(job),
        }
        if leads:
            print(json.dumps(found | words), flush=True)

    def _profiled(self, step: Callable[[], object], leads: bool) -> dict[str, float] | None:
        if self.profile is None:
            return None
        from lockstep.training.kernel_times import profiled

        return profiled(step, self.profile, leads)
