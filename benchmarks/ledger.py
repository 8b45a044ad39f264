"""What the ledger costs: steps with and without it, in turn, in one run of the reference pair's shape on a CPU.

``OMP_NUM_THREADS=1 python benchmarks/ledger.py [STEPS]``
"""

import contextlib
import io
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from lockstep.config.resolve import resolve
from lockstep.data.build import batch_hash
from lockstep.lab.correlate import REFERENCE_FLAGS
from lockstep.megatron_lm.parser import parse_flags
from lockstep.parallel import Mesh
from lockstep.parallel.gradients import Gradients
from lockstep.parallel.kinds import KINDS
from lockstep.record.schema import encode
from lockstep.training import loop
from lockstep.training.exits import ExitRule
from lockstep.training.feed import Batch, Hashes
from lockstep.training.hooks import Progress, RunInfo, _ledger
from lockstep.training.setup import build


def _norms(self: Gradients, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return self.norm(tensors), torch.zeros(len(KINDS), dtype=torch.float64)


def _hashes(batch: Batch, *rest: object) -> Callable[[], Hashes]:
    return lambda: Hashes(batch_hash(batch.tokens, batch.labels), [])


def main() -> None:
    """Print the median step with and without, and their ratio."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    config = resolve(parse_flags([*shlex.split(REFERENCE_FLAGS), "--train-iters", str(2 * pairs + 2)]))
    with contextlib.redirect_stdout(io.StringIO()):
        parts = build(config, torch.device("cpu"), Mesh(), ExitRule(time.monotonic()))
    assert parts.trainer is not None
    info = RunInfo(config, "ledger", Path(), torch.device("cpu"), parts.train_iters, parts.flops_per_sample)
    progress = Progress()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(2 * pairs + 2):
        with_ledger = i % 2 == 0
        with contextlib.ExitStack() as stack:
            if not with_ledger:
                stack.enter_context(mock.patch.object(Gradients, "norms", _norms))
                stack.enter_context(mock.patch.object(loop, "batch_hashes", _hashes))
            started = time.perf_counter()
            report = loop.run_iteration(info, parts.trainer, progress)
            if with_ledger:
                json.dumps(encode(_ledger(report)))
            took = time.perf_counter() - started
        if i > 1:
            seconds[with_ledger].append(took)
    on, off = (statistics.median(seconds[kind]) for kind in (True, False))
    print(f"median step: {on:.4f} s with the ledger, {off:.4f} s without, ratio {on / off:.4f} ({pairs} of each)")
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    print(f"median of ratios of neighbours: {statistics.median(ratios):.4f}")


if __name__ == "__main__":
    main()
