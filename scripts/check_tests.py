"""Fail where a file under ``tests/`` holds tests, or is named like a test file, and pytest collects none from it."""

import ast
import contextlib
import io
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class _Collected:
    """A pytest plugin that remembers the files tests were collected from."""

    def __init__(self) -> None:
        self.files: set[Path] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Remember the file of every collected test; runs before markers deselect any."""
        self.files.update(item.path for item in items)


def files_with_tests(folder: Path) -> set[Path]:
    """Return the files of a folder that are named like test files or define a test at module or class level."""
    found = set()
    for path in folder.rglob("*.py"):
        named = path.name.startswith("test_") or path.stem.endswith("_test")
        nodes = ast.walk(ast.parse(path.read_text(), str(path)))
        if named or any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in nodes):
            found.add(path)
    return found


def uncollected(folder: Path) -> list[Path]:
    """Return the files of a folder that should hold tests and from which pytest collects none, sorted.

    Raises:
        SystemExit: collection itself fails, with what pytest said.
    """
    plugin = _Collected()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = pytest.main(["--collect-only", "-qq", "--no-header", "-p", "no:cacheprovider", str(folder)], [plugin])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(f"{output.getvalue()}the tests could not be collected")
    return sorted(files_with_tests(folder) - plugin.files)


def main() -> None:
    """Print every file that collects nothing and exit with 1 if there is one."""
    missed = uncollected(ROOT / "tests")
    for path in missed:
        print(f"{path.relative_to(ROOT)}: no test is collected from this file")
    if not missed:
        print("tests: every test file is collected")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
