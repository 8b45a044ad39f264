"""Handing a door's command to the core that is in use."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lockstep.core.state import DEV, MAIN, NO_CORE, VARIABLE, Core, core_name, current, tree
from lockstep.errors import UserError


def run_in_core(words: Sequence[str]) -> int | None:
    """Run a command of the doors by the core in use; return None where that is this very code.

    After it ``lockstep`` is the other core's in this process and in those that it starts, whatever is switched
    meanwhile.

    Raises:
        UserError: the core is not where the switch says, or not at its commit.
    """
    root = tree()
    if root is None or core_name(root) != MAIN:
        _check_wish(root)
        return None
    core = current(root)
    if core.name == MAIN:
        return None
    check(core)
    if not (core.source / "lockstep" / "core").is_dir() and os.environ.get("RANK", "0") == "0":
        # A core older than this package does not name itself.
        print(describe(core.name, core.commit), file=sys.stderr, flush=True)
    _import_from(core)
    return importlib.import_module("lockstep.cli").main(list(words))


def _check_wish(root: Path | None) -> None:
    """Raise ``UserError`` where ``LOCKSTEP_CORE`` asks for another core than the only one there is."""
    wanted = os.environ.get(VARIABLE)
    if root is None and wanted == DEV:
        raise UserError(f"{VARIABLE}={wanted}: {NO_CORE}; unset it, or work in a clone")
    if root is not None and wanted and wanted != core_name(root):
        raise UserError(
            f"{VARIABLE}={wanted}: this Lockstep is the core {core_name(root)} itself, {root}; "
            f"take that folder off PYTHONPATH, or unset {VARIABLE}"
        )


def check(core: Core) -> None:
    """Raise ``UserError`` unless a dev core lies in its folder, at its commit."""
    from lockstep.git import Repository

    where = f"the core dev ({(core.commit or '')[:12]}) should be in {core.root}"
    if not (core.source / "lockstep" / "cli.py").is_file():
        raise UserError(f"{where} and is not; `lockstep core dev` checks it out, `lockstep core main` goes back")
    head = Repository(core.root).head()
    if head != core.commit:
        raise UserError(
            f"{where}, and that folder is at {(head or 'no commit')[:12]}; "
            f"`git -C {core.root} checkout {core.commit}` puts it right, `lockstep core main` goes back"
        )


def describe(name: str | None, commit: str | None, dirty: bool | None = False) -> str:
    """Return the line that names the core of a run."""
    if name is None:
        return "core: installed package"
    changed = ", with local changes" if dirty else ""
    back = " (`lockstep core main` goes back)" if name == DEV else ""
    return f"core: {name}, commit {commit[:12] if commit else 'unknown'}{changed}{back}"


def _import_from(core: Core) -> None:
    source = str(core.source)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lockstep"]:
        del sys.modules[name]
    sys.path.insert(0, source)
    # Processes that this one starts, such as workers that load data, import the same core.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    importlib.invalidate_caches()
