"""Running one commit: in a worktree of its own, with its own source, and what it printed or recorded kept."""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.core.state import VARIABLE
from lockstep.errors import UserError
from lockstep.git import REDIRECTING, Commit, Repository
from lockstep.lab.calibration.band import BAND_FILE, Band, load_band
from lockstep.lab.side import Side, load_side
from lockstep.record.environment import VARIABLES, package_versions
from lockstep.record.schema import METRICS_FILE, RUN_FILE

PLACES = ("{tree}", "{repo}", "{out}", "{python}")
OUTCOME, OUTPUT, RECORD, LOG, CALIBRATED = "outcome.json", "output.log", "record", "run.log", "calibrated"
STANDARD_OUTPUT = "-"
PATIENCE_SECONDS = 10
LATE = "did not end within"

READ_OUTPUT = f"--log {STANDARD_OUTPUT} reads what every run prints instead of its record"

_RUN_DIRECTORY = re.compile(r"\brun directory: (.+?)\s*$")
_ACTING = ("CUDA_", "CUBLAS_", "CUDNN_", "NCCL_", "NVTE_", "TORCH_", "PYTORCH_", "OMP_", "MKL_", "KMP_", "DNNL_")
"""Variables of these families can change a number."""
_LOCATIONS = ("PYTHONPATH", VARIABLE)


@dataclass(frozen=True)
class Job:
    """What is run at each commit.

    ``log`` is a path of the worktree, or one with a placeholder, or ``-`` for standard output. Without it that is
    read, too, unless it names a run directory of Lockstep.
    """

    command: tuple[str, ...]
    log: str | None = None
    timeout_seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a commit ran: its ``side`` of a comparison, or the ``problem`` why there is none."""

    commit: Commit
    folder: Path
    seconds: float
    cached: bool
    side: Side | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class Runner:
    """Runs commits and remembers their curves in ``cache``, by what can change them; ``scratch`` is a new folder."""

    repository: Repository
    job: Job
    cache: Path
    scratch: Path
    runs: int = 0
    surroundings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        acting = {name: value for name, value in os.environ.items() if name in VARIABLES or name.startswith(_ACTING)}
        self.surroundings = {
            "environment": {name: value for name, value in sorted(acting.items()) if name not in _LOCATIONS},
            "packages": {name: v for name, v in package_versions().items() if name != "lockstep-lm"},
            "machine": platform.node(),
        }

    def run(self, commit: Commit, repeat: int = 1) -> Outcome:
        """Return how a commit runs; from the cache where its files ran before. Failures are not remembered.

        Raises:
            UserError: the run used other code than the commit's, or git cannot check the commit out.
        """
        folder = self.cache / self._key(commit) / str(repeat)
        if (folder / OUTCOME).is_file():
            try:
                return self._read(commit, folder)
            except (UserError, ValueError, KeyError):
                shutil.rmtree(folder, ignore_errors=True)  # damaged by hand: run again
        self.runs += 1
        made = self.scratch / f"{commit.short}-{repeat}"
        kept = made / "kept"
        kept.mkdir(parents=True)
        outcome = self._run(commit, made, kept)
        if outcome.side is None:
            return outcome
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(kept, folder)
        return self._read(commit, folder, cached=False)

    def calibrate(self, outcome: Outcome, iterations: int) -> Band:
        """Measure the band of a run by the code of its commit, or take it from the cache.

        The band lies beside a copy of the record: a search without it must not find it there. The job's time limit
        is one for the whole of it.

        Raises:
            UserError: the commit cannot calibrate its run, or not within the limit.
        """
        folder = outcome.folder / CALIBRATED
        band = load_band(folder)
        if band is not None and band.last >= iterations:
            return band
        shutil.rmtree(folder, ignore_errors=True)
        made = self.scratch / f"{outcome.commit.short}-{CALIBRATED}"
        shutil.copytree(outcome.folder / RECORD, made / RECORD)
        (made / RECORD / BAND_FILE).unlink(missing_ok=True)
        words = [sys.executable, "-m", "lockstep.cli", "calibrate", str(made / RECORD), "--iterations", str(iterations)]
        with self.repository.worktree(made / "tree", outcome.commit.hash) as tree:
            problem = _execute(words, tree.root, made / OUTPUT, self._environment(tree.root), self.job.timeout_seconds)
        band = None if problem else load_band(made / RECORD)
        if band is None:
            late = problem.startswith(LATE)
            remedy = "; raise --timeout, or give --band RUN of a calibrated run of good" if late else ""
            problem = problem or "it wrote no band"
            raise UserError(f"{outcome.commit.short} cannot calibrate its run: {problem}{remedy}")
        shutil.move(made / RECORD, folder)
        return band

    def _key(self, commit: Commit) -> str:
        """Return the name of a curve: whatever has the same name gives the same curve, but for noise."""
        told = [commit.tree, self.job.command, self.job.log, self.surroundings]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]

    def _read(self, commit: Commit, folder: Path, cached: bool = True) -> Outcome:
        told = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        side = load_side(folder / told["side"], "A")
        return Outcome(commit, folder, told["seconds"], cached, side, notes=tuple(told["notes"]))

    def _run(self, commit: Commit, made: Path, kept: Path) -> Outcome:
        began = time.monotonic()
        out = made / "out"
        out.mkdir()
        with self.repository.worktree(made / "tree", commit.hash) as tree:
            words = [self._fill(word, tree.root, out) for word in self.job.command]
            problem = _execute(words, tree.root, kept / OUTPUT, self._environment(tree.root), self.job.timeout_seconds)
            seconds = time.monotonic() - began
            name, notes = None, []
            if not problem:
                name = self._keep(tree.root, out, kept)
        if name is not None:
            try:
                notes = self._verify(commit, kept)
                side = load_side(kept / name, "A")
                told = {"commit": commit.hash, "command": words, "seconds": seconds, "side": name, "notes": notes}
                (kept / OUTCOME).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
                return Outcome(commit, kept, seconds, False, side)
            except _OtherCodeError:
                raise
            except UserError as error:
                problem = str(error).replace(f"{kept}{os.sep}", "")
                if name == RECORD:
                    problem += f" ({READ_OUTPUT})"
        elif not problem:
            problem = f"it wrote no {self.job.log}"
        return Outcome(commit, kept, seconds, False, problem=problem)

    def _fill(self, word: str, tree: Path, out: Path) -> str:
        values = (str(tree), str(self.repository.root), str(out), sys.executable)
        for place, value in zip(PLACES, values, strict=True):
            word = word.replace(place, value)
        return word

    def _environment(self, tree: Path) -> dict[str, str]:
        """Return the variables of a run: the commit's source comes first, then what the user has on the path.

        Folders of the user's tree are replaced by the commit's; programs beside this interpreter are found.
        """
        given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        paths = [str(tree / "src")] if (tree / "src").is_dir() else []
        for entry in given:
            place = Path(entry).absolute()
            inside = place.is_relative_to(self.repository.root)
            paths.append(str(tree / place.relative_to(self.repository.root)) if inside else entry)
        # git's own variables of a hook would lead commands of the run to the user's tree.
        values = {name: value for name, value in os.environ.items() if name not in (VARIABLE, *REDIRECTING)}
        programs = str(Path(sys.executable).parent)
        values["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
        values["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        values["PYTHONUNBUFFERED"] = "1"
        return values

    def _keep(self, tree: Path, out: Path, kept: Path) -> str | None:
        """Copy what the run tells out of its worktree; return the name of the copy, or None where it told nothing."""
        record = _run_directory(kept / OUTPUT, tree)
        if self.job.log not in (None, STANDARD_OUTPUT):
            told = tree / self._fill(self.job.log or "", tree, out)
            if told.is_file():
                shutil.copyfile(told, kept / LOG)
            record = told if told.is_dir() else record
        if record is not None:
            (kept / RECORD).mkdir()
            for name in (RUN_FILE, METRICS_FILE):
                if (record / name).is_file():
                    shutil.copyfile(record / name, kept / RECORD / name)
        if self.job.log == STANDARD_OUTPUT:
            return OUTPUT
        if self.job.log is None:
            return RECORD if record is not None else OUTPUT
        return LOG if (kept / LOG).is_file() else RECORD if told.is_dir() else None

    def _verify(self, commit: Commit, kept: Path) -> list[str]:
        """Tell from a record, of whatever schema, whether the commit's code ran; a log cannot tell."""
        try:
            code = json.loads((kept / RECORD / RUN_FILE).read_text(encoding="utf-8"))["code"]
            ran, dirty = code["commit"], code["dirty"]
        except (OSError, ValueError, KeyError, TypeError):
            return ["a log does not say which code ran"]
        if self.repository.file(commit.hash, "src/lockstep/__init__.py") is None:
            return ["the record tells the commit of Lockstep, not of this repository"]
        if ran != commit.hash:
            raise _OtherCodeError(
                f"the run of {commit.short} imported Lockstep of commit {str(ran or 'unknown')[:12]}, not the commit's "
                "own; start it by `lockstep ...`, `python script.py ...` or {tree}/script.py, without a path of its own"
            )
        return ["tracked files were changed while it ran"] if dirty else []


class _OtherCodeError(UserError):
    """The run used other code than the commit's: nothing it tells is of use."""


def check_command(repository: Repository, command: Sequence[str]) -> None:
    """Raise ``UserError`` for a command that runs files of the user's tree instead of each commit's."""
    if not command:
        raise UserError("no command to run at each commit; put it after --, such as -- lockstep pretrain-gpt <flags>")
    for word in command:
        place = Path(word)
        if not place.is_absolute() or not place.is_relative_to(repository.root) or not place.is_file():
            continue
        inside = place.relative_to(repository.root)
        if repository.ask("ls-files", "--error-unmatch", "--", str(inside)) is not None:
            raise UserError(
                f"{word} is a file of your tree: every commit would run it; write {inside} or {{tree}}/{inside} for "
                f"each commit's own, {{repo}}/{inside} if yours is meant"
            )


def _run_directory(output: Path, tree: Path) -> Path | None:
    """Return the run directory that Lockstep said it writes to, or None where none was named."""
    found = None
    for line in output.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _RUN_DIRECTORY.search(line):
            found = tree / match[1]
    return found if found is not None and (found / RUN_FILE).is_file() else None


def _execute(words: Sequence[str], tree: Path, output: Path, environment: dict[str, str], timeout: float | None) -> str:
    """Run a command in a worktree to its end; return what is wrong, or nothing. No process of it outlives this."""
    with output.open("wb") as file:
        try:
            process = subprocess.Popen(
                words,
                cwd=tree,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot start {shlex.quote(words[0])}: {error.strerror}"
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"{LATE} {timeout:g} seconds"
        finally:
            _end(process)
    if process.returncode == 0:
        return ""
    how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{how}: {said[-1].strip()[:160]}" if said else how


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and whatever it started: politely first, so that a launcher can end its workers."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.02)
    process.wait()
