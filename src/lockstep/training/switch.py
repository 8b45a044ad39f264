"""Settings that are off, on, or left to a rule."""

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.errors import UserError


@dataclass(frozen=True)
class Switch:
    """Whether something is done, to what, and why."""

    on: bool
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what if self.on else 'none'} ({self.reason})"


def decide(path: str, wanted: str, what: str, obstacle: Callable[[], str | None], worth: tuple[bool, str]) -> Switch:
    """Return what a setting means that is ``none``, ``auto``, or a word that asks for it.

    ``obstacle`` tells where it does not work of what is asked; ``worth`` whether ``auto`` takes it elsewhere, and why.

    Raises:
        UserError: it is asked for where it does not work.
    """
    if wanted == "none":
        return Switch(False, what, f"{path}=none")
    found = obstacle()
    if wanted != "auto":
        if found is not None:
            raise UserError(f"{path}={wanted} does not work {found}; use {path}=none or auto")
        return Switch(True, what, f"{path}={wanted}")
    if found is not None:
        return Switch(False, what, f"auto, {found}")
    return Switch(worth[0], what, f"auto, {worth[1]}")
