"""What the commands print reads without colour, on a narrow screen and in a file."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lockstep.cli import main
from lockstep.lab.calibration import calibrate
from lockstep.lab.cells import row_cells
from lockstep.lab.compare import Comparison, compare_paths
from lockstep.lab.localise import report as localise_report
from lockstep.lab.report import show
from tests.lab.synthetic import config, evaluation_lines, train_lines, write
from tests.lab.test_report import localised


def graded(tmp_path: Path) -> Comparison:
    """Return a comparison with an iteration of each grade, and an evaluation outside the band."""
    lines, evaluations = train_lines(), evaluation_lines()
    lines[4]["lm_loss"] += 1e-3
    lines[7]["lm_loss"] += 3
    lines[8]["lm_loss"] += 1e-14
    evaluations[2]["lm_loss"] += 3
    tree = config(scheduler__lr_warmup_iters=1)
    return compare_paths(write(tmp_path / "a"), write(tmp_path / "b", tree=tree, train=lines, evaluations=evaluations))


def shown(found: Comparison, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_grades_and_states_have_a_sign_and_a_word(tmp_path: Path):
    text = shown(graded(tmp_path), 140)
    assert re.search(r"^ +4 .*  \u2713 equal *$", text, re.MULTILINE)
    assert re.search(r"^ +5 .*  ~ inside the band *$", text, re.MULTILINE)
    assert re.search(r"^ +8 .*  \u2717 outside the band *$", text, re.MULTILINE)
    assert re.search(r"^valid evaluation .*  \u2713 equal *$", text, re.MULTILINE)
    assert re.search(r"^final test evaluation .*  \u2717 outside the band *$", text, re.MULTILINE)
    assert re.search(r"^config  +\u2717 differs  +1 setting", text, re.MULTILINE)
    assert re.search(r"^data  +\u2713 equal  ", text, re.MULTILINE)
    assert re.search(r"^verdict: [a-z ]+\n  \S.*\n", text, re.MULTILINE)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_no_width_cuts_a_number(tmp_path: Path, width: int):
    found = graded(tmp_path)
    text = shown(found, width)
    assert "\u2026" not in text
    words = text.split()
    for row in found.findings.numbers.rows:
        for cell in row_cells(row):
            assert cell in words
    assert "scheduler.lr_warmup_iters" in words
    assert text.count("outside the band") >= 2
    assert text.count("~ inside the band") >= 1


def test_lines_of_eighty_columns_hold_all_tables(tmp_path: Path):
    lines = train_lines()
    lines[4]["lm_loss"] += 1e-3
    found = compare_paths(write(tmp_path / "a"), write(tmp_path / "b", train=lines))
    text = shown(found, 80)
    assert max(map(len, text.splitlines()[2:])) <= 80
    assert [text.count(name) for name in ("Loss A", "Grad norm A", "LR A")] == [2, 1, 1]


def test_localise_reads_without_colour_and_is_not_cut():
    for width in (40, 80):
        console = Console(file=io.StringIO(), width=width, color_system=None)
        localise_report.show(localised(), console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "\u2026" not in text
        for word in ("\u2717", "=", "5e-13", "0.6", "1e-16"):
            assert word in text.split()
        assert "verdict: bug\n  linear_qkv" in text


def test_a_file_in_ascii_gets_every_word(tmp_path: Path):
    found = graded(tmp_path)
    a, b = (str(side.path) for side in (found.findings.a, found.findings.b))
    code = "import sys; from lockstep.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", a, b, "--out", str(tmp_path / "out")],
        capture_output=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)},
        timeout=60,
        check=False,
    )
    text = done.stdout.decode("ascii")
    assert done.returncode == 1, done.stderr
    assert "\x1b" not in text
    assert re.search(r"^ +8 .* x outside the band *$", text, re.MULTILINE)
    assert re.search(r"^ +4 .* \+ equal *$", text, re.MULTILINE)


def test_localise_names_settings_that_differ_as_such():
    console = Console(file=io.StringIO(), width=120, color_system=None)
    localise_report.show(localised(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"^ +config +~ differs  ", text, re.MULTILINE)
    assert re.search(r"^4 +data += equal  ", text, re.MULTILINE)
    assert re.search(r"^4 +forward +\u2717 differs  ", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 120


def test_a_bug_of_two_runs_says_how_to_go_on(tmp_path: Path):
    lines = train_lines()
    lines[4]["lm_loss"] += 3
    a, b = write(tmp_path / "one side", train=train_lines()), write(tmp_path / "b", train=lines)
    command = f"`lockstep localise '{a}' {b}`"
    assert command in compare_paths(a, b).decision.next_step
    evaluations = evaluation_lines()
    evaluations[2]["lm_loss"] += 3
    found = compare_paths(a, write(tmp_path / "c", evaluations=evaluations))
    assert found.decision.verdict == "bug"
    assert "localise" not in found.decision.next_step  # It runs no evaluation.


def test_calibrate_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: None)
    assert main(["calibrate", str(tmp_path / "a run")]) == 0
    assert capsys.readouterr().out == f"Next: `lockstep compare '{tmp_path / 'a run'}' OTHER` judges by this band.\n"
