"""Bisect over a history of Lockstep itself: a run of other code than the commit's is refused."""

from pathlib import Path

import pytest

from lockstep.cli import main
from tests.lab.bisect.history import git, history
from tests.lab.synthetic import write


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
