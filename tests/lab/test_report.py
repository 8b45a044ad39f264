"""The report stands alone and stays readable."""

import io
import json
import re
from pathlib import Path

from rich.console import Console

from lockstep.lab.cells import THIN_ROWS, number_pair, thin
from lockstep.lab.compare import compare_paths
from lockstep.lab.report import as_json, show, write_report
from tests.lab.synthetic import config, train_lines, write


def test_html_needs_nothing_else(tmp_path: Path):
    tree = config(scheduler__lr_warmup_iters=1)
    a = write(tmp_path / "a", command={"argv": [], "flags": "--data <x>&", "overrides": None})
    found = compare_paths(a, write(tmp_path / "b", tree=tree, train=train_lines(warmup=1)))
    files = write_report(found, tmp_path / "out")
    page = files[-1].read_text()
    assert "http" not in page
    assert not re.search(r"<script|<link|@import|url\(", page)
    assert page.count("<img") == 1
    assert 'src="data:image/png;base64,' in page
    for text in (
        "config",
        "scheduler.lr_warmup_iters",
        "below one BF16 ulp",
        "--data &lt;x&gt;&amp;",
        "final test eval",
    ):
        assert text in page
    assert json.loads(files[0].read_text())["config_differences"][0]["path"] == "scheduler.lr_warmup_iters"


def test_html_serves_keyboard_dark_screens_and_print(tmp_path: Path):
    found = compare_paths(write(tmp_path / "a"), write(tmp_path / "b"))
    page = write_report(found, tmp_path / "out")[-1].read_text()
    assert page.count('<div class="scroll"') == page.count('tabindex="0" role="region" aria-label=') == 4
    assert page.count("<th") == page.count('<th scope="col"')
    for media in ("@media screen and (prefers-color-scheme: dark)", "@media print"):
        assert media in page


def test_json_holds_every_number(tmp_path: Path):
    found = compare_paths(write(tmp_path / "a"), write(tmp_path / "b"))
    report = as_json(found)
    assert report["verdict"] == "identical"
    assert report["exit_code"] == 0
    assert [row["loss_a"] for row in report["rows"]] == [line["lm_loss"] for line in train_lines()]
    assert [(e["split"], e["final"]) for e in report["evaluations"]] == [
        ("valid", False),
        ("valid", True),
        ("test", True),
    ]


def test_long_runs_are_thinned_but_keep_where_they_part(tmp_path: Path):
    lines = train_lines(1000)
    lines[612]["lm_loss"] += 3
    found = compare_paths(write(tmp_path / "a", train=train_lines(1000)), write(tmp_path / "b", train=lines))
    rows = found.findings.numbers.rows
    shown = [row.iteration for row in thin(rows)]
    assert THIN_ROWS <= len(shown) <= THIN_ROWS + 30
    assert {1, 2, 611, 612, 613, 614, 615, 1000} <= set(shown)
    assert thin(rows[:200]) == rows[:200]
    console = Console(file=io.StringIO(), width=120)
    show(found, console)
    assert "of 1000 shown" in console.file.getvalue()  # type: ignore[attr-defined]


def test_numbers_show_as_many_digits_as_tell_them_apart():
    assert number_pair(10.5, 10.5) == ("10.5", "10.5")
    assert number_pair(10.123456789, 10.123456788) == ("10.123456789", "10.123456788")
    assert number_pair(None, 1.0) == ("", "1")


def test_skip_train_pair_compares_evaluations(tmp_path: Path):
    found = compare_paths(write(tmp_path / "a", train=[]), write(tmp_path / "b", train=[]))
    assert found.decision.cause == "Every loss and gradient norm of 3 evaluations is bitwise equal."
    assert write_report(found, tmp_path / "out")[1].read_bytes()
