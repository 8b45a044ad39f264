"""The report in a real browser; skipped where there is none."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lockstep.lab.calibration.band import write_band
from lockstep.lab.compare import compare_paths
from lockstep.lab.report import write_report
from tests.lab.calibration.test_band import band
from tests.lab.synthetic import config, train_lines, write

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_page_opens_without_errors_or_requests(tmp_path: Path):
    a = write(tmp_path / "a")
    write_band(band(), a)
    tree = config(scheduler__lr_warmup_iters=1)
    found = compare_paths(a, write(tmp_path / "b", tree=tree, train=train_lines(warmup=1)))
    page = write_report(found, tmp_path / "out")[-1]
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", "--proxy-server=127.0.0.1:9", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    for title in ("config", "What was compared, in this order", "Settings that differ", "Iterations", "Notes"):
        assert title in done.stdout
