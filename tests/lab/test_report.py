"""The report stands alone and stays readable."""

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from lockstep.errors import UserError
from lockstep.lab.calibration.band import write_band
from lockstep.lab.cells import THIN_ROWS, number_pair, thin
from lockstep.lab.compare import compare, compare_paths
from lockstep.lab.config_diff import ConfigDifference
from lockstep.lab.foreign.trace import Settings
from lockstep.lab.localise import report as localise_report
from lockstep.lab.localise import stages
from lockstep.lab.localise.localise import Localised, judge
from lockstep.lab.localise.measure import Row, Where, torn
from lockstep.lab.localise.probes import Copies, Probes, load_probes
from lockstep.lab.localise.walk import NOT_LOOKED_AT, Pass, StageResult, Walked
from lockstep.lab.localise.worker import RUN, TWIN
from lockstep.lab.numbers import evaluation_name
from lockstep.lab.plot import figure
from lockstep.lab.report import as_json, show, write_report
from lockstep.lab.side import load_side
from tests.lab import faults
from tests.lab.calibration.test_band import band
from tests.lab.synthetic import config, evaluation_lines, train_lines, write


def test_html_needs_nothing_else(tmp_path: Path):
    tree = config(scheduler__lr_warmup_iters=1)
    a = write(tmp_path / "a", command={"argv": [], "flags": "--data <x>&", "overrides": None})
    found = compare_paths(a, write(tmp_path / "b", tree=tree, train=train_lines(warmup=1)))
    files = write_report(found, tmp_path / "out")
    page = files[-1].read_text()
    assert "http" not in page
    assert not re.search(r"<script|<link|@import|url\(", page)
    assert "<img" not in page
    assert page.count("<svg") == 2
    assert [file.name for file in files] == ["report.json", "report.png", "report.html"]
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


def localised() -> Localised:
    """Return an outcome whose first difference is in the forward pass, on one of two processes of B."""
    probes = [cast("Probes", _Facts({"dtype": "float32", "layout": {"processes": n}})) for n in (1, 2)]
    sides = [Pass(label, f"run <{label}>", probe, probe) for label, probe in zip("AB", probes, strict=True)]
    where = Where((3, 0), 0.25, -1.5, "B", (1,), (2,))
    norm, projection = "decoder.layers.0.input_layernorm", "decoder.layers.0.self_attention.linear_qkv"
    rows = [
        Row(4, stages.FORWARD, norm, "rounding", "the sides agree in float64", 1e-7, 1e-16, 5e-13, (0.5, 0.6)),
        Row(4, stages.FORWARD, projection, "differs", "too far apart", 0.6, 0.7, 5e-13, None, where),
    ]
    results = [
        StageResult(None, stages.CONFIG, "rounding", "settings that act: model.rotary_base (1 against 2)"),
        StageResult(4, stages.DATA, "equal", "4 equal bit for bit"),
        StageResult(4, stages.FORWARD, "differs", "linear_qkv is too far apart", rows),
        StageResult(4, stages.LOSS, "unknown", NOT_LOOKED_AT),
        StageResult(4, stages.UPDATE, "unknown", NOT_LOOKED_AT),
    ]
    walked = Walked(sides[0], sides[1], results, [])
    return Localised("bug", "linear_qkv is the first that differs.", "Look at it.", walked, [4], ["a note"])


class _Facts:
    """Stands for probes of which only the facts are read."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts


def _rows(page: str) -> list[str]:
    """Return the rows of the tables of a page, cells apart by bars."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page)
    return ["|".join(re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)) for row in rows]


def test_html_tells_grades_and_regions_without_colour(tmp_path: Path):
    a, lines = write(tmp_path / "a"), train_lines()
    lines[4]["lm_loss"] += 1e-3
    lines[7]["lm_loss"] += 3
    evaluations = evaluation_lines()
    evaluations[2]["lm_loss"] += 3
    found = compare_paths(a, write(tmp_path / "b", train=lines, evaluations=evaluations))
    page = write_report(found, tmp_path / "out")[-1].read_text()
    grades = {row.partition("|")[0]: row.rpartition("|")[2] for row in _rows(page)}
    assert (grades["4"], grades["5"], grades["8"]) == (
        "\u2713 equal",
        "~ inside the band",
        "\u2717 outside the band",
    )
    names = [evaluation_name(row.key) for row in found.findings.numbers.evaluations]
    assert [grades[name] for name in names] == ["\u2713 equal", "\u2713 equal", "\u2717 outside the band"]
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    regions = re.findall(r'role="region" aria-label="(.*?)"', page)
    assert len(regions) == len(set(regions)) == 4
    assert set(regions) <= set(headings)


def test_legend_of_the_difference_lies_beside_the_plots(tmp_path: Path):
    a = write(tmp_path / "a")
    for measured in (False, True):
        if measured:
            write_band(band(), a)
        drawn = figure(compare_paths(a, write(tmp_path / f"b{measured}", train=train_lines(warmup=1))))
        drawn.canvas.draw()
        top, bottom = drawn.axes
        legend = bottom.get_legend()
        assert legend is not None
        box = legend.get_window_extent()
        assert box.y0 >= bottom.get_window_extent().y1 - 0.5
        assert box.y1 <= top.get_window_extent().y0
        assert 0 <= box.x0 < box.x1 <= drawn.bbox.x1


def _fields(value: Any, name: str = "") -> set[str]:
    """Return the dotted names of a report's fields, as the docs spell them."""
    if isinstance(value, dict) and name not in _KEYED:
        parts = [_fields(each, f"{name}.{key}" if name else key) for key, each in value.items()]
        return set().union(*parts)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(_fields(each, f"{name}[]") for each in value))
    return {re.sub(r"(sides|missing\.\w+)\.[AB]\b", r"\1.*", name)}


_KEYED = ("band.spread", "sides.A.settings.values", "sides.A.settings.unmapped")


def _documented(page: str, heading: str) -> list[str]:
    """Return the fields in the first column of the table under a heading of a page."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text().split(f"## {heading}\n")[1].split("\n#")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall("`([^`]+)`", cell)]


def test_docs_list_the_fields_of_the_json(tmp_path: Path):
    a = write(tmp_path / "a")
    write_band(band(), a)
    lines, evaluations = train_lines(warmup=1)[:-1], evaluation_lines()[:-1]
    b = write(tmp_path / "b", tree=config(scheduler__lr_warmup_iters=1), train=lines, evaluations=evaluations)
    prints = replace(load_side(a, "A"), settings=Settings("its log", {"optimizer.lr": 1.0}, {"--x": "1"}))
    documented = _documented("verdicts.md", "Fields of report.json")
    assert len(documented) == len(set(documented))
    assert set(documented) == _fields(as_json(compare(prints, load_side(b, "B"))))


def test_docs_list_the_fields_of_the_json_of_localise():
    found = localised()
    found.walked.differences.append(ConfigDifference("model.rotary_base", 1, 2, "", "", "active", ""))
    report = localise_report.as_json(found)
    row = _fields(report["first"])
    assert _fields(report["stages"][2]["rows"][1]) == row
    assert set(report["begins"]) == set(report["first"])
    documented = _documented("localise.md", "The report")
    assert len(documented) == len(set(documented))
    for result in report["stages"]:
        del result["rows"]
    report["begins"] = None
    assert set(documented) - {"stages[].rows[]"} == _fields(report)


def test_localise_page_has_verdict_walk_and_first_tensor(tmp_path: Path):
    files = localise_report.write_report(localised(), tmp_path)
    assert [file.name for file in files] == ["report.json", "report.html"]
    page = files[-1].read_text()
    assert "http" not in page
    assert not re.search(r"<script|<link|@import|url\(|<img", page)
    order = [page.index(text) for text in ("<strong>bug</strong>", "is the first that differs.", ">Sides<", ">data<")]
    assert order == sorted(order)
    rows = _rows(page)
    for row in (
        "B|run &lt;B&gt;|unknown|float32|2",
        "run|config|~ differs|settings that act: model.rotary_base (1 against 2)",
        "4|data|\u2713 equal|4 equal bit for bit",
        "4|forward|\u2717 differs|linear_qkv is too far apart",
        "4|loss|\u2013 not looked at|",
        "4|optimizer update|\u2013 not looked at|",
        "Stage|forward",
        "Tensor|decoder.layers.0.self_attention.linear_qkv",
        "Iteration|4",
        "Rank|1 of B, micro-batch 2",
        "Where they are farthest apart|[3, 0]",
        "A there in float64|0.25",
        "B there in float64|-1.5",
        "Max difference|1.75",
        "decoder.layers.0.input_layernorm|\u2713 rounding|1e-07|1e-16|5e-13|0.5|0.6",
    ):
        assert row in rows
    assert "<li>a note</li>" in page


def test_localise_page_of_a_planted_fault_shows_both_numbers(tmp_path: Path):
    name = next(name for name, fault in faults.FAULTS.items() if fault.stage == stages.SCHEDULE)
    sides = []
    for label, planted in (("A", None), ("B", name)):
        folder = tmp_path / label
        with contextlib.redirect_stdout(io.StringIO()):
            assert faults.planted(planted, faults.job_of(planted, folder, tmp_path / "A", "gpt")) == 0
        sides.append(Pass(label, label, load_probes(folder, RUN), load_probes(folder, TWIN)))
    found = judge((sides[0], sides[1]), [1])
    rows = _rows(localise_report.write_report(found, tmp_path)[-1].read_text())
    first = found.walked.first
    assert first is not None
    assert {"Stage|schedule", f"Tensor|{first.name}", "Iteration|1", "Rank|0, the only one on both sides"} <= set(rows)
    told = dict(row.split("|") for row in rows if row.count("|") == 1)
    a, b = float(told["A there"]), float(told["B there"])
    assert a != b
    assert first.where is not None
    assert (a, b) == (pytest.approx(first.where.a, rel=1e-6), pytest.approx(first.where.b, rel=1e-6))
    assert float(told["Max difference"]) == pytest.approx(abs(a - b), rel=1e-4)
    assert "1|forward|\u2013 not looked at|" in rows


def test_localise_page_names_processes_that_should_have_the_same(tmp_path: Path):
    reason, where = torn("B", Copies((0, 1), 0.019))
    found = localised()
    row = Row(4, stages.REDUCED, "output_layer.weight", "differs", reason, where=where)
    results = [StageResult(4, stages.REDUCED, "differs", reason, [row])]
    found = replace(found, walked=replace(found.walked, results=results))
    rows = _rows(localise_report.write_report(found, tmp_path)[-1].read_text())
    assert "Rank|0, 1 of B" in rows
    assert "Reason|processes 0 and 1 of B should have the same and are 0.019 apart" in rows


def test_localise_report_says_why_it_cannot_be_written(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot write the report to .*gone: No such file"):
        localise_report.write_report(localised(), tmp_path / "gone")
