"""Switching cores: the commit is checked out first, then one rename switches."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from lockstep.core import dependencies
from lockstep.core.enter import check
from lockstep.core.state import (
    DEV,
    FOLDER,
    MAIN,
    NO_CORE,
    PIN,
    Core,
    core_name,
    current,
    dev_folder,
    pinned,
    tree,
    write_state,
)
from lockstep.errors import UserError
from lockstep.git import Repository


def switchable() -> Path:
    """Return the root of the tree whose core can be switched.

    Raises:
        UserError: Lockstep runs from an installed package, or from a dev core.
    """
    root = tree()
    if root is None:
        raise UserError(f"{NO_CORE}; to have two cores, work in a clone: `make setup` there, then .venv/bin/lockstep")
    if core_name(root) != MAIN:
        raise UserError(f"{root} is a core itself; switch in the clone it belongs to, {root.parents[1]}")
    return root


def checked_out(root: Path) -> Core:
    """Return the dev core that ``.dev.commit`` names, checked out.

    It appears under its name whole or not at all: it is written under another one and then moved.

    Raises:
        UserError: no commit is named or the clone lacks it, or its folder holds something else.
    """
    commit, repository = pinned(root), Repository(root)
    if repository.ask("cat-file", "-e", f"{commit}^{{commit}}") is None:
        raise UserError(f"{PIN} names {commit}, which is not in the clone {root}; {repository.remedy(commit)}")
    core = Core(DEV, dev_folder(root, commit), commit)
    if not core.root.exists():
        (root / FOLDER).mkdir(exist_ok=True)
        partial = core.root.with_name(f".partial-{os.getpid()}")
        # Forgets one of this name that was removed by hand, too.
        repository.remove_worktree(core.root)
        with repository.worktree(partial, commit), contextlib.suppress(UserError):
            # Of two switches at a time one moves its folder; the other finds the same one there.
            repository.do("worktree", "move", str(partial), str(core.root))
    check(core)
    return core


def switch(name: str) -> list[str]:
    """Switch to ``main`` or ``dev``; return what to tell the user.

    Raises:
        UserError: there is no core to switch, or ``dev`` cannot be checked out. The core in use stays.
    """
    root = switchable()
    if name == MAIN:
        write_state(root, Core(MAIN, root))
        return status()
    write_state(root, checked_out(root))
    return status()


def pin(revision: str) -> list[str]:
    """Write the commit that a revision names into ``.dev.commit``; the core in use stays what it is."""
    root = switchable()
    commit = Repository(root).commit(revision)
    file = root / PIN
    file.write_text(commit.hash + "\n", encoding="utf-8")
    return [f"{file} names {commit.hash} ({commit.subject})", "`lockstep core dev` switches to it"]


@dataclass(frozen=True)
class Row:
    """One core in the table of ``status``."""

    name: str
    commit: str
    state: str
    place: str


def status() -> list[str]:
    """Return the lines that say which core is in use, where both lie, and which dependencies differ."""
    root = tree()
    if root is None:
        return [NO_CORE]
    if core_name(root) != MAIN:
        return [f"core in use: {core_name(root)}, which is {root} itself"]
    try:
        core = current(root)
        chosen = f" (for this command, by {core.chosen_by}={core.name})" if core.chosen_by == "LOCKSTEP_CORE" else ""
        lines = [f"core in use: {core.name}{chosen}"]
    except UserError as error:
        core, lines = Core(MAIN, root), [f"core in use: unknown; {error}"]
    rows = [_main_row(root), _dev_row(root, core)]
    widths = [max(len(getattr(row, column)) for row in rows) for column in ("name", "commit", "state")]
    for row in rows:
        cells = (f"{text:{width}}" for text, width in zip((row.name, row.commit, row.state), widths, strict=True))
        lines.append("  " + "  ".join([*cells, row.place]))
    return lines + _pin_lines(root, core) + _dependency_lines(root, core)


def _main_row(root: Path) -> Row:
    repository = Repository(root)
    return Row(MAIN, (repository.head() or "no commit")[:12], _changes(repository), f"{root}")


def _dev_row(root: Path, core: Core) -> Row:
    try:
        commit = core.commit or pinned(root)
    except UserError as error:
        return Row(DEV, "-", "not pinned", str(error))
    folder = dev_folder(root, commit)
    if not folder.is_dir():
        known = Repository(root).ask("cat-file", "-e", f"{commit}^{{commit}}") is not None
        missing = "" if known else f"; not in the clone: {Repository(root).remedy(commit)}"
        return Row(DEV, commit[:12], "not checked out", f"{folder}{missing}")
    try:
        check(Core(DEV, folder, commit))
    except UserError as error:
        return Row(DEV, commit[:12], "unusable", str(error))
    return Row(DEV, commit[:12], _changes(Repository(folder)), f"{folder}")


def _changes(repository: Repository) -> str:
    return "local changes" if repository.dirty() else "clean"


def _pin_lines(root: Path, core: Core) -> list[str]:
    with contextlib.suppress(UserError):
        if core.name == DEV and pinned(root) != core.commit:
            return [f"{PIN} now names {pinned(root)[:12]}: `lockstep core dev` switches to it"]
    return []


def _dependency_lines(root: Path, core: Core) -> list[str]:
    """Compare the tree with the dev core, which need not be checked out for it."""
    try:
        commit = core.commit or pinned(root)
    except UserError:
        return []
    repository = Repository(root)
    if repository.ask("cat-file", "-e", f"{commit}^{{commit}}") is None:
        return []
    main = dependencies.read(dependencies.folder_reader(root))
    dev = dependencies.read(lambda name: repository.file(commit, name))
    found = dependencies.differing(main, dev)
    if not found:
        return ["dependencies: the same in both"]
    lines = ["dependencies that differ:", *(f"  {line}" for line in found)]
    if core.name == DEV and dependencies.beside_main(root):
        lines.append("`make setup` installs what dev needs beside main's: " + ", ".join(dependencies.beside_main(root)))
    return lines
