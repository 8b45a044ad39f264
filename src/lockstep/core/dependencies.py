"""Dependencies of two cores: what differs, and what the set-up installs beside the tree's own for a dev core.

``python -m lockstep.core.dependencies`` prints the latter, a requirement a line; the set-up calls it before anything
is installed: standard library only.
"""

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.core.state import DEV, current, tree
from lockstep.errors import UserError

PROJECT, PINS = "pyproject.toml", "constraints.txt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class Dependencies:
    """What one revision depends on: requirements, those of its extras, and pinned versions, by package."""

    required: list[str] = field(default_factory=list)
    by_package: dict[str, list[str]] = field(default_factory=dict)


def read(text_of: Callable[[str], str | None]) -> Dependencies:
    """Read the dependencies of a revision; ``text_of`` returns the text of one of its files."""
    found = Dependencies()
    project = tomllib.loads(text_of(PROJECT) or "").get("project", {})
    found.required = list(project.get("dependencies", []))
    found.by_package["python"] = [f"python{project.get('requires-python', '')}"]
    for requirement in found.required:
        _add(found, requirement, requirement)
    for extra, requirements in project.get("optional-dependencies", {}).items():
        for requirement in requirements:
            _add(found, requirement, f"{requirement} (extra {extra})")
    for line in (text_of(PINS) or "").splitlines():
        pin = line.partition("#")[0].strip()
        if pin:
            _add(found, pin, f"pinned {pin.partition('==')[2] or pin}")
    return found


def _add(found: Dependencies, requirement: str, text: str) -> None:
    name = _NAME.match(requirement)
    if name:
        found.by_package.setdefault(re.sub(r"[-_.]+", "-", name[0]).lower(), []).append(text)


def differing(main: Dependencies, dev: Dependencies) -> list[str]:
    """Return a line for each package that two revisions depend on differently."""
    lines = []
    for name in sorted({*main.by_package, *dev.by_package}):
        a, b = (sorted(side.by_package.get(name, [])) for side in (main, dev))
        if a != b:
            lines.append(f"{name}: main {', '.join(a) or 'not named'}; dev {', '.join(b) or 'not named'}")
    return lines


def folder_reader(root: Path) -> Callable[[str], str | None]:
    """Return how to read a file of a checkout."""

    def text_of(name: str) -> str | None:
        file = root / name
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return text_of


def beside_main(root: Path) -> list[str]:
    """Return the requirements of the core in use that the tree itself does not state."""
    core = current(root)
    if core.name != DEV:
        return []
    stated = set(read(folder_reader(root)).required)
    return [line for line in read(folder_reader(core.root)).required if line not in stated]


if __name__ == "__main__":
    import sys

    root = tree()
    try:
        print("\n".join(beside_main(root) if root else []))
    except UserError as error:
        sys.exit(f"error: {error}")
