"""The watch over the processes of a run, without a process group: who is named, who is not, and how each one ends."""

import ctypes
import json
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import UserError
from lockstep.parallel import watch
from lockstep.parallel.interface import interface_of

LIMIT = 20.0  # seconds that a case may take
FOREVER = 60.0


class FolderStore:
    """A store of files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def set(self, key: str, value: str, /) -> None:
        """Keep a value."""
        path = self._folder / key.replace("/", "_")
        path.with_suffix(".new").write_text(value, encoding="utf-8")
        path.with_suffix(".new").replace(path)

    def get(self, key: str, /) -> bytes:
        """Return a value, waiting until somebody has set it."""
        path = self._folder / key.replace("/", "_")
        until(path.exists)
        return path.read_bytes()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def _process(rank: int, size: int, folder: Path, job: Callable[[int, FolderStore], None], silence: int) -> None:
    """Run a job under watch, as the doors run a training: a UserError is one message and exit code 2."""
    os.dup2(os.open(folder / f"err{rank}", os.O_CREAT | os.O_WRONLY), 2)
    watch.COURTESY = 1.0
    watch.PROBE_EVERY, watch.PROBES, watch.SILENCE = 1, silence - 1, silence
    store = FolderStore(folder)

    def on_loss(error: BaseException) -> None:
        (folder / f"loss{rank}").write_text(str(error), encoding="utf-8")

    try:
        with watch.join(store, rank, size, "127.0.0.1", LIMIT, on_loss):
            job(rank, store)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(2)


def run(
    folder: Path, size: int, job: Callable[[int, FolderStore], None], silence: int = watch.SILENCE
) -> tuple[list[int | None], list[str]]:
    """Return the exit codes of the processes of a job and what each of them wrote to stderr."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=_process, args=(rank, size, folder, job, silence)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in processes], [
            (folder / f"err{rank}").read_text(encoding="utf-8") for rank in range(size)
        ]
    finally:
        for process in processes:
            process.kill()


def _last_is_killed(rank: int, store: FolderStore) -> None:
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOREVER)


def test_a_killed_process_is_named_once_and_the_others_end(tmp_path: Path) -> None:
    codes, said = run(tmp_path, 3, _last_is_killed)
    assert codes == [1, 1, -signal.SIGKILL]
    assert said[0].startswith(f"error: lost rank 2 on {socket.gethostname()}: its process ended without a word")
    assert said[0].count("\n") == 1
    assert said[1] == ""
    assert (tmp_path / "loss0").read_text(encoding="utf-8") == said[0].removeprefix("error: ").strip()


def _leader_is_killed(rank: int, store: FolderStore) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOREVER)


def test_the_leading_process_is_named_too(tmp_path: Path) -> None:
    codes, said = run(tmp_path, 3, _leader_is_killed)
    assert codes == [-signal.SIGKILL, 1, 1]
    assert said[1].startswith(f"error: lost rank 0 on {socket.gethostname()}: its process ended without a word")
    assert said[2] == ""


def _collective_fails(rank: int, store: FolderStore) -> None:
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("Connection closed by peer [10.0.0.1]:1234")


def test_a_collective_that_fails_is_explained(tmp_path: Path) -> None:
    codes, said = run(tmp_path, 3, _collective_fails)
    assert codes == [1, 1, -signal.SIGKILL]
    assert said[0].startswith("error: lost rank 2 on")
    assert "Connection closed" not in said[0] + said[1]


def _one_finds_a_mistake(rank: int, store: FolderStore) -> None:
    if rank == 1:
        raise UserError("no such file: corpus.idx")
    time.sleep(FOREVER)


def test_an_error_of_one_process_is_not_a_loss(tmp_path: Path) -> None:
    codes, said = run(tmp_path, 3, _one_finds_a_mistake)
    assert codes == [1, 2, 1]
    assert said[1] == "error: no such file: corpus.idx\n"
    assert said[0].startswith(f"error: lost rank 1 on {socket.gethostname()}: it failed with UserError: no such file")
    assert "without a word" not in said[0]
    assert said[2] == ""


def _all_find_a_mistake(rank: int, store: FolderStore) -> None:
    time.sleep(0.1 * rank)
    raise UserError("no such file: corpus.idx")


def test_an_error_that_all_find_is_that_error(tmp_path: Path) -> None:
    codes, said = run(tmp_path, 3, _all_find_a_mistake)
    assert codes == [2, 2, 2]
    assert set(said) == {"error: no such file: corpus.idx\n"}


def _one_stays(rank: int, store: FolderStore) -> None:
    if rank == 2:
        time.sleep(1.5)
    else:
        time.sleep(0.3 * (1 - rank))


def test_processes_that_finish_are_not_missed(tmp_path: Path) -> None:
    assert run(tmp_path, 3, _one_stays) == ([0, 0, 0], ["", "", ""])


def _terminated(rank: int, store: FolderStore) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(FOREVER)


def test_sigterm_still_ends_a_process(tmp_path: Path) -> None:
    codes, said = run(tmp_path, 2, _terminated)
    assert codes == [1, watch.TERMINATED_EXIT]
    assert said[1] == ""
    assert "rank 1" in said[0]
    assert "SIGTERM" in said[0]


def _busy(rank: int, store: FolderStore) -> None:
    if rank == 1:
        ctypes.PyDLL(None).sleep(4)  # with the interpreter's lock: no thread of this process runs
    else:
        time.sleep(5)


def test_a_busy_process_is_not_lost(tmp_path: Path) -> None:
    assert run(tmp_path, 2, _busy, silence=2) == ([0, 0], ["", ""])


def test_processes_that_do_not_come_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ranks 1, 2 did not reach rank 0 on "):
        watch.join(FolderStore(tmp_path), 0, 3, "127.0.0.1", 0.2)


def test_a_leader_out_of_reach_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    store = FolderStore(tmp_path)
    store.set("lockstep/watch", json.dumps({"port": port, "token": ""}))
    with pytest.raises(UserError, match=f"does not reach rank 0 at 127.0.0.1, port {port}"):
        watch.join(store, 1, 2, "127.0.0.1", 5)


def _with_strangers(rank: int, size: int, folder: Path) -> None:
    store = FolderStore(folder)
    if rank == 1:
        port = json.loads(store.get("lockstep/watch"))["port"]
        for words in (b"GET / HTTP/1.0\n", b'{"token": "guessed", "rank": 1, "host": "other"}\n', b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(words)
    with watch.join(store, rank, size, "127.0.0.1", LIMIT) as joined:
        assert joined.hosts == [socket.gethostname()] * 2
        assert joined.interface is None


def test_strangers_are_turned_away(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    processes = [context.Process(target=_with_strangers, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
    assert [process.exitcode for process in processes] == [0, 0]


def _slow_beside_a_silent_caller(rank: int, size: int, folder: Path) -> None:
    watch.COURTESY = 0.01
    store = FolderStore(folder)
    if rank == 1:
        port = json.loads(store.get("lockstep/watch"))["port"]
        silent = socket.create_connection(("127.0.0.1", port))
        said = watch._Peer.send

        def late(self: watch._Peer, **message: Any) -> None:
            time.sleep(0.3)
            said(self, **message)

        watch._Peer.send = late  # type: ignore[method-assign]
    with watch.join(store, rank, size, "127.0.0.1", LIMIT):
        if rank == 1:
            silent.close()


def test_a_slow_process_is_waited_for(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    processes = [context.Process(target=_slow_beside_a_silent_caller, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
    assert [process.exitcode for process in processes] == [0, 0]


def test_messages_that_arrive_together_or_in_parts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        peer = watch._Peer(server.accept()[0])
        sender.sendall(b'{"a": 1}\n{"b": 2}\n{"c"')
        assert peer.receive_one() == {"a": 1}
        assert peer.receive() == [{"b": 2}]
        sender.sendall(b": 3}\n")
        assert peer.receive() == [{"c": 3}]
        peer.sock.close()


def test_a_whole_host_is_one_entry() -> None:
    said = watch.describe(["a", "a", "b", "b", "c"], {2: "gone", 3: "gone", 4: "killed"}, {})
    assert said.startswith("lost ranks 2, 3 on b: gone; rank 4 on c: killed. ")


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None
