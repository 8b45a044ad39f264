"""Bisect over a history of Lockstep itself: a run of other code than the commit's is refused."""

from pathlib import Path

import pytest

from lockstep.cli import main
from tests.lab.bisect.history import git, history
from tests.lab.synthetic import write, write_log


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
        assert main([*words, "--log", "-", "--", "echo", f"run directory: {run}"]) == 2
        assert "imported Lockstep of commit 0000" in capsys.readouterr().err, "also where the record is not read"
        assert f"the run of {hashes[0][:12]} imported Lockstep of commit 000000000000, not the commit's own" in said.err
    else:
        assert "the record tells the commit of Lockstep, not of this repository" in said.out


def test_records_are_not_mixed_with_printed_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commits that write no record, or one that cannot be read, are told apart from those that do."""
    folder, record, log = tmp_path / "repo", write(tmp_path / "run"), write_log(tmp_path / "log")
    other = write(tmp_path / "other", change=lambda lines: lines[4].update(lm_loss=9.0))
    hashes = history(folder, 5, {2: {"LR": "1"}, 3: {"LR": "2"}, 5: {"LR": "3"}})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text("{}")
    script = f"cat {log}; case $(grep LR settings.py) in *2) ;; *3e-4) echo run directory: {record};; "
    script += f"*1) echo run directory: {tmp_path}/damaged;; *3) echo run directory: {other};; esac"
    words = ["bisect", "--runs-in", str(folder), "--good", hashes[0], "--repeats", "1"]
    run = ["--", "sh", "-c", script]
    for bad, message in (
        (hashes[1], "run.json is not a Lockstep run record: it states no schema (--log - reads what every run prints"),
        (hashes[2], "good tells every digit and bad printed digits; --log - reads what every run prints instead"),
    ):
        assert main([*words, "--bad", bad, *run]) == 2
        assert message in capsys.readouterr().err
    assert main([*words, "--bad", hashes[4], "--out", str(tmp_path / "a"), *run]) == 1
    said = capsys.readouterr().out
    assert "it tells printed digits, both ends tell every digit; --log - reads" in said
    assert "one of 4" in said
    assert main([*words, "--bad", hashes[2], "--log", "-", "--out", str(tmp_path / "b"), *run]) == 1
    assert "good and bad have the same curve" in capsys.readouterr().out
