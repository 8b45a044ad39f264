"""The code that a side is run again by: that which is here, or a checkout of the commit that it names."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.core.state import NO_CORE, tree
from lockstep.errors import UserError
from lockstep.git import Commit, Repository
from lockstep.lab.localise.probes import SCHEMA
from lockstep.lab.localise.sides import Foreign, Rerun
from lockstep.lab.worktrees import scratch_folder
from lockstep.record.environment import code_version

_SOURCE, _WORKER, _FORMAT = "src", "src/lockstep/lab/localise/worker.py", "src/lockstep/lab/localise/probes.py"
_SCHEMA = re.compile(r"^SCHEMA = (\d+)$", re.MULTILINE)
_FIELDS = "import json; from lockstep.config import all_fields; print(json.dumps(sorted(all_fields())))"

Sides = tuple[Rerun, Rerun | Foreign]


@contextlib.contextmanager
def by_their_code(
    a: Rerun, b: Rerun | Foreign, say: Callable[[str], None], repository: Repository | None = None
) -> Iterator[Sides]:
    """Give sides of different code a checkout of their commits for the time of a ``with`` block.

    Sides of one code are left to that which is here, and so is a side that no commit names. ``repository`` has the
    commits; the one that Lockstep runs from when None. Its worktree stays as it is.

    Raises:
        UserError: a commit is not there, or is older than what is needed of it.
    """
    here = code_version()
    root = tree()
    repository = repository or (Repository(root) if root is not None else None)
    if isinstance(b, Foreign) or not _differ(a, b, here, repository):
        yield a, b
        return
    if repository is None:
        raise UserError(f"the two sides are of different commits, and {NO_CORE}; work in a clone, or give --code here")
    with scratch_folder(repository) as folder, contextlib.ExitStack() as stack:

        def ready(side: Rerun, label: str) -> Rerun:
            # Uncommitted changes that are here are most likely those of a record that had some on this commit.
            own = repository.root == root and side.commit == here["commit"] and side.dirty >= bool(here["dirty"])
            if side.commit is None or own:
                return side
            return stack.enter_context(_checked_out(side, label, repository, folder))

        yield ready(a, "A"), ready(b, "B")


def _differ(a: Rerun, b: Rerun, here: dict[str, Any], repository: Repository | None) -> bool:
    """Tell whether two sides have different code; a side of no commit has that which is here."""
    commits = [side.commit or here["commit"] for side in (a, b)]
    changed = here["dirty"] and a.commit != b.commit and None in (a.commit, b.commit)
    changed = changed or (here["dirty"] and a.dirty != b.dirty and a.commit == here["commit"])
    if None in commits or (a.commit is None and b.commit is None):
        return False
    if commits[0] == commits[1]:
        return bool(changed)
    if repository is None:
        return True
    sources = [
        repository.ask("rev-parse", f"{repository.commit(commit, f'the commit of {label},').hash}:{_SOURCE}")
        for label, commit in zip("AB", commits, strict=True)
    ]
    return sources[0] != sources[1] or sources[0] is None or bool(changed)


@contextlib.contextmanager
def _checked_out(side: Rerun, label: str, repository: Repository, folder: Path) -> Iterator[Rerun]:
    assert side.commit is not None, "a side without a commit runs by what is here"
    commit = repository.commit(side.commit, f"the commit of {label},")
    _check(repository, commit, label)
    with repository.worktree(folder / f"{label}-{commit.short}", commit.hash) as checkout:
        source = checkout.root / _SOURCE
        config = side.config if side.record is not None else known_settings(side.config, source, commit.short)
        title = f"{side.title} by commit {commit.short}"
        place = checkout.root if side.place is not None else None
        yield replace(side, title=title, commit=commit.hash, source=source, config=config, place=place)


def _check(repository: Repository, commit: Commit, label: str) -> None:
    """Raise ``UserError`` where a commit's code does not do the jobs of this one."""
    found = _SCHEMA.search(repository.file(commit.hash, _FORMAT) or "")
    if repository.file(commit.hash, _WORKER) is None or found is None:
        reason = "it is older than `lockstep localise`"
    elif int(found[1]) != SCHEMA:
        reason = f"its probes are of schema {found[1]}, those of this Lockstep of {SCHEMA}"
    else:
        return
    raise UserError(
        f"{label} is of commit {commit.short}, which cannot show what it computes: {reason}; "
        "`lockstep bisect --good REV --bad REV -- <run>` needs no more than a log"
    )


def known_settings(config: dict[str, dict[str, Any]], source: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return a tree without the settings that other code does not know, which have to have their defaults.

    Raises:
        UserError: one has another value, or the code cannot be imported.
    """
    from lockstep.config import ConfigContainer
    from lockstep.record.schema import encode

    asked = subprocess.run(
        [sys.executable, "-c", _FIELDS],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode:
        said = (asked.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the Lockstep of {name} cannot be imported: {said}")
    known, defaults = set(json.loads(asked.stdout)), ConfigContainer().as_dict()
    kept: dict[str, dict[str, Any]] = {}
    for section, values in config.items():
        for key, value in values.items():
            if f"{section}.{key}" in known:
                kept.setdefault(section, {})[key] = value
            elif value != encode(defaults.get(section, {}).get(key)):
                raise UserError(f"the run has {section}.{key} = {value}, which the Lockstep of {name} does not know")
    return kept


def verify(side: Rerun | Foreign, label: str, code: dict[str, Any]) -> None:
    """Raise ``UserError`` where a side that has a checkout was run by other code."""
    if isinstance(side, Foreign) or side.source is None or code.get("commit") == side.commit:
        return
    ran = str(code.get("commit") or "unknown")[:12]
    raise UserError(
        f"{label} was to be run by commit {str(side.commit)[:12]} and was run by {ran}; take other copies of Lockstep "
        "off PYTHONPATH"
    )
