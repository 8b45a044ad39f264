"""The folder of a run's checkpoints: names, the tracker file, atomic publishing, what is kept. Needs no torch.

A checkpoint is written into a hidden folder and renamed when it is whole, and the tracker names it only then: a process
killed at any moment leaves the checkpoints that were there.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lockstep.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
CONFIG = "config.json"
INDEX = "tensors.json"
FORMAT = 2
ADAPTERS = "adapters"
"""Key of a manifest whose checkpoint holds adapters only: what it says there of the weights they are for."""

_SAVING = ".saving-"
_REPLACED = ".replaced-"
_REMOVING = ".removing-"
_NAME = re.compile(r"iter_(\d{7,})")
_CHUNK = 1 << 20


def rng_file(number: int) -> str:
    """Return the name of the file with the random streams of data-parallel process ``number``."""
    return f"rng-{number:05d}.safetensors"


def iteration_dir(root: Path, iteration: int) -> Path:
    """Return the folder of an iteration's checkpoint."""
    return root / f"iter_{iteration:07d}"


def saved_iterations(root: Path) -> list[int]:
    """Return the iterations whose checkpoints are in ``root``, in rising order."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for path in root.iterdir() if path.is_dir() and (m := _NAME.fullmatch(path.name)))


def holds_checkpoints(root: Path) -> bool:
    """Tell whether a run has saved into ``root``."""
    return (root / TRACKER).is_file() or bool(saved_iterations(root))


def tracked_iteration(root: Path) -> int:
    """Return the iteration that the tracker file names.

    Raises:
        UserError: no such folder, no tracker, or one that holds no number.
    """
    tracker = root / TRACKER
    if not root.is_dir():
        raise UserError(f"no checkpoint in {root}: there is no such folder; drop --load for a fresh run")
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"no checkpoint in {root}: it has no readable {TRACKER}; name the folder that --save was given, or drop "
            "--load for a fresh run"
        ) from None
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{tracker} holds {text[:20]!r} instead of an iteration; name one with --ckpt-step")
    return int(text)


def find(root: Path, step: int | None) -> Path:
    """Return the checkpoint of iteration ``step``, or the one that the tracker names.

    Raises:
        UserError: there is none.
    """
    iteration = step if step is not None else tracked_iteration(root)
    folder = iteration_dir(root, iteration)
    if not folder.is_dir():
        # A save that replaces a checkpoint of the same iteration moves the old one aside first, and may end there.
        for aside in _leftovers(root, _REPLACED + folder.name):
            return aside
        there = saved_iterations(root)
        have = f"there are {', '.join(map(str, there[-5:]))}; choose with --ckpt-step" if there else "there is none"
        raise UserError(f"{root} has no checkpoint of iteration {iteration}: {have}")
    return folder


def find_one(path: Path, step: int | None) -> Path:
    """Return the checkpoint that ``path`` is, or the one of iteration ``step``, or the newest, in a folder of them.

    Raises:
        UserError: there is none, or ``step`` asks for another one than ``path`` is.
    """
    if not (path / MANIFEST).is_file():
        return find(path, step)
    if step is not None:
        raise UserError(f"--ckpt-step {step}: {path} is one checkpoint; give the folder that it lies in, or drop this")
    return path


def unfinished(root: Path) -> list[str]:
    """Return the names of checkpoints whose saving was cut off."""
    return sorted(path.name.removeprefix(_SAVING).partition(".")[0] for path in _leftovers(root, _SAVING))


def _leftovers(root: Path, prefix: str) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.name.startswith(prefix)) if root.is_dir() else []


def remove_leftovers(root: Path) -> None:
    """Remove what saves and removals that were cut off left, but put back a checkpoint that was not yet replaced."""
    for path in [*_leftovers(root, _SAVING), *_leftovers(root, _REMOVING)]:
        shutil.rmtree(path, ignore_errors=True)
    for path in _leftovers(root, _REPLACED):
        original = root / path.name.removeprefix(_REPLACED).partition(".")[0]
        if original.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(original)


def scratch_dir(root: Path, iteration: int) -> Path:
    """Create and return the hidden folder in which a checkpoint is written."""
    scratch = root / f"{_SAVING}{iteration_dir(root, iteration).name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return scratch


def publish(root: Path, scratch: Path, iteration: int) -> None:
    """Give a checkpoint that is whole, its files synced, its name; then let the tracker name it."""
    _sync(scratch)
    target = iteration_dir(root, iteration)
    aside = root / f"{_REPLACED}{target.name}.{os.getpid()}"
    if target.exists():
        target.rename(aside)
    scratch.rename(target)
    _sync(root)
    tracker = root / f".{TRACKER}.{os.getpid()}"
    tracker.write_text(str(iteration), encoding="utf-8")
    _sync(tracker)
    tracker.replace(root / TRACKER)
    _sync(root)
    shutil.rmtree(aside, ignore_errors=True)


def prune(root: Path, latest: int, recent: int | None, interval: int | None) -> None:
    """Remove checkpoints older than ``latest``; ``recent`` of the newest and multiples of ``interval`` stay.

    None stands for no such rule; with neither, all stay. With ``interval`` alone the newest one stays besides.
    """
    if recent is None and interval is None:
        return
    past = [iteration for iteration in saved_iterations(root) if iteration <= latest]
    kept = set(past[-max(1, recent or 1) :])
    for iteration in past:
        if iteration in kept or (interval is not None and iteration % interval == 0):
            continue
        folder = iteration_dir(root, iteration)
        if folder.is_symlink():
            continue
        doomed = root / f"{_REMOVING}{folder.name}.{os.getpid()}"
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write and sync a JSON file; floats keep every digit, and only finite ones are taken."""
    path.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", encoding="utf-8")
    _sync(path)


def settle(path: Path) -> dict[str, Any]:
    """Sync a file that was written, and return its size in bytes and its SHA-256."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, its files not looked at yet.

    Raises:
        UserError: missing or damaged, or of a format this version does not know.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} is a checkpoint of format {manifest.get('format')!r}, written by Lockstep "
            f"{manifest.get('lockstep')}; this one reads format {FORMAT} only"
        )
    expected = {"iteration": int, "progress": dict, "schedules": dict, "streams": dict, "files": dict, "lockstep": str}
    for key, kind in expected.items():
        if not isinstance(manifest.get(key), kind):
            raise damaged(folder / MANIFEST, f"it lacks {key}")
    return manifest


def read_config(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the resolved configuration that was saved, by section."""
    sections = read_json(folder / CONFIG).get("config")
    if not isinstance(sections, dict) or not all(isinstance(keys, dict) for keys in sections.values()):
        raise damaged(folder / CONFIG, "it is no mapping of sections")
    return sections


def verify(folder: Path, manifest: dict[str, Any], share: int = 0, shares: int = 1) -> None:
    """Check that every file of a checkpoint is as it was written; of several processes, each checks its share.

    Raises:
        UserError: one is missing, cut off or changed.
    """
    by_size = sorted(manifest["files"].items(), key=lambda entry: (-entry[1]["bytes"], entry[0]))
    for name, facts in by_size[share::shares]:
        problem = _problem(folder / name, facts)
        if problem is not None:
            raise damaged(folder / name, problem)


def _problem(path: Path, facts: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "it is missing"
    if path.stat().st_size != facts["bytes"]:
        return f"it has {path.stat().st_size} bytes of {facts['bytes']}"
    return None if _sha256(path) == facts["sha256"] else "its contents have changed since it was saved"


def damaged(path: Path, problem: str) -> UserError:
    """Return the error of a file that cannot be used."""
    return UserError(f"the checkpoint file {path} is damaged: {problem}; load another with --ckpt-step")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise damaged(path, "it cannot be read") from None
    except ValueError:
        raise damaged(path, "it is cut off or no JSON") from None
    if not isinstance(value, dict):
        raise damaged(path, "it is no JSON object")
    return value


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
