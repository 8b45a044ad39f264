"""Two hosts under torchrun: the same run as on one host, and what is said when one of them is lost."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lockstep.lab.compare import compare_paths
from lockstep.parallel import watch
from tests.parallel.hosts import ROOT, Host, two_hosts

PROMISE = 60.0  # seconds until a process that has lost another one has said so and ended
START = 120.0
JOB = (
    "3rdparty/Megatron-LM/pretrain_gpt.py --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 8 --eval-iters 1 --eval-interval 100000 "
    "--mock-data --bf16 --tokenizer-type NullTokenizer --vocab-size 1024 --lr 1e-4 --log-interval 1 --device cpu"
).split()
SHORT = ["--train-iters", "2"]
ENDLESS = ["--train-iters", "100000"]
ENDED = "its process ended without a word (killed, out of memory, or crashed)"
SILENT = f"no answer for {watch.SILENCE} seconds (its host or the network is down)"

Hosts = tuple[Host, Host]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path) as made:
        yield made


def until(holds: Callable[[], bool], seconds: float, log: Path) -> float:
    """Return the seconds until something holds."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds, log.read_text(errors="replace")
        time.sleep(0.05)
    return time.monotonic() - started


def torchrun(hosts: Hosts, folder: Path, *words: str) -> "list[subprocess.Popen[bytes]]":
    """Start one rank on each host; their logs are ``folder``/host-a.log and host-b.log."""
    common = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=t"]
    common += [f"--rdzv_endpoint={hosts[0].address}:29500"]
    started = []
    for host, conf in zip(hosts, (["--rdzv_conf=is_host=1"], []), strict=True):
        log = folder / f"{host.name}.log"
        started.append(host.start(*common, *conf, f"--local_addr={host.address}", *JOB, *words, log=log))
    return started


def ranks_of(host: Host) -> set[int]:
    """Return the process ids of the ranks, without torchrun, on a host."""
    found = set()
    pids = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, timeout=20).stdout
    for pid in pids.split():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(entry.startswith(b"LOCAL_RANK=") for entry in environment):
            found.add(int(pid))
    return found


def in_training(hosts: Hosts, folder: Path) -> "list[subprocess.Popen[bytes]]":
    started = torchrun(hosts, folder, *ENDLESS, "--run-dir", str(folder / "run"))
    log = folder / "host-a.log"
    until(lambda: "iteration        5/" in log.read_text(errors="replace"), START, log)
    return started


def ended_after(host: Host, folder: Path) -> None:
    seconds = until(lambda: not ranks_of(host), PROMISE, folder / f"{host.name}.log")
    print(f"{host.name}: its rank ended after {seconds:.1f} s")


def says(folder: Path, name: str, message: str) -> None:
    """Check the one error of a rank: no trace of Python's or of C++, apart from torchrun's own report."""
    text = (folder / f"{name}.log").read_text(errors="replace")
    assert text.count("error: ") == 1, text
    assert f"\nerror: {message}. All processes of the run end." in text, text
    assert "[rank" not in text, text
    assert "Connection closed by peer" not in text, text


def status(folder: Path) -> tuple[str, str]:
    record = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    return record["status"], record["summary"].get("error", "")


@pytest.mark.slow
def test_two_hosts_compute_what_one_host_computes(tmp_path: Path, hosts: Hosts) -> None:
    words = [*SHORT, "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    started = torchrun(hosts, tmp_path, *words, "--run-dir", str(tmp_path / "two"))
    for host, process in zip(hosts, started, strict=True):
        assert process.wait(START) == 0, (tmp_path / f"{host.name}.log").read_text(errors="replace")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *JOB, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command += ["--run-dir", str(tmp_path / "one")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=START)
    assert done.returncode == 0, done.stderr
    assert compare_paths(tmp_path / "one", tmp_path / "two").decision.verdict == "identical"


@pytest.mark.slow
def test_the_host_with_the_store_is_killed(tmp_path: Path, hosts: Hosts) -> None:
    _, survivor = in_training(hosts, tmp_path)
    hosts[0].kill_all()
    ended_after(hosts[1], tmp_path)
    says(tmp_path, "host-b", f"lost rank 0 on host-a: {ENDED}")
    assert survivor.wait(PROMISE) != 0


@pytest.mark.slow
def test_another_host_is_killed(tmp_path: Path, hosts: Hosts) -> None:
    survivor, _ = in_training(hosts, tmp_path)
    hosts[1].kill_all()
    ended_after(hosts[0], tmp_path)
    says(tmp_path, "host-a", f"lost rank 1 on host-b: {ENDED}")
    assert survivor.wait(PROMISE) != 0
    ended, error = status(tmp_path)
    assert ended == "failed"
    assert f"lost rank 1 on host-b: {ENDED}" in error


@pytest.mark.slow
def test_the_link_goes_down(tmp_path: Path, hosts: Hosts) -> None:
    started = in_training(hosts, tmp_path)
    hosts[0].cut_off()
    cut = time.monotonic()
    for host, process in zip(hosts, started, strict=True):
        assert process.wait(PROMISE - (time.monotonic() - cut)) != 0
        print(f"{host.name}: torchrun ended after {time.monotonic() - cut:.1f} s")
    says(tmp_path, "host-a", f"lost rank 1 on host-b: {SILENT}")
    says(tmp_path, "host-b", f"lost rank 0 on host-a: {SILENT}")
    assert status(tmp_path)[0] == "failed"
