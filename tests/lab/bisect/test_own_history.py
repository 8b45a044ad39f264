"""Bisect over this repository: a change planted in a clone, found by its records, and runs of other code refused."""

import json
import subprocess
from pathlib import Path

import pytest

from lockstep.cli import main
from tests.commands import TINY
from tests.lab.bisect.history import git, history
from tests.lab.synthetic import write

ROOT = Path(__file__).resolve().parents[3]
RUN = [*TINY, "--max-position-embeddings", "8", "--eval-iters", "0"]
NORMS = "src/lockstep/models/norms.py"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("own", [True, False])
def test_a_record_of_other_code_ends_the_search(own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "repo"
    hashes = history(folder, 2, {})
    if own:  # a repository of Lockstep: then the record has to name the commit
        (folder / "src/lockstep").mkdir(parents=True)
        (folder / "src/lockstep/__init__.py").write_text("__version__ = '1'\n")
        for number in (1, 2):
            (folder / "note").write_text(str(number))
            git(folder, "add", "-A")
            git(folder, "commit", "-qm", f"own {number}")
        hashes = git(folder, "rev-list", "--reverse", "-2", "HEAD").split()
    run = write(tmp_path / "run", code={"commit": "0" * 40, "dirty": False})
    words = ["bisect", "--good", hashes[0], "--bad", hashes[1], "--runs-in", str(folder), "--out", str(tmp_path / "o")]
    assert main([*words, "--", "echo", f"run directory: {run}"]) == (2 if own else 1)
    said = capsys.readouterr()
    if own:
        assert f"the run of {hashes[0][:12]} imported Lockstep of commit 000000000000, not the commit's own" in said.err
    else:
        assert "the record tells the commit of Lockstep, not of this repository" in said.out


@pytest.mark.slow
def test_a_change_of_numerics_in_this_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(clone)], check=True)
    norms = clone / NORMS
    for number in (1, 2, 3, 4):
        if number == 3:
            assert "self.epsilon = config" in norms.read_text()
            norms.write_text(norms.read_text().replace("self.epsilon = config", "self.epsilon = 1.5 * config"))
        (clone / "README.md").write_text(str(number))
        git(clone, "commit", "-qam", f"change {number}")
    planted = git(clone, "rev-parse", "HEAD~1")
    out = tmp_path / "out"
    words = [
        "bisect",
        "--good",
        "HEAD~4",
        "--bad",
        "HEAD",
        "--runs-in",
        str(clone),
        "--out",
        str(out),
        "--repeats",
        "1",
    ]
    assert main([*words, "--", "lockstep", "pretrain-gpt", *RUN]) == 0
    told = json.loads((out / "bisect.json").read_text())
    assert told["commit"]["hash"] == planted
    assert told["stage"].startswith("losses and gradient norms"), "config, data and weights are known to be equal"
    assert told["comparison"]["sides"]["A"]["kind"] == "Lockstep run record"
    assert {stage["name"]: stage["state"] for stage in told["comparison"]["stages"]}["initial weights"] == "equal"
    assert told["runs"] == 4
    assert git(clone, "status", "--porcelain") == ""
    assert planted in capsys.readouterr().out
