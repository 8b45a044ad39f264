"""Which core is in use: read at the start of every run, so from files alone and without git.

``main`` is the tree itself. ``dev`` is the commit that ``.dev.commit`` names, checked out in ``.core/dev-<hash>``.
``.core/current`` says which of the two the doors import; without it that is ``main``.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lockstep
from lockstep.errors import UserError

PIN = ".dev.commit"
FOLDER = ".core"
STATE = "current"
VARIABLE = "LOCKSTEP_CORE"
"""The environment variable that chooses a core for one command, past the switch."""

MAIN, DEV = "main", "dev"
NAMES = (MAIN, DEV)
NO_CORE = "Lockstep runs from an installed package, not from a clone: there is no core to switch"

_HASH = re.compile(r"[0-9a-f]{40}")
_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Core:
    """A core: its name, where it lies, and the commit it was switched to (None for ``main``: whatever the tree is)."""

    name: str
    root: Path
    commit: str | None = None
    chosen_by: str = ""

    @property
    def source(self) -> Path:
        """The folder to import ``lockstep`` from."""
        return self.root / "src"


def tree() -> Path | None:
    """Return the root of the checkout that this Lockstep runs from, or None for an installed package."""
    root = Path(lockstep.__file__).resolve().parents[2]
    # An installed copy may lie inside somebody else's repository: only our own source layout counts.
    return root if (root / "src" / "lockstep").is_dir() and (root / ".git").exists() else None


def core_name(root: Path) -> str:
    """Return the name of the core that lies in ``root``."""
    return root.name.partition("-")[0] if root.parent.name == FOLDER else MAIN


def recorded_core(facts: dict[str, Any]) -> str | None:
    """Return the core that a run record names, or None.

    A core older than this package records only its commit; the path that it was imported from tells the name.
    """
    name = facts["code"].get("core")
    if name is not None:
        return name
    place = Path(str(facts["environment"].get("PYTHONPATH", "")).partition(os.pathsep)[0]).parent
    return core_name(place) if place.parent.name == FOLDER else None


def dev_folder(root: Path, commit: str) -> Path:
    """Return where a tree keeps a dev core."""
    return root / FOLDER / f"{DEV}-{commit[:_SHOWN_DIGITS]}"


def pinned(root: Path) -> str:
    """Return the commit that ``.dev.commit`` names.

    Raises:
        UserError: no such file, or something else than a whole hash in it.
    """
    file = root / PIN
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        raise UserError(f"{file} is missing; `lockstep core pin REVISION` writes it") from None
    if not _HASH.fullmatch(text):
        raise UserError(
            f"{file} holds {text[:60]!r}, not a commit's hash of 40 digits; `lockstep core pin REVISION` writes it"
        )
    return text


def current(root: Path) -> Core:
    """Return the core that a tree is switched to, or that ``LOCKSTEP_CORE`` chooses for this command.

    Raises:
        UserError: an unknown name, or a state that does not say which commit.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted:
        if wanted not in NAMES:
            raise UserError(f"{VARIABLE}={wanted}: no such core; it is {' or '.join(NAMES)}")
        if wanted == MAIN:
            return Core(MAIN, root, chosen_by=VARIABLE)
        commit = pinned(root)
        return Core(DEV, dev_folder(root, commit), commit, VARIABLE)
    file = root / FOLDER / STATE
    try:
        words = file.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return Core(MAIN, root)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; mend it, or remove it for the core main") from None
    if words == [MAIN]:
        return Core(MAIN, root, chosen_by="switch")
    if len(words) == 2 and words[0] == DEV and _HASH.fullmatch(words[1]):
        return Core(DEV, dev_folder(root, words[1]), words[1], "switch")
    raise UserError(f"{file} does not name a core; `lockstep core main` or `lockstep core dev` writes it anew")


def write_state(root: Path, core: Core) -> None:
    """Switch a tree: one rename, so that every command sees the core before or the one after."""
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    scratch = folder / f".{STATE}.{os.getpid()}"
    scratch.write_text(" ".join(filter(None, (core.name, core.commit))) + "\n", encoding="utf-8")
    scratch.replace(folder / STATE)
