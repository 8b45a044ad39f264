"""Time the start of the reference command: from its launch to training, to the end of the first step, and to the exit.

By default one step of one micro-batch without evaluations, so that little else than the start is left. ``--against``
names the root of another checkout; both take turns, so that a busy machine slows both. Prints the fastest of each time,
the least processor time, and how many modules one more run imports.
"""

import argparse
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path

from lockstep.lab.correlate import REFERENCE_FLAGS

ROOT = Path(__file__).resolve().parents[1]
_TRAINING, _FIRST = "training ...", " iteration        1/"


@dataclass(frozen=True)
class Seconds:
    """Seconds from the launch, on the clock, and of the processor in all."""

    training: float
    first_step: float
    exit: float
    processor: float


def command(root: Path, args: argparse.Namespace) -> list[str]:
    """Return the reference command of a checkout."""
    words = [str(root / "3rdparty" / "Megatron-LM" / "pretrain_gpt.py"), *shlex.split(REFERENCE_FLAGS)]
    words += ["--train-iters", str(args.train_iters), "--global-batch-size", str(args.global_batch_size)]
    return [*words, "--eval-iters", str(args.eval_iters)]


def timed(root: Path, args: argparse.Namespace) -> Seconds:
    """Return the times of one run; ends the benchmark with its last words where it fails."""
    seen = {_TRAINING: float("nan"), _FIRST: float("nan")}
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "PYTHONUNBUFFERED": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, *command(root, args)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert run.stdout is not None
        for line in run.stdout:
            for mark in seen:
                if mark in line:
                    seen[mark] = time.perf_counter() - start
        code, end = run.wait(), time.perf_counter() - start
        errors.seek(0)
        if code:
            raise SystemExit(f"{root}: exit code {code}\n{errors.read()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seconds(seen[_TRAINING], seen[_FIRST], end, processor)


def observed(root: Path, args: argparse.Namespace, *options: str) -> subprocess.CompletedProcess[str]:
    """Return a run under options of Python that look on, with what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, *options, *command(root, args)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(root / "src")},
            capture_output=True,
            text=True,
            check=True,
        )


def modules(root: Path, args: argparse.Namespace) -> int:
    """Return how many modules a run imports."""
    printed = observed(root, args, "-X", "importtime").stderr
    return sum(line.startswith("import time:") for line in printed.splitlines())


def profile(root: Path, args: argparse.Namespace) -> str:
    """Return the functions in which a run is longest, with what they call: so many lines of cProfile's table."""
    lines = observed(root, args, "-m", "cProfile", "-s", "cumtime").stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.lstrip().startswith("ncalls"))
    return "\n".join(lines[first : first + args.profile])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="root of another checkout to take turns with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train-iters", type=int, default=1)
    parser.add_argument("--eval-iters", type=int, default=0)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--profile", type=int, default=0, metavar="LINES", help="where the time goes, in a run more")
    args = parser.parse_args()
    roots = [ROOT] if args.against is None else [args.against.resolve(), ROOT]
    found: dict[Path, list[Seconds]] = {root: [] for root in roots}
    for _ in range(args.rounds):
        for root in roots:
            found[root].append(timed(root, args))
    print("| checkout | training begins | first step | exit | processor | modules |\n|---|---|---|---|---|---|")
    for root in roots:
        least = [min(values) for values in zip(*(astuple(seconds) for seconds in found[root]), strict=True)]
        print(f"| {root.name} | {' | '.join(f'{value:.2f} s' for value in least)} | {modules(root, args)} |")
    if args.profile:
        print(profile(ROOT, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
