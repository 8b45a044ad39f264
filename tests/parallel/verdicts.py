"""The lab's verdict on whole BF16 runs in every layout, against the run of one process.

`python -m tests.parallel.verdicts` starts the processes itself and prints the table: on GPUs where there are enough,
else on the CPU. Dropout is off: its masks depend on the number of data-parallel processes.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.lab.compare import compare_paths
from lockstep.training import Command, run
from tests.parallel.spawn import Turn, in_turn
from tests.parallel.sweep import CASES, KINDS, Case, takes_part

_JOB: dict[str, Any] = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.num_attention_heads": 8,
    "model.num_query_groups": 4,
    "model.ffn_hidden_size": 96,
    "model.seq_length": 64,
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "mixed_precision.bf16": True,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 8,
    "train.train_iters": 5,
    "validation.eval_iters": 1,
    "validation.eval_interval": 5,
    "optimizer.lr": 1e-3,
    "dataset.mock": True,
    "tokenizer.tokenizer_type": "NullTokenizer",
    "tokenizer.vocab_size": 500,
}


@dataclass(frozen=True)
class Row:
    """The verdict on a layout, and the sentence behind it."""

    kind: str
    layout: str
    verdict: str
    cause: str

    @property
    def passes(self) -> bool:
        """Whether the runs differ by rounding at most."""
        return self.verdict in ("identical", "rounding")


def train(kind: str, changes: dict[str, Any], processes: int, run_dir: Path) -> None:
    """Train the job with changes by dotted path on so many processes, of which this is one."""
    config = ConfigContainer()
    for path, value in {**_JOB, **KINDS[kind], **changes, "run.dir": str(run_dir)}.items():
        config.set(path, value, Origin("python"))
    with contextlib.redirect_stdout(io.StringIO()):
        run(resolve(config, world_size=processes), door="python", command=Command(["verdicts"]), name="verdicts")


def verdicts(cases: Sequence[Case], folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> list[Row]:
    """Train every case and return the lab's verdicts against one process; the runs are kept in ``folder``."""
    without_dropout = [case for case in cases if "model.hidden_dropout" not in case.changes]
    alone = Case("one", 1)
    jobs = [
        (kind, case) for kind in kinds for case in (alone, *without_dropout) if case is alone or takes_part(kind, case)
    ]
    turns = [
        Turn(case.processes, train, (kind, case.changes, case.processes, folder / kind / case.name))
        for kind, case in jobs
    ]
    # NCCL does not survive being started anew several times in one process.
    outcomes = [in_turn([turn])[0] for turn in turns] if torch.cuda.is_available() else in_turn(turns)
    for outcome, (kind, case) in zip(outcomes, jobs, strict=True):
        for error in outcome:
            if isinstance(error, BaseException):
                raise RuntimeError(f"{kind}, {case.name} failed") from error
    rows = []
    for kind, case in jobs:
        if case is not alone:
            decision = compare_paths(folder / kind / alone.name, folder / kind / case.name).decision
            rows.append(Row(kind, case.name, decision.verdict, decision.cause))
    return rows


def main() -> int:
    """Print the verdicts; exit code 1 where one is neither ``identical`` nor ``rounding``."""
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.verdicts", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="Only cases of so many processes.")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="Only these models.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = verdicts([case for case in CASES if case.processes in options.processes], Path(folder), options.kinds)
    for row in rows:
        print(f"{row.kind:<14}{row.layout:<32}{row.verdict:<12}{row.cause}")
    return 0 if all(row.passes for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
