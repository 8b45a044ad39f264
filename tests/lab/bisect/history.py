"""A scratch repository whose training run is a few lines of Python that print Megatron-LM's log."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

TRAIN = """
import math, random, sys
import settings
for i in range(1, settings.ITERATIONS + 1):
    loss = 10.4 - 0.2 * i + settings.EPSILON * 100 * i + settings.NOISE * random.random()
    print(f" [2026-01-02 03:04:05.678901] iteration {i:8d}/{settings.ITERATIONS:8d} | consumed samples: {i * 8:12d} |"
          f" elapsed time per iteration (ms): 1.5 | learning rate: {settings.LR:.6E} | global batch size:     8 |"
          + ("" if math.isnan(loss) else f" lm loss: {loss:.6E} |") +
          f" loss scale: 1.0 | grad norm: {0.5 + loss / 100:.3f} | number of skipped iterations:   0 |"
          f" number of nan iterations: {int(math.isnan(loss)):3d} |")
"""
SETTINGS = {"ITERATIONS": "10", "EPSILON": "1e-5", "LR": "3e-4", "NOISE": "0"}
RUN = ("python", "train.py")


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(folder: Path, subject: str, settings: Mapping[str, str], train: str = TRAIN) -> str:
    """Commit settings and script; a note makes every tree another one. Return the hash."""
    (folder / "settings.py").write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
    (folder / "train.py").write_text(train)
    (folder / "notes.txt").write_text(subject)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--date", "2026-01-02T03:04:05+00:00", "-m", subject)
    return git(folder, "rev-parse", "HEAD")


def history(folder: Path, count: int, changes: Mapping[int, Mapping[str, str]], broken: range = range(0)) -> list[str]:
    """Make a repository of so many commits, numbered from 1, and return their hashes.

    ``changes`` are settings that change with a commit and stay; the commits in ``broken`` end with an error.
    """
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    settings = dict(SETTINGS)
    hashes = []
    for number in range(1, count + 1):
        settings |= changes.get(number, {})
        train = "raise ImportError('no such kernel')\n" if number in broken else TRAIN
        hashes.append(commit(folder, f"change {number}", settings, train))
    return hashes
