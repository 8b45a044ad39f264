"""Worktrees of other commits for the time of a command: in a scratch folder, and gone whatever ends the command."""

import contextlib
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from lockstep.git import Repository

_PREFIX = "lockstep-scratch-"


@contextlib.contextmanager
def scratch_folder(repository: Repository) -> Iterator[Path]:
    """Make a folder for worktrees outside every repository, named after this process.

    Whatever ends the block, an interrupt included, they are removed again; so are those of processes that were killed.
    """
    _remove_left(repository)
    with interruptible():
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")).resolve()
        try:
            yield folder
        finally:
            _ignore_signals()
            for place in _worktrees(repository):
                if place.is_relative_to(folder):
                    repository.remove_worktree(place)
            shutil.rmtree(folder, ignore_errors=True)


def _worktrees(repository: Repository) -> list[Path]:
    lines = (repository.ask("worktree", "list", "--porcelain") or "").splitlines()
    return [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]


def _remove_left(repository: Repository) -> None:
    """Remove worktrees of commands that were killed before they could."""
    for place in _worktrees(repository):
        for parent in place.parents:
            found = re.fullmatch(rf"{_PREFIX}(\d+)-.*", parent.name)
            if found and not Path(f"/proc/{found[1]}").exists():
                repository.remove_worktree(place)
                shutil.rmtree(parent, ignore_errors=True)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _ignore_signals() -> None:
    for sign in _SIGNALS:
        signal.signal(sign, signal.SIG_IGN)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let a request to end unwind as an interrupt does, so that everything is removed; a second one changes nothing."""

    def unwind(number: int, frame: FrameType | None) -> None:
        _ignore_signals()
        raise KeyboardInterrupt

    # What is ignored stays so, as SIGHUP under nohup.
    heard = [sign for sign in _SIGNALS if signal.getsignal(sign) is not signal.SIG_IGN]
    before = {sign: signal.signal(sign, unwind) for sign in heard}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
