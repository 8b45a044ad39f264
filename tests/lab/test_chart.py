"""The curves inside the page: no spike is lost, gaps stay gaps, and a long run does not make a large page."""

import math
import re
from pathlib import Path

import pytest

from lockstep.lab import chart
from lockstep.lab.calibration.band import write_band
from lockstep.lab.compare import compare_paths
from lockstep.lab.html import as_html
from lockstep.lab.thinning import COLUMNS, kept
from tests.lab.calibration.test_band import band
from tests.lab.synthetic import Line, train_lines, write

LONG = 10_000


def drawn(page: str, kind: str) -> list[tuple[int, int]]:
    """Return the points of a curve, in units of the plot from the top left."""
    found = re.search(rf'<path class="{kind}" d="([^"]*)"', page)
    assert found is not None
    return [(int(x), int(y)) for x, y in re.findall(r"[ML](\d+) (-?\d+)", found[1])]


def rising(lines: list[Line]) -> None:
    """Let the losses rise and fall within every pixel."""
    for line in lines:
        line["lm_loss"] = 5 + math.sin(line["iteration"] * 1.7)


@pytest.mark.parametrize("iteration", [1, 2, 4321, 5555, LONG - 1, LONG])
@pytest.mark.parametrize("spike", [3.0, -3.0])
def test_thinning_keeps_a_spike_of_one_iteration(iteration: int, spike: float):
    at = list(range(1, LONG + 1))
    values = [5 + math.sin(i * 1.7) for i in at]
    values[iteration - 1] += spike
    shown = kept(at, values)
    assert len(shown) <= 4 * COLUMNS
    assert iteration - 1 in shown
    assert shown == sorted(set(shown))
    assert {shown[0], shown[-1]} == {0, LONG - 1}


def test_thinning_keeps_gaps_and_short_curves():
    at = list(range(1, LONG + 1))
    values = [1.0] * LONG
    values[7780] = math.nan
    assert 7780 in kept(at, values)
    assert kept([3, 5, 9], [1.0, math.nan, 2.0]) == [0, 1, 2]
    assert kept([], []) == []


def test_page_of_ten_thousand_iterations_is_small_and_shows_the_spike(tmp_path: Path):
    lines = [train_lines(1)[0] | {"iteration": i, "consumed_samples": 32 * i} for i in range(1, LONG + 1)]
    rising(lines)
    a = write(tmp_path / "a", train=lines)
    lines[6543]["lm_loss"] += 2
    found = compare_paths(a, write(tmp_path / "b", train=lines))
    page = as_html(found)
    assert len(page.encode()) < 300_000
    assert found.decision.verdict == "bug"
    assert "farthest apart at iteration 6544: +2," in page
    highest = min(drawn(page, "b"), key=lambda point: point[1])
    assert highest[0] == pytest.approx(6543 / (LONG - 1) * 10_000, abs=1)
    assert min(drawn(page, "a"), key=lambda point: point[1])[1] > highest[1] + 2000
    assert min(drawn(page, "d"), key=lambda point: point[1])[0] == highest[0]


def test_page_says_what_the_curves_show(tmp_path: Path):
    a = write(tmp_path / "a")
    assert "Both are the same." in as_html(compare_paths(a, write(tmp_path / "same")))
    write_band(band(), a)
    lines = train_lines()
    lines[4]["lm_loss"] = math.nan
    lines[7]["lm_loss"] += 3
    text = chart.figure(compare_paths(a, write(tmp_path / "b", train=lines)))
    assert "in nats per token, over iterations 1 to 10. A goes from 10.422 to 9.9918, B goes from 10.422" in text
    assert "farthest apart at iteration 8: +3, where the band (measured on A) is \u00b1" in text
    assert "A gap stands for a side without a finite loss: 1 iteration, first 5." in text
    curve = re.search(r'<path class="b" d="([^"]*)"', text)
    assert curve is not None
    assert curve[1].count("M") == 2  # before the gap and after it
    assert [len(drawn(text, kind)) for kind in "abd"] == [10, 9, 9]
    assert text.count('<path class="area"') == 2
    assert "band around A" in text
    assert text.count("<svg") == text.count('aria-hidden="true"') == 2


def test_one_iteration_and_equal_losses_are_drawn(tmp_path: Path):
    one = train_lines(1)
    text = chart.figure(compare_paths(write(tmp_path / "a", train=one), write(tmp_path / "b", train=one)))
    assert drawn(text, "a") == [(5000, 5000)]
    assert 'dots" d="M5000 5000h0"' in text
    assert chart.figure(compare_paths(write(tmp_path / "c", train=[]), write(tmp_path / "d", train=[]))) == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (9.99, 10.43), (-4e-7, 3e-7), (1e-3, 2e6), (7.0, 7.0)])
def test_every_scale_has_a_few_round_numbers(low: float, high: float):
    scale = chart.Scale.over(low, high, 6)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 7
    assert len({text for _, text in ticks}) == len(ticks)
    for value, text in ticks:
        assert 0 <= scale.place(value) <= 10_000
        assert float(text) == pytest.approx(value, rel=1e-6, abs=1e-12)
