"""Saves that are cut off: at every step of publishing, and by SIGKILL at random moments."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lockstep.training import checkpoint_files as files
from tests.parallel.spawn import free_port


def _write(root: Path, iteration: int, content: str) -> Path:
    scratch = files.scratch_dir(root, iteration)
    (scratch / "data").write_text(content)
    facts: dict[str, dict[str, Any]] = {"progress": {}, "schedules": {}, "streams": {}}
    contents = {"data": files.settle(scratch / "data")}
    files.write_json(
        scratch / files.MANIFEST,
        {"format": files.FORMAT, "iteration": iteration, "lockstep": "x", **facts, "files": contents},
    )
    return scratch


class _Killed(BaseException):
    """Stands for SIGKILL: nothing runs after it."""


@pytest.mark.parametrize("second", [2, 1], ids=["next", "replacing"])
def test_publishing_can_be_cut_off_at_any_step(second, tmp_path, monkeypatch) -> None:
    calls = {"rename": os.rename, "replace": os.replace, "fsync": os.fsync, "rmdir": os.rmdir}
    published = []
    for steps in range(50):
        root = tmp_path / str(steps)
        files.publish(root, _write(root, 1, "old"), 1)
        scratch = _write(root, second, "new")
        left = steps

        def counted(call: Any) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise _Killed
                left -= 1
                return call(*args, **kwargs)

            return wrapper

        killed = False
        with monkeypatch.context() as patch:
            for name, call in calls.items():
                patch.setattr(os, name, counted(call))
            try:
                files.publish(root, scratch, second)
            except _Killed:
                killed = True
        found = files.find(root, None)
        files.verify(found, files.read_manifest(found))
        assert (found / "data").read_text() in ("old", "new")
        files.remove_leftovers(root)
        found = files.find(root, None)
        files.verify(found, files.read_manifest(found))
        assert all(path.name.startswith("iter_") or path.is_file() for path in root.iterdir())
        published.append((found / "data").read_text())
        if not killed:
            break
    assert published[0] == "old"
    assert published[-1] == "new"
    assert published == sorted(published, reverse=True), "once the new one is found it stays found"
    assert steps >= 6


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_saves_and_ends_both_with_code_0(tmp_path) -> None:
    words = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 64 --micro-batch-size 1 "
    words += "--global-batch-size 2 --train-iters 100000 --eval-iters 0 --mock-data --tokenizer-type NullTokenizer "
    words += "--vocab-size 50 --lr 1e-3 --device cpu --log-interval 1 --exit-signal-handler --save-interval 100000"
    command = [sys.executable, "3rdparty/Megatron-LM/pretrain_gpt.py", *words.split()]
    command += ["--save", str(tmp_path / "ckpt"), "--run-dir", str(tmp_path / "run")]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port())}
    children = []
    for rank in ("0", "1"):
        output = (tmp_path / rank).open("w")
        own = {"RANK": rank, "LOCAL_RANK": rank}
        children.append(subprocess.Popen(command, env={**shared, **own}, stdout=output, stderr=output))
    try:
        give_up = time.monotonic() + 120
        while "iteration        2/" not in (tmp_path / "0").read_text():
            assert time.monotonic() < give_up, (tmp_path / "0").read_text()
            time.sleep(0.05)
        children[1].send_signal(signal.SIGTERM)
        assert [child.wait(60) for child in children] == [0, 0], (tmp_path / "1").read_text()
    finally:
        for child in children:
            child.kill()
    printed = (tmp_path / "0").read_text()
    assert "exiting program after receiving SIGTERM." in printed
    assert f"successfully saved checkpoint from iteration {files.tracked_iteration(tmp_path / 'ckpt'):7d}" in printed


@pytest.mark.parametrize(
    ("kills", "processes"),
    [(5, 1), pytest.param(20, 1, marks=pytest.mark.slow), pytest.param(20, 2, marks=pytest.mark.slow)],
)
def test_a_usable_checkpoint_remains_after_kill_9(kills, processes, tmp_path) -> None:
    command = [sys.executable, "-m", "tests.training.kill_saves", str(tmp_path), str(kills), "7", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["kills"] == kills
    assert outcome["taken"] == sorted(set(outcome["taken"])), "each run went on from what the one before had saved"
    assert outcome["while_writing"] > 0, "no kill hit a save"
