"""Megatron Bridge's translator beside Lockstep's on a list of Megatron-LM configurations.

    python benchmarks/translators.py --configs FILE.jsonl --theirs Megatron-Bridge/scripts/translate_mlm_to_bridge.py

Each line of the list is ``{"name": ..., "args": [words]}``. Their script runs as it is, with ``--args``; a flag is
unknown when its summary counts it so. Ours translates the same words for Megatron Bridge, sixteen processes. The table
is printed as the page on moving a run has it.
"""

import argparse
import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.config import resolve
from lockstep.config.derive import model_processes
from lockstep.errors import ConfigError
from lockstep.recipes.translate import DEFAULT_RECIPE
from lockstep.translation import bridge
from lockstep.translation.flags import Reading, read_flags
from lockstep.translation.nemo import is_nemo, read_nemo
from lockstep.translation.translate import Translation, to_bridge, to_lockstep
from lockstep.translation.words import plain

PROCESSES = 16
_COPIES = (1, 2, 4, 8, 16)  # of a model: some settings share out experts over them


@dataclass(frozen=True)
class Result:
    """What a translator made of one configuration."""

    complete: bool
    unknown: int
    blocking: int
    differing: int
    exit_code: int


def theirs(script: Path, words: list[str]) -> Result:
    """Run Bridge's translator on a command line and count what its summary says."""
    done = subprocess.run(
        [sys.executable, str(script), f"--args={shlex.join(words)}"], capture_output=True, text=True, check=False
    )
    said = re.search(r"Unknown:\s+(\d+)", done.stdout + done.stderr)
    translated = re.search(r"Translated:\s+(\d+)", done.stdout + done.stderr)
    unknown = int(said[1]) if said else 0
    complete = unknown == 0 and translated is not None and int(translated[1]) > 0
    return Result(complete, unknown, 0, 0, done.returncode)


def read(words: list[str]) -> Reading:
    """Read a command line of Megatron-LM or of NeMo."""
    given = plain(words)
    return read_nemo(given) if is_nemo(given) else read_flags(given)


def trains(reading: Reading) -> bool:
    """Tell whether Lockstep would start this run on some number of processes, as far as the configuration says."""
    config = reading.config.copy()
    for path in reading.deferred:
        config.set(path, 1 if path == "rng.seed" else None, config.origin(path))
    for copies in _COPIES:
        with contextlib.suppress(ConfigError):
            resolve(config.copy(), world_size=copies * model_processes(config))
            return True
    return False


def ours(words: list[str], system: str) -> tuple[Result, Translation]:
    """Translate a command line."""
    reading = read(words)
    if system == "lockstep":
        translation = to_lockstep(reading, DEFAULT_RECIPE)
    else:
        translation = to_bridge(reading, DEFAULT_RECIPE, bridge.NEWEST, PROCESSES)
    blocking = len(translation.of_class("blocking"))
    result = Result(not blocking, 0, blocking, len(translation.differing), int(bool(blocking)))
    return result, translation


def row(name: str, results: list[Result]) -> str:
    """Return a table row."""
    unknown = [r.unknown for r in results]
    cells = (
        f"{sum(r.complete for r in results)} of {len(results)}",
        f"{sum(map(bool, unknown))} (median {statistics.median(unknown):g})",
        f"{sum(bool(r.blocking) for r in results)}",
        f"{sum(bool(r.differing) for r in results)} (median {statistics.median(r.differing for r in results):g})",
        f"{sum(r.exit_code != 0 for r in results)}",
    )
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table, and the flags that block with why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True)
    parser.add_argument("--theirs", type=Path, help="Bridge's script; without it only our rows are printed.")
    options = parser.parse_args()
    configs: list[dict[str, Any]] = [json.loads(line) for line in options.configs.read_text().splitlines()]
    print(
        "| translator | complete | with unknown flags | with blocking options | differing defaults | exit code not 0 |"
    )
    print("|---|---|---|---|---|---|")
    if options.theirs:
        print(row("Megatron Bridge 067f987d", [theirs(options.theirs, config["args"]) for config in configs]))
    blocked: Counter[str] = Counter()
    for system in ("megatron-bridge", "lockstep"):
        pairs = [ours(config["args"], system) for config in configs]
        print(row(f"Lockstep, `--for {system}`", [result for result, _ in pairs]))
        if system == "lockstep":
            blocked.update(f"{v.option.written.flag}: {v.reason}" for _, t in pairs for v in t.of_class("blocking"))
            total: Counter[str] = Counter()
            for _, translation in pairs:
                total.update(translation.counts())
        else:
            written = sum(bool(translation.notes) for _, translation in pairs)
    started = sum(trains(read(config["args"])) for config in configs)
    print(f"\nfor megatron-bridge, {written} need --emit recipe because overrides cannot carry some value")
    print(f"Lockstep's trainer starts {started} of them as they are")
    print(f"options by class, for lockstep: {dict(total)}")
    for name, count in blocked.most_common():
        print(f"  {count}  {name}")


if __name__ == "__main__":
    main()
