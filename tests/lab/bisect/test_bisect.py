"""Bisect on scratch repositories: the planted commit, the number of runs, skips, merges, and an untouched tree."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli import main
from lockstep.lab.worktrees import interruptible
from tests.lab.bisect.history import RUN, SETTINGS, TRAIN, commit, git, history

ROOT = Path(__file__).resolve().parents[3]
Said = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def bisect(folder: Path, good: str, bad: str, *options: str, run: tuple[str, ...] = RUN) -> tuple[int, dict[str, Any]]:
    """Run the command; return its exit code and what it wrote."""
    out = folder.parent / f"out-{len(list(folder.parent.glob('out-*')))}"
    code = main(
        ["bisect", "--good", good, "--bad", bad, "--runs-in", str(folder), "--out", str(out), *options, "--", *run]
    )
    told = out / "bisect.json"
    return code, json.loads(told.read_text()) if told.exists() else {}


def test_one_planted_change_among_thirty_commits(tmp_path: Path, capsys: Said) -> None:
    hashes = history(tmp_path / "repo", 30, {17: {"EPSILON": "2e-5"}})
    code, told = bisect(tmp_path / "repo", hashes[0], hashes[-1])
    said = capsys.readouterr().out
    assert code == 0
    assert told["commit"]["hash"] == hashes[16]
    assert told["share"] == pytest.approx(1)
    assert told["comparison"]["verdict"] == "bug", "small, but above the noise that was measured: none"
    assert len(told["steps"]) <= 5
    assert told["runs"] == len(told["steps"]) + 3, "both ends, good once more, and log2 of the rest"
    assert told["compared"]["A"]["hash"] == hashes[15]
    for text in (
        hashes[16],
        "2026-01-02T03:04:05+00:00",
        "change 17",
        "losses and gradient norms",
        "every digit counts",
    ):
        assert text in said
    assert {path.name for path in (tmp_path / "out-0").iterdir()} >= {"report.html", "report.png", "bisect.json"}
    # Curves are remembered: nothing runs again, and what is found is the same.
    code, again = bisect(tmp_path / "repo", hashes[0], hashes[-1])
    assert (code, again["runs"], again["commit"]) == (0, 0, told["commit"])


@pytest.mark.parametrize("planted", [2, 16, 30])
def test_every_place_in_the_history_is_found(tmp_path: Path, planted: int) -> None:
    hashes = history(tmp_path / "repo", 30, {planted: {"LR": "1e-4", "EPSILON": "float('nan')"}})
    code, told = bisect(tmp_path / "repo", hashes[0], hashes[-1], "--repeats", "1")
    assert (code, told["commit"]["hash"]) == (0, hashes[planted - 1])
    assert len(told["steps"]) <= 5
    assert told["stage"].startswith("schedule: the learning rate")


def test_commits_that_cannot_run_are_skipped(tmp_path: Path, capsys: Said) -> None:
    hashes = history(tmp_path / "repo", 16, {12: {"EPSILON": "2e-5"}}, broken=range(5, 10))
    code, told = bisect(tmp_path / "repo", hashes[0], hashes[-1])
    assert (code, told["commit"]["hash"]) == (0, hashes[11])
    assert "skip, cannot run (exit code 1: ImportError: no such kernel)" in capsys.readouterr().out


def test_skips_that_hide_the_commit_give_a_range(tmp_path: Path, capsys: Said) -> None:
    hashes = history(tmp_path / "repo", 12, {7: {"EPSILON": "2e-5"}}, broken=range(5, 9))
    code, told = bisect(tmp_path / "repo", hashes[0], hashes[-1])
    assert (code, told["ended"]) == (1, "range")
    assert [entry["hash"] for entry in told["possible"]] == hashes[4:9]
    assert "one of 5" in capsys.readouterr().out


def test_the_commit_that_went_most_of_the_way_is_named_or_the_first_of_all(tmp_path: Path) -> None:
    changes = {4: {"EPSILON": "1.01e-5"}, 9: {"EPSILON": "2e-5"}}
    hashes = history(tmp_path / "repo", 12, changes)
    _, most = bisect(tmp_path / "repo", hashes[0], hashes[-1])
    assert most["commit"]["hash"] == hashes[8]
    assert most["share"] == pytest.approx(0.99, abs=0.001)
    _, first = bisect(tmp_path / "repo", hashes[0], hashes[-1], "--any-change")
    assert first["commit"]["hash"] == hashes[3]
    assert first["share"] == pytest.approx(0.01, abs=0.001)


def test_a_detour_is_skipped(tmp_path: Path, capsys: Said) -> None:
    changes = {5: {"EPSILON": "9e-5"}, 8: {"EPSILON": "1e-5"}, 10: {"EPSILON": "2e-5"}}
    hashes = history(tmp_path / "repo", 14, changes)
    code, told = bisect(tmp_path / "repo", hashes[0], hashes[-1])
    assert (code, told["commit"]["hash"]) == (0, hashes[9])
    assert "its curve is neither good's nor bad's" in capsys.readouterr().out


def test_equal_ends_and_noisy_ends_end_the_search(tmp_path: Path, capsys: Said) -> None:
    hashes = history(tmp_path / "repo", 3, {3: {"NOISE": "0.0"}})
    code, told = bisect(tmp_path / "repo", hashes[0], hashes[-1])
    assert (code, told["ended"], told["runs"]) == (1, "no difference", 3)
    noisy = history(tmp_path / "noisy", 6, {1: {"NOISE": "0.5"}, 4: {"EPSILON": "1.0001e-5"}})
    code, told = bisect(tmp_path / "noisy", noisy[0], noisy[-1])
    assert (code, told["ended"], told["runs"]) == (1, "cannot tell", 5)
    assert "4 runs of good differ" in capsys.readouterr().out


def test_a_change_above_the_noise_is_found(tmp_path: Path) -> None:
    noisy = history(tmp_path / "noisy", 10, {1: {"NOISE": "0.001"}, 7: {"EPSILON": "9e-5"}})
    code, told = bisect(tmp_path / "noisy", noisy[0], noisy[-1])
    assert (code, told["commit"]["hash"]) == (0, noisy[6])
    assert told["comparison"]["verdict"] != "bug", "of runs that differ by themselves this is not known"


@pytest.fixture
def merged(tmp_path: Path) -> dict[str, str]:
    """Return the hashes of a history whose change came in by a branch: base, branch (3 commits), merge, head."""
    folder = tmp_path / "repo"
    names = {"base": history(folder, 2, {})[-1]}
    git(folder, "checkout", "-q", "-b", "side")
    for number in (1, 2, 3):
        settings = SETTINGS | ({"EPSILON": "2e-5"} if number >= 2 else {})
        (folder / "side.txt").write_text(str(number))
        names[f"side {number}"] = commit(folder, "side", settings)
    git(folder, "checkout", "-q", "main")
    (folder / "own.txt").write_text("own")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "own")
    git(folder, "merge", "-q", "--no-ff", "-m", "merge side", "side")
    names["merge"] = git(folder, "rev-parse", "HEAD")
    names["head"] = commit(folder, "later", SETTINGS | {"EPSILON": "2e-5"})
    return names


def test_a_merge_is_looked_into_or_named_whole(tmp_path: Path, merged: dict[str, str]) -> None:
    code, told = bisect(tmp_path / "repo", merged["base"], merged["head"])
    assert (code, told["commit"]["hash"]) == (0, merged["side 2"])
    code, told = bisect(tmp_path / "repo", merged["base"], merged["head"], "--first-parent")
    assert (code, told["commit"]["hash"]) == (0, merged["merge"])


def test_a_commit_without_parents_is_named(tmp_path: Path, capsys: Said) -> None:
    """A history that was merged in, without anything in common."""
    folder = tmp_path / "repo"
    good = history(folder, 1, {})[0]
    git(folder, "checkout", "-q", "--orphan", "other")
    root = commit(folder, "other root", SETTINGS | {"EPSILON": "2e-5"})
    git(folder, "merge", "-q", "--allow-unrelated-histories", "-X", "ours", "-m", "merge", "main")
    code, told = bisect(folder, good, "HEAD")
    assert (code, told["commit"]["hash"]) == (0, root)
    assert "has no commit before it: both ends are compared" in capsys.readouterr().out


def snapshot(folder: Path) -> dict[str, str]:
    """Return every file of a tree and of its .git with its hash, and all refs.

    git writes an empty packed-refs where there was none; the refs themselves are compared.
    """
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "packed-refs"
    }
    return files | {"refs": git(folder, "for-each-ref")}


def changed(folder: Path) -> None:
    """Leave work in a tree: a change, a staged change, a new file, a bisection under way, a hook that would act."""
    (folder / "settings.py").write_text("mine")
    (folder / "notes.txt").write_text("staged")
    git(folder, "add", "notes.txt")
    (folder / "new.txt").write_text("new")
    git(folder, "bisect", "start", "--no-checkout", "HEAD", "HEAD~2")
    hook = folder / ".git/hooks/post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {folder}/hooked\n")
    hook.chmod(0o755)


def test_the_tree_is_untouched_when_it_ends_well_and_when_it_fails(tmp_path: Path, capsys: Said) -> None:
    folder = tmp_path / "repo"
    hashes = history(folder, 8, {6: {"EPSILON": "2e-5"}}, broken=range(8, 9))
    changed(folder)
    before = snapshot(folder)
    assert bisect(folder, hashes[0], hashes[6])[0] == 0
    assert bisect(folder, hashes[0], hashes[7])[0] == 2
    assert "bad " + hashes[7][:12] + " does not run: exit code 1: ImportError" in capsys.readouterr().err
    assert snapshot(folder) == before
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"lockstep-scratch-{os.getpid()}-*"))


SLOW = "import pathlib, subprocess, sys, time\npathlib.Path(sys.argv[1]).touch()\n" + (
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(98.7)'])\ntime.sleep(60)\n"
)


def start(folder: Path, good: str, bad: str, *run: str) -> subprocess.Popen[str]:
    words = ["bisect", "--good", good, "--bad", bad, "--runs-in", str(folder), "--out", str(folder.parent / "out")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(folder.parent)}
    return subprocess.Popen(
        [sys.executable, "-m", "lockstep.cli", *words, "--", *run],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(marker: str) -> bool:
    lines = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(os.getpid()))
    try:
        return any(marker.encode() in line for line in lines)
    except (FileNotFoundError, ProcessLookupError):
        return alive(marker)


def test_a_request_to_end_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, "as under nohup"
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_removes_everything(tmp_path: Path, sign: signal.Signals) -> None:
    folder = tmp_path / "repo"
    hashes = history(folder, 3, {})
    marker = f"98.7{sign:02d}"
    hashes.append(commit(folder, "slow", SETTINGS, SLOW.replace("98.7", marker)))
    changed(folder)
    before = snapshot(folder)
    process = start(folder, hashes[0], hashes[3], *RUN, str(tmp_path / "started"))
    wait_for((tmp_path / "started").exists)
    wait_for(lambda: alive(f"sleep({marker})"))
    process.send_signal(sign)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "interrupted\n"
    assert snapshot(folder) == before
    assert not list(tmp_path.glob("lockstep-scratch-*"))
    assert not alive(f"sleep({marker})")


def test_what_a_killed_bisection_left_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    hashes = history(folder, 4, {3: {"EPSILON": "2e-5"}})
    before = snapshot(folder)
    process = start(folder, hashes[0], hashes[3], "sleep", "30")
    wait_for(lambda: len(git(folder, "worktree", "list").splitlines()) > 1)
    process.kill()
    process.communicate(timeout=60)
    assert snapshot(folder) != before
    assert bisect(folder, hashes[0], hashes[3])[0] == 0
    assert snapshot(folder) == before
    assert not list(tmp_path.glob("lockstep-scratch-*"))


def test_log_in_a_file_and_a_run_that_hangs(tmp_path: Path, capsys: Said) -> None:
    folder = tmp_path / "repo"
    hashes = history(folder, 6, {4: {"EPSILON": "2e-5"}})
    run = ("sh", "-c", 'python train.py > "$0/train.log"; echo done', "{out}")
    code, told = bisect(folder, hashes[0], hashes[-1], "--log", "{out}/train.log", run=run)
    assert (code, told["commit"]["hash"]) == (0, hashes[3])
    assert bisect(folder, hashes[0], hashes[-1], "--log", "no.log", run=run)[0] == 2
    assert "does not run: it wrote no no.log" in capsys.readouterr().err
    assert bisect(folder, hashes[0], hashes[-1], "--timeout", "0.2", run=("sleep", "30"))[0] == 2
    assert "did not end within 0.2 seconds" in capsys.readouterr().err


def test_mistakes_are_one_message(tmp_path: Path, capsys: Said) -> None:
    folder = tmp_path / "repo"
    hashes = history(folder, 3, {})
    git(folder, "checkout", "-q", "-b", "side", hashes[0])
    side = commit(folder, "side", SETTINGS)
    good, bad = hashes[0], hashes[-1]
    for arguments, message in (
        ((good, "nowhere"), "--bad nowhere is no commit of"),
        ((good, good), "are the same commit"),
        ((bad, good), "exchange them"),
        ((side, bad), f"--good {good[:12]} is where they part"),
        ((good, bad, "--repeats", "0"), "--repeats 0: give a number above 0"),
    ):
        assert bisect(folder, *arguments)[0] == 2
        assert message in capsys.readouterr().err
    for run, message in (
        ((), "no command to run"),
        (("python", str(folder / "train.py")), "is a file of your tree"),
        (("no-such-program",), "cannot start no-such-program"),
        (("echo", "hello"), "holds no training or validation line"),
    ):
        assert bisect(folder, good, bad, run=run)[0] == 2
        assert message in capsys.readouterr().err
    assert main(["bisect", "--good", good, "--bad", bad, "--runs-in", str(tmp_path), "--", "x"]) == 2
    assert "is not in the worktree of a git repository" in capsys.readouterr().err


def test_the_environment_that_matters_is_part_of_the_name_of_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = history(tmp_path / "repo", 2, {2: {"EPSILON": "2e-5"}})
    ends = (*hashes, "--repeats", "1")
    assert bisect(tmp_path / "repo", *ends)[1]["runs"] == 2
    monkeypatch.setenv("SOME_SHELL_VARIABLE", "1")
    assert bisect(tmp_path / "repo", *ends)[1]["runs"] == 0
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    assert bisect(tmp_path / "repo", *ends)[1]["runs"] == 2
    assert bisect(tmp_path / "repo", *ends, run=(*RUN, "--other"))[1]["runs"] == 2


def test_the_users_python_path_leads_into_each_commits_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "repo"
    moved = TRAIN.replace("import settings", "import lib.settings as settings")
    hashes = []
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "package/lib").mkdir(parents=True)
    for epsilon in ("1e-5", "2e-5"):
        text = "".join(f"{name} = {value}\n" for name, value in (SETTINGS | {"EPSILON": epsilon}).items())
        (folder / "package/lib/settings.py").write_text(text)
        hashes.append(commit(folder, epsilon, SETTINGS, moved))
    monkeypatch.setenv("PYTHONPATH", str(folder / "package"))
    code, told = bisect(folder, *hashes)
    assert (code, told["commit"]["hash"]) == (0, hashes[1])
