"""Fail where the docs name something that does not exist.

Checked in README.md, CONTRIBUTING.md and every page under docs/: relative links and their anchors; and in code spans
and code blocks, paths inside the repository, `make` targets and `lockstep` subcommands.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE_SUFFIXES = (".py", ".md", ".sh", ".toml")
CODE_SPAN = re.compile(r"`([^`]+)`")
PATH = re.compile(r"(?:\./)?(?:[\w.+-]+/)+[\w.*+-]*")
MAKE_TARGET = re.compile(r"(?:^|[`$;&|]\s*)make ([a-z][a-z-]*)")
SUBCOMMAND = re.compile(r"(?:^|[`$;&|]\s*|/|uv run )lockstep ([a-z][a-z0-9-]*)(?: ([a-z][a-z0-9-]*))?")


@dataclass(frozen=True)
class Line:
    """One line of a page: its text, and the parts of it that are code."""

    page: Path
    number: int
    text: str
    code: tuple[str, ...]


@dataclass(frozen=True)
class Known:
    """What the docs may name: files, make targets, and subcommands with the subcommands below each."""

    root: Path
    files: frozenset[str]
    targets: frozenset[str]
    subcommands: dict[str, frozenset[str]]


def pages(root: Path) -> list[Path]:
    """Return the pages that are checked."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]


def read_lines(page: Path) -> Iterator[Line]:
    """Yield the lines of a page; inside a fenced block the whole line is code."""
    fenced = False
    for number, text in enumerate(page.read_text().splitlines(), 1):
        if text.lstrip().startswith("```"):
            fenced = not fenced
            continue
        code = (text.strip(),) if fenced else tuple(CODE_SPAN.findall(text))
        yield Line(page, number, "" if fenced else CODE_SPAN.sub("``", text), code)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as code-hosting sites derive them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def check_links(line: Line, known: Known) -> Iterator[str]:
    """Yield a problem for every relative link of a line that leads nowhere."""
    raw = re.findall(r"\]\(([^)\s]+)\)", line.text)
    for target in raw:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (line.page.parent / path).resolve() if path else line.page
        if not file.exists():
            yield f"link to {path}, which does not exist"
        elif anchor and anchor not in anchors(file):
            yield f"link to {target}: {file.name} has no such heading"


def check_paths(line: Line, known: Known) -> Iterator[str]:
    """Yield a problem for every path of a line that belongs to the repository and is not in it."""
    folders = {file.split("/", 1)[0] for file in known.files if "/" in file}
    for code in line.code:
        for token in re.split(r"[\s\"'=,:()]+", code):
            path = token.removeprefix("./")
            if not PATH.fullmatch(token) or path.startswith("../"):
                continue
            inside = path.split("/", 1)[0] in folders
            if (inside or path.endswith(SOURCE_SUFFIXES)) and not any(known.root.glob(path)):
                yield f"{path} does not exist"


def check_make(line: Line, known: Known) -> Iterator[str]:
    """Yield a problem for every make target of a line that the Makefile lacks."""
    for code in line.code:
        for target in MAKE_TARGET.findall(code):
            if target not in known.targets:
                yield f"make {target}: the Makefile has no such target"


def check_subcommands(line: Line, known: Known) -> Iterator[str]:
    """Yield a problem for every subcommand of a line that `lockstep` lacks."""
    for code in line.code:
        for name, below in SUBCOMMAND.findall(code):
            if name not in known.subcommands:
                yield f"lockstep {name}: no such subcommand"
            elif below and known.subcommands[name] and below not in known.subcommands[name]:
                yield f"lockstep {name} {below}: no such subcommand"


CHECKS: tuple[Callable[[Line, Known], Iterator[str]], ...] = (check_links, check_paths, check_make, check_subcommands)


def problems(root: Path, known: Known) -> list[str]:
    """Return one line for each thing that the docs name and that does not exist."""
    found = []
    for page in pages(root):
        for line in read_lines(page):
            place = f"{page.relative_to(root)}:{line.number}"
            found += [f"{place}: {problem}" for check in CHECKS for problem in check(line, known)]
    return found


def parser_subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the subparsers of a parser by name."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: below for action in actions for name, below in action.choices.items()}


def known_names(root: Path) -> Known:
    """Return what exists: files that git tracks or would track, targets of the Makefile, subcommands."""
    from lockstep.cli import build_parser

    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    targets = re.findall(r"^([a-z][a-z-]*):", (root / "Makefile").read_text(), re.MULTILINE)
    top = parser_subcommands(build_parser())
    subcommands = {name: frozenset(parser_subcommands(parser)) for name, parser in top.items()}
    return Known(root, frozenset(files), frozenset(targets), subcommands)


def main() -> None:
    """Print every problem and exit with 1 if there is one."""
    found = problems(ROOT, known_names(ROOT))
    print("\n".join(found) if found else "docs: every path, link, target and subcommand exists")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
