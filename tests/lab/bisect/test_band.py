"""Bisect with a measured band: inside it is good, outside bad, and good's own code measures it."""

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli import main
from lockstep.lab.calibration.band import QUANTITIES, Band, load_band, write_band
from tests.lab.bisect.history import RUN, git, history
from tests.lab.synthetic import ITERATIONS, Line, write

WIDTH = 0.02
CALIBRATE = """
import sys
from pathlib import Path
folder = Path(sys.argv[2])
assert sys.argv[1::2] == ["calibrate", "--iterations"] and (folder / "run.json").is_file()
(folder / "band.json").write_text(Path({band!r}).read_text())
print("calibrated by", Path("note").read_text())
"""
"""Stands in for the code of a commit: what calibrates is `python -m lockstep.cli` of that commit."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def banded(run_dir: Path, last: int = ITERATIONS) -> Path:
    """Write a band so wide that a loss has WIDTH and a norm more than any here differs by."""
    spread = {name: dict.fromkeys(range(1, last + 1), WIDTH / 4) for name in QUANTITIES}
    write_band(Band(spread, 4.0, ["4 runs from weights moved by one ulp"], True), run_dir)
    return run_dir


def moved(amount: float) -> Any:
    def change(lines: list[Line]) -> None:
        for line in lines:
            if line["kind"] == "train" and line["iteration"] > 4:
                line["lm_loss"] += amount

    return change


def runs(tmp_path: Path, amounts: list[float], calibrate: str = CALIBRATE) -> tuple[Path, list[str]]:
    """Return a repository of Lockstep's kind, a commit for each run, whose losses are so far from the first's."""
    folder = tmp_path / "repo"
    history(folder, 1, {})
    (folder / "src/lockstep").mkdir(parents=True)
    (folder / "src/lockstep/__init__.py").write_text("__version__ = '1'\n")
    (folder / "src/lockstep/cli.py").write_text(calibrate.format(band=str(tmp_path / "measured/band.json")))
    hashes = []
    for number, amount in enumerate(amounts):
        (folder / "note").write_text(str(number))
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", f"change {number}")
        hashes.append(git(folder, "rev-parse", "HEAD"))
        code = {"commit": hashes[-1], "dirty": False}
        write(tmp_path / "runs" / hashes[-1], change=moved(amount), code=code)
    banded(write(tmp_path / "measured"))
    return folder, hashes


def bisect(folder: Path, hashes: list[str], *options: str) -> tuple[int, dict[str, Any]]:
    out = folder.parent / f"out-{len(list(folder.parent.glob('out-*')))}"
    words = ["bisect", "--good", hashes[0], "--bad", hashes[-1], "--runs-in", str(folder), "--out", str(out)]
    script = 'echo run directory: "$0/$(git rev-parse HEAD)"'
    code = main([*words, *options, "--", "sh", "-c", script, str(folder.parent / "runs")])
    told = out / "bisect.json"
    return code, json.loads(told.read_text()) if told.exists() else {}


def test_the_commit_that_left_the_band_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commit 2 is rounding that goes more than half of the way; commit 5 leaves the band."""
    folder, hashes = runs(tmp_path, [0, 0, 0.018, 0.018, 0.018, 0.03, 0.03, 0.03])
    code, told = bisect(folder, hashes)
    assert (code, told["commit"]["hash"]) == (0, hashes[2]), "without a band the largest step is found"
    capsys.readouterr()
    code, told = bisect(folder, hashes, "--band", str(tmp_path / "measured"))
    assert (code, told["commit"]["hash"]) == (0, hashes[5])
    answers = {step["commit"]["hash"]: (step["answer"], step["reason"]) for step in told["steps"]}
    assert answers[hashes[4]] == ("good", "inside the band")
    assert answers[hashes[5]][0] == "bad"
    assert answers[hashes[5]][1].startswith("outside the band: lm loss parts at iteration 5")
    said = capsys.readouterr().out
    assert "band: only what lies outside 4 times the spread of 4 runs from weights moved by one ulp counts" in said
    assert "verdict  rounding: Losses differ first at iteration 5 and by at most 0.012" in said
    assert "the band was measured on good. With what came before it the curve left the band of good." in said


def test_the_first_step_out_of_the_band_is_found_also_where_a_larger_one_follows(tmp_path: Path) -> None:
    folder, hashes = runs(tmp_path, [0, 0, 0.04, 0.04, 0.04, 0.2, 0.2, 0.2])
    assert bisect(folder, hashes)[1]["commit"]["hash"] == hashes[5]
    told = bisect(folder, hashes, "--band", str(tmp_path / "measured"))[1]
    assert told["commit"]["hash"] == hashes[2]
    assert told["comparison"]["verdict"] == "bug"


def test_good_is_calibrated_by_its_own_code_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, hashes = runs(tmp_path, [0, 0.018, 0.03])
    code, told = bisect(folder, hashes, "--calibrate")
    assert (code, told["commit"]["hash"]) == (0, hashes[2])
    (measured,) = (tmp_path / "cache").rglob("calibrated")
    assert load_band(measured) == load_band(tmp_path / "measured")
    (tmp_path / "measured/band.json").unlink()
    assert bisect(folder, hashes, "--calibrate")[1]["runs"] == 0, "the band is remembered"
    assert bisect(folder, hashes)[1]["commit"]["hash"] == hashes[1], "and not used unasked"
    (measured / "band.json").unlink()
    assert bisect(folder, hashes, "--calibrate")[0] == 2
    assert "cannot calibrate its run: exit code 1: FileNotFoundError" in capsys.readouterr().err


def test_a_calibration_that_hangs_is_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runs come from the cache, so that the limit meets the calibration alone."""
    folder, hashes = runs(tmp_path, [0, 0.03], calibrate="import threading; threading.Event().wait(60)")
    assert bisect(folder, hashes)[0] == 0
    assert bisect(folder, hashes, "--calibrate", "--timeout", "0.5")[0] == 2
    said = capsys.readouterr().err
    assert "cannot calibrate its run: did not end within 0.5 seconds; raise --timeout, or give --band RUN" in said


def test_ends_inside_the_band_and_bands_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, hashes = runs(tmp_path, [0, 0, 0.01])
    code, told = bisect(folder, hashes, "--band", str(tmp_path / "measured"))
    assert (code, told["ended"], told["comparison"]["verdict"]) == (1, "rounding", "rounding")
    assert "bad's curve lies inside the band of good" in capsys.readouterr().out
    other = banded(write(tmp_path / "other", change=moved(0.5)))
    short = banded(write(tmp_path / "short"), last=ITERATIONS - 2)
    for run_dir, message in (
        (write(tmp_path / "bare"), "has no band; `lockstep calibrate"),
        (other, "is of another run than good: lm loss parts at iteration 5"),
        (short, f"the band of good ends at iteration {ITERATIONS - 2}, its run at {ITERATIONS}"),
    ):
        assert bisect(folder, hashes, "--band", str(run_dir))[0] == 2
        assert message in capsys.readouterr().err
    plain = history(tmp_path / "plain", 2, {2: {"EPSILON": "2e-5"}})
    words = ["bisect", "--good", plain[0], "--bad", plain[1], "--runs-in", str(tmp_path / "plain"), "--calibrate"]
    assert main([*words, "--", *RUN]) == 2
    assert "what it tells is a log; leave --band and --calibrate" in capsys.readouterr().err
