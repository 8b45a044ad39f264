"""Correlate with a checkout of Megatron-LM as one side; here a stand-in that prints a prepared log."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.cli import main
from lockstep.errors import UserError
from lockstep.lab.calibration import calibrate
from lockstep.lab.calibration.band import FACTOR, QUANTITIES, Band, write_band
from lockstep.lab.correlate import REFERENCE_OVERRIDES
from lockstep.lab.engine import WITHOUT_TRANSFORMER_ENGINE, correlate_engine, find_checkout, flags_to_add
from lockstep.megatron_lm.parser import parse_flags
from tests.commands import FLAGS
from tests.lab.synthetic import ITERATIONS, Line, train_lines, write, write_log

ADDED = [word for words in WITHOUT_TRANSFORMER_ENGINE for word in words]


def checkout(folder: Path, *, exit_code: int = 0, change: Callable[[list[Line]], None] | None = None) -> Path:
    """Make a checkout whose script keeps its words and prints a log: the prepared record's, edited by ``change``."""
    folder.mkdir()
    lines = train_lines()
    if change:
        change(lines)
    log = write_log(folder / "prepared.log", lines)
    (folder / "pretrain_gpt.py").write_text(
        "import os, pathlib, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "(here / 'words').write_text('\\n'.join(sys.argv[1:]))\n"
        "(here / 'search').write_text(os.environ['PYTHONPATH'].split(os.pathsep)[0])\n"
        f"print(pathlib.Path({str(log)!r}).read_text())\n"
        f"sys.exit({exit_code})\n"
    )
    return folder


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the interpreter: launch scripts without torch, and write a prepared record for Lockstep."""
    write(folder / "record")
    script = folder / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, shutil, sys\n"
        "words = sys.argv[1:]\n"
        "if words[1] == 'torch.distributed.run':\n"
        f"    os.execv({sys.executable!r}, ['python', *words[4:]])\n"
        "print('door', words[2])\n"
        f"shutil.copytree({str(folder / 'record')!r}, words[-1].removeprefix('run.dir=').strip(\"'\"))\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_checkout_is_run_with_the_flags_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    megatron = checkout(tmp_path / "Megatron-LM")
    stand_in(tmp_path, monkeypatch)
    assert main(["correlate", "--engine", f"megatron-lm={megatron}", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"added, as Transformer Engine is not installed: {' '.join(ADDED)}" in shown
    assert f"Megatron-LM: {megatron}" in shown
    assert "verdict: identical" in shown
    assert (megatron / "words").read_text().splitlines() == [*FLAGS, *ADDED]
    assert (megatron / "search").read_text() == str(megatron)
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {"megatron-lm.log", "lockstep", "lockstep.log", "report.html", "report.json", "report.png"}
    assert "door pretrain-gpt" in (tmp_path / "out" / "lockstep.log").read_text()


def test_recipe_beside_flags_is_lockstep_s_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(tmp_path, monkeypatch)
    engine = f"megatron-lm={checkout(tmp_path / 'm')}"
    assert correlate_engine(engine, " ".join(FLAGS), REFERENCE_OVERRIDES, tmp_path / "out") == 0
    assert "door train" in (tmp_path / "out" / "lockstep.log").read_text()


def test_band_is_measured_on_lockstep_s_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stand_in(tmp_path, monkeypatch)
    spread = {quantity: dict.fromkeys(range(1, ITERATIONS + 1), 1e-4) for quantity in QUANTITIES}
    band = Band(spread, FACTOR, ["4 runs from elsewhere"], True)
    monkeypatch.setattr(calibrate, "calibrate", lambda run_dir, say: write_band(band, run_dir))
    engine = f"megatron-lm={checkout(tmp_path / 'm')}"
    assert main(["correlate", "--engine", engine, "--calibrate", "--out", str(tmp_path / "out")]) == 0
    assert "the band was measured on B" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("amount", "verdict", "next_step"),
    [
        (0.001, "rounding", ""),
        (
            0.5,
            "cannot tell",
            "Run both again with --attention-dropout 0 --hidden-dropout 0 and without --bf16; if they still part: look "
            "first at the update of iteration 4 and earlier: the losses up to it are inside the band; the notes name "
            "the code, packages and devices that differ.",
        ),
    ],
)
def test_lockstep_is_not_advised_in_place_of_the_trainer(
    amount: float, verdict: str, next_step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def moved(lines: list[Line]) -> None:
        for line in lines[4:]:
            line["lm_loss"] += amount

    stand_in(tmp_path, monkeypatch)
    engine = f"megatron-lm={checkout(tmp_path / 'm', change=moved)}"
    correlate_engine(engine, None, None, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (told["verdict"], told["next_step"]) == (verdict, next_step)


def test_flags_are_added_only_where_they_are_needed(monkeypatch: pytest.MonkeyPatch):
    assert flags_to_add(FLAGS) == ADDED
    assert flags_to_add(["--transformer-impl", "transformer_engine", "--no-rope-fusion"]) == ADDED[2:-1]
    parse_flags([*FLAGS, *ADDED])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert flags_to_add(FLAGS) == []


@pytest.mark.parametrize(
    ("engine", "flags", "message"),
    [
        ("nemo=x", None, "'nemo=x' is not of the form megatron-lm=PATH"),
        ("megatron-lm", None, "is not of the form megatron-lm=PATH"),
        ("megatron-lm={here}", None, "holds no pretrain_gpt.py; give the folder of a checkout"),
        ("megatron-lm={m}", "--num-layerz 2", "num-layers"),
        (
            "megatron-lm={m}",
            " ".join([*FLAGS, "--tensor-model-parallel-size", "2"]),
            "1 processes are not a multiple of --tensor-model-parallel-size",
        ),
        ("megatron-lm={m}", "--run-dir x", "leave --run-dir out"),
    ],
)
def test_bad_engines_end_before_anything_runs(engine: str, flags: str | None, message: str, tmp_path: Path):
    megatron = checkout(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        correlate_engine(engine.format(here=tmp_path, m=megatron), flags, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (megatron / "words").exists()


def test_engine_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(tmp_path, monkeypatch)
    megatron = checkout(tmp_path / "m", exit_code=1)
    with pytest.raises(UserError, match="the megatron-lm side ended with exit code 1; its output is in"):
        correlate_engine(f"megatron-lm={megatron}", None, None, tmp_path / "out")


def test_home_of_the_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkout(f"megatron-lm=~/{checkout(tmp_path / 'm').name}") == (tmp_path / "m").resolve()
