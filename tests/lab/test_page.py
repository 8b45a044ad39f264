"""The report in a real browser; skipped where there is none."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lockstep.lab.calibration.band import write_band
from lockstep.lab.compare import compare_paths
from lockstep.lab.localise import report as localise_report
from lockstep.lab.report import write_report
from tests.lab.calibration.test_band import band
from tests.lab.synthetic import config, train_lines, write
from tests.lab.test_report import localised

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")


def opened(page: Path, profile: Path, *more: str) -> str:
    """Return a page as the browser has it, without network; it has to load without a word on the console."""
    options = [*more, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={profile}", "--proxy-server=127.0.0.1:9", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    return done.stdout


def test_page_opens_without_errors_or_requests(tmp_path: Path):
    a = write(tmp_path / "a")
    write_band(band(), a)
    tree = config(scheduler__lr_warmup_iters=1)
    found = compare_paths(a, write(tmp_path / "b", tree=tree, train=train_lines(warmup=1)))
    page = opened(write_report(found, tmp_path / "out")[-1], tmp_path / "profile")
    for title in ("config", "What was compared, in this order", "Settings that differ", "Iterations", "Notes"):
        assert title in page


def test_page_of_a_localisation_opens_without_errors_or_requests(tmp_path: Path):
    page = opened(localise_report.write_report(localised(), tmp_path)[-1], tmp_path / "profile")
    assert page.count("<table") == page.count("</table>") == 4
    for text in ("<strong>bug</strong>", "\u2717 differs", "\u2013 not looked at", "Max difference"):
        assert text in page


_FRAME = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe id="page" width="WIDTH" height="900" style="border:0" src="report.html"></iframe><script>
window.onload = () => {
  const view = document.getElementById("page").contentWindow
  const doc = view.document, sizes = elements => [...elements].map(e => e.getBoundingClientRect())
  const labels = sizes(doc.querySelectorAll(".plot span.x")), plots = sizes(doc.querySelectorAll(".plot svg"))
  const style = view.getComputedStyle(doc.querySelector(".plot span"))
  document.body.dataset.found = JSON.stringify({
    scrolls: doc.documentElement.scrollWidth, plots: plots.map(p => p.width), font: parseFloat(style.fontSize),
    right: Math.max(...labels.map(l => l.right)), left: Math.min(...labels.map(l => l.left)),
    overlaps: labels.slice(1).filter((l, n) => l.top === labels[n].top && l.left < labels[n].right).length,
  })
}</script></body>"""


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_page_fits_the_screen_with_labels_that_can_be_read(tmp_path: Path, width: int):
    lines = [train_lines(1)[0] | {"iteration": i, "consumed_samples": 32 * i} for i in range(1, 12_346)]
    a = write(tmp_path / "a", train=lines)
    lines[12_000]["lm_loss"] += 3
    page = write_report(compare_paths(a, write(tmp_path / "b", train=lines)), tmp_path / "out")[-1]
    (page.parent / "frame.html").write_text(_FRAME.replace("WIDTH", str(width)))
    shown = opened(page.parent / "frame.html", tmp_path / "profile", "--allow-file-access-from-files")
    text = re.search(r'data-found="([^"]*)"', shown)
    assert text is not None
    found = json.loads(html.unescape(text[1]))
    assert found["scrolls"] <= width
    assert len(found["plots"]) == 2
    assert all(0.7 * min(width, 1080) < plot < width for plot in found["plots"])
    assert found["font"] >= 12
    assert 0 <= found["left"] < found["right"] <= width
    assert not found["overlaps"]
