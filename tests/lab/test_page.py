"""The report in a real browser; skipped where there is none."""

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


def opened(page: Path, profile: Path) -> str:
    """Return a page as the browser has it, without network; it has to load without a word on the console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
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
