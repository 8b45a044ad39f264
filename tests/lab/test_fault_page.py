"""docs/faults.md is the table of the faults and clean pairs that there are."""

import re
from pathlib import Path

import pytest

from tests.lab import clean_pairs, fault_table
from tests.lab.faults import FAULTS

_PAGE = Path(__file__).parents[2] / "docs" / "faults.md"


def _rows(title: str) -> list[list[str]]:
    lines = _PAGE.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {title} |")) + 2
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_page_has_every_fault_with_what_is_expected() -> None:
    found = [(row[0], row[1].rpartition(", ")[0], row[2].partition(";")[0], row[4], row[6]) for row in _rows("fault")]
    assert found == [
        (name, fault.kind, "commands" if fault.commands else "walk", fault.stage, fault.tensor)
        for name, fault in FAULTS.items()
    ]


def test_the_page_has_every_clean_pair() -> None:
    assert [(row[0], row[1]) for row in _rows("clean pair")] == clean_pairs.names()


def test_the_totals_of_the_page_are_those_of_its_tables() -> None:
    text = _PAGE.read_text(encoding="utf-8")
    planted, clean = _rows("fault"), _rows("clean pair")
    right = sum(row[8] == "✓" for row in planted)
    stages = sum(row[4] == row[5] for row in planted)
    assert f"{len(planted)} faults: {stages} stages right, {right} tensors or fields right." in text
    missed = sum(row[3] in ("identical", "rounding") for row in planted)
    assert f"`localise` called {missed} of {len(planted)} `identical` or `rounding`" in text
    bugs = sum(row[2] == "bug" for row in clean)
    assert f"{len(clean)} clean pairs: {bugs} false `bug`" in text


def test_faults_of_many_stages_go_through_the_commands() -> None:
    commanded = {fault.stage for fault in FAULTS.values() if fault.commands}
    assert len(commanded) >= 8
    assert len({fault.stage for fault in FAULTS.values()}) == 13


@pytest.mark.slow
def test_the_faults_on_the_page_are_judged_so_now(tmp_path: Path) -> None:
    text, reached = fault_table.table(fault_table.planted(tmp_path, {}))
    assert reached
    page = _PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\|.*", text, re.MULTILINE) == re.findall(r"^\|.*", page, re.MULTILINE)[: len(FAULTS) + 2]
