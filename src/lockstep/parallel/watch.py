"""Watch over the processes of a run: when one is lost, the others say which one, and end instead of hanging.

Every process keeps one TCP connection to the leading one (rank 0). Nothing is sent over it while all is well: the
kernels of the two hosts look after it. A process that dies closes its end at once; a host or a link that dies leaves
the kernel's keep-alive probes unanswered. A process that is only busy, in a long computation or holding the
interpreter's lock, stays connected, because its kernel answers for it; a process that is stopped or waits for something
that never comes is the matter of ``dist.distributed_timeout_minutes``.

A process that leaves says so first, with its error if it has one, so that it is not taken for lost.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol

from lockstep.errors import UserError
from lockstep.parallel.interface import interface_of

# Probes after 5 s of silence, every 5 s, five without an answer: a host is lost after half a minute. The next shorter
# thing that must not end a run is a switch that restarts its ports; the longest wait that is promised is a minute.
PROBE_EVERY = 5
PROBES = 5
SILENCE = PROBE_EVERY * (PROBES + 1)

GATHER = 0.5  # seconds in which the processes of a host that died are noticed, so that one message names them all
COURTESY = 5.0  # seconds in which a process may find for itself the error that another one has ended with
LINGER = 2.0  # seconds in which news of another process may explain an error here or a SIGTERM of the launcher
PATIENCE = 10  # seconds that torchrun has to end by itself

LOST_EXIT = 1
TERMINATED_EXIT = 128 + signal.SIGTERM

_KEY = "lockstep/watch"
_ENDED = "its process ended without a word (killed, out of memory, or crashed)"
_LONGEST = 1 << 20  # bytes of a message
_SILENT = f"no answer for {SILENCE} seconds (its host or the network is down)"


class LostProcessError(UserError):
    """Another process of the run is gone."""


class Store(Protocol):
    """What is needed of torch.distributed's store."""

    def set(self, key: str, value: str, /) -> Any:
        """Keep a value."""

    def get(self, key: str, /) -> bytes:
        """Return a value, waiting until somebody has set it."""


class _Peer:
    """One end of a connection, and the messages that come in over it: one JSON object a line."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rank = 0
        self.host = ""
        self._rest = b""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_EVERY)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
        # What was sent and not acknowledged counts as a probe without an answer.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000)

    def send(self, **message: Any) -> None:
        """Send a message; if the other end is gone, reading from it tells."""
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Wait for data and return the messages that it completes.

        Raises:
            OSError: the connection is closed or broken.
        """
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionResetError
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:
            raise ConnectionResetError
        return [json.loads(line) for line in lines]

    def receive_one(self) -> dict[str, Any]:
        """Wait for the next message and leave what may follow it for ``receive``.

        Raises:
            OSError: the connection is closed or broken, or its time is over.
        """
        line = b""
        while not line.endswith(b"\n"):
            byte = self.sock.recv(1)
            if not byte or len(line) > _LONGEST:
                raise ConnectionResetError
            line += byte
        return dict(json.loads(line))

    def local_address(self) -> str:
        """Return the address of this host that the connection goes through."""
        return str(self.sock.getsockname()[0]).removeprefix("::ffff:")


class Watch:
    """The connections of one process, and the thread that listens to them while the context is entered.

    ``hosts`` has the host name of every rank; ``interface`` is the network interface that reaches the other hosts, or
    None where that is not known or all processes are on this one. ``on_loss`` is called with the error before the
    process ends for the loss of another one.
    """

    def __init__(
        self,
        rank: int,
        hosts: list[str],
        peers: list[_Peer],
        interface: str | None,
        on_loss: Callable[[BaseException], None],
    ) -> None:
        self.rank = rank
        self.hosts = hosts
        self.interface = interface
        self._peers = peers
        self._on_loss = on_loss
        self._lost: dict[int, str] = {}
        self._failed: dict[int, str] = {}
        self._act_at: float | None = None
        self._stopped = False
        self._failing = False
        self._terminated = False
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="lockstep-watch", daemon=True)
        self._surroundings = contextlib.ExitStack()

    def __enter__(self) -> "Watch":
        self._surroundings.enter_context(_held_sigterm(self._waker))
        if self.interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
            # Gloo would take the address that the host name stands for: on many machines the loopback device.
            os.environ["GLOO_SOCKET_IFNAME"] = self.interface
            self._surroundings.callback(os.environ.pop, "GLOO_SOCKET_IFNAME", None)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError):
            # A collective that fails because of another process: the thread learns which, and ends this process.
            self._failing = True
            self._waker.send(b"\0")
            self._thread.join(LINGER)
        self._sign_off(None if error is None else f"{type(error).__name__}: {error}")
        self._stopped = True
        self._waker.send(b"\0")
        self._thread.join()
        for peer in self._peers:
            peer.sock.close()
        self._surroundings.close()
        self._wake.close()
        self._waker.close()

    def _sign_off(self, error: str | None) -> None:
        for peer in list(self._peers):
            peer.send(end=error)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            for peer in self._peers:
                selector.register(peer.sock, selectors.EVENT_READ, peer)
            while not self._stopped:
                left = None if self._act_at is None else max(0.0, self._act_at - time.monotonic())
                for key, _ in selector.select(left):
                    if key.data is None:
                        self._woken(self._wake.recv(64))
                    elif not self._heard(key.data):
                        selector.unregister(key.data.sock)
                        self._peers.remove(key.data)
                if self._act_at is not None and time.monotonic() >= self._act_at and not self._stopped:
                    self._end()

    def _act_within(self, seconds: float) -> None:
        if self._failing:
            seconds = min(seconds, GATHER)
        at = time.monotonic() + seconds
        self._act_at = at if self._act_at is None else min(self._act_at, at)

    def _woken(self, data: bytes) -> None:
        """Take note of a signal of this process, or of a failure in its main thread."""
        if signal.SIGTERM in data:
            self._terminated = True
            self._act_within(LINGER)
        elif self._failing and self._failed:
            self._act_within(0)

    def _heard(self, peer: _Peer) -> bool:
        """Take in what came over a connection; return whether to go on listening to it."""
        try:
            messages = peer.receive()
        except (ConnectionResetError, BrokenPipeError):
            self._lost[peer.rank] = _ENDED
            self._act_within(GATHER)
            return False
        except OSError:
            # No answer: it is the host, so it is all of its processes.
            there = [rank for rank, host in enumerate(self.hosts) if host == peer.host and rank != self.rank]
            self._lost.update(dict.fromkeys(there, _SILENT))
            self._act_within(GATHER)
            return False
        for message in messages:
            if "end" in message:
                if message["end"] is not None:
                    self._failed[peer.rank] = message["end"]
                    self._tell_others(peer.rank)
                    self._act_within(COURTESY)
                return False
            self._lost |= {int(rank): cause for rank, cause in message["lost"].items()}
            self._failed |= {int(rank): error for rank, error in message["failed"].items()}
            self._act_within(0 if message["final"] else COURTESY)
        return True

    def _tell_others(self, *but: int, final: bool = False) -> None:
        """Pass on what this process knows, if it leads."""
        if self.rank == 0:
            for peer in self._peers:
                if peer.rank not in but:
                    peer.send(lost=self._lost, failed=self._failed, final=final)

    def _end(self) -> None:
        """End this process because of another one, or of SIGTERM."""
        if not self._lost and not self._failed:
            self._sign_off("SIGTERM")
            _leave(TERMINATED_EXIT)
        self._tell_others(final=True)
        error = LostProcessError(describe(self.hosts, self._lost, self._failed))
        gone = {*self._lost, *self._failed}
        here = [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank] and rank not in gone]
        if self.rank == min(here, default=self.rank):
            print(f"error: {error}", file=sys.stderr, flush=True)
            if _SILENT in self._lost.values():
                _end_launcher_later()
        else:
            # The launcher ends the processes of its host as soon as one ends: let the one that speaks have spoken.
            time.sleep(GATHER)
        note = threading.Thread(target=self._on_loss, args=(error,), daemon=True)
        note.start()
        note.join(COURTESY)
        if self.rank != 0:
            self._sign_off(None)
        _leave(LOST_EXIT)


def join(
    store: Store,
    rank: int,
    size: int,
    address: str,
    seconds: float,
    on_loss: Callable[[BaseException], None] = lambda error: None,
) -> Watch:
    """Connect the processes of a run; ``address`` is the host of rank 0, and all must come within ``seconds``.

    Raises:
        UserError: processes did not come, or do not reach rank 0.
    """
    deadline = time.monotonic() + seconds
    if rank == 0:
        peers = _wait_for_all(store, size, deadline)
        hosts = [socket.gethostname(), *(peer.host for peer in peers)]
        local = next((address for peer in peers if not _is_loopback(address := peer.local_address())), None)
        for peer in peers:
            peer.send(hosts=hosts, local=local)
        return Watch(rank, hosts, peers, local and interface_of(local), on_loss)
    peer = _reach_leader(store, rank, address, seconds)
    try:
        welcome = peer.receive_one()
    except OSError as error:
        raise UserError(f"rank 0 at {address} ended, or did not answer, while the processes were meeting") from error
    peer.sock.settimeout(None)
    peer.host = welcome["hosts"][0]
    # Over the loopback device one reaches only rank 0 of one's own host, which knows how others reach this host.
    local = welcome["local"] if _is_loopback(peer.local_address()) else peer.local_address()
    return Watch(rank, welcome["hosts"], [peer], local and interface_of(local), on_loss)


def _wait_for_all(store: Store, size: int, deadline: float) -> list[_Peer]:
    """Return the connections to the ranks 1, 2, ... ``size`` - 1."""
    token = secrets.token_hex(16)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    peers: dict[int, _Peer] = {}
    with (
        socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=both) as server,
        selectors.DefaultSelector() as callers,
    ):
        store.set(_KEY, json.dumps({"port": server.getsockname()[1], "token": token}))
        callers.register(server, selectors.EVENT_READ)
        while len(peers) < size - 1:
            heard = callers.select(max(0.001, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                missing = [rank for rank in range(1, size) if rank not in peers]
                raise UserError(
                    f"{_ranks(missing)} did not reach rank 0 on {socket.gethostname()}; see the output there, and "
                    "whether a firewall is between the hosts"
                )
            for key, _ in heard:
                if key.fileobj is server:
                    caller = _Peer(server.accept()[0])
                    callers.register(caller.sock, selectors.EVENT_READ, caller)
                elif (known := _introduced(key.data, token)) is not None:
                    callers.unregister(key.data.sock)
                    if known:
                        peers[key.data.rank] = key.data
                    else:
                        key.data.sock.close()
        for key in list(callers.get_map().values()):
            if key.data is not None:
                key.data.sock.close()
    return [peers[rank] for rank in range(1, size)]


def _introduced(caller: _Peer, token: str) -> bool | None:
    """Read what came from a caller: True for a process of the run, None where the end of its words is not there yet.

    A process may be slow to say who it is; whoever else calls does not know the token.
    """
    try:
        hello = caller.receive()
        if not hello:
            return None
        known = bool(hello[0]["token"] == token)
        if known:
            caller.rank, caller.host = hello[0]["rank"], hello[0]["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return known


def _reach_leader(store: Store, rank: int, address: str, seconds: float) -> _Peer:
    meeting = json.loads(store.get(_KEY))
    host = socket.gethostname()
    try:
        # The port is open by now: only a network that lets nothing through keeps one waiting.
        sock = socket.create_connection((address, meeting["port"]), timeout=min(seconds, SILENCE))
    except OSError as error:
        raise UserError(
            f"rank {rank} on {host} does not reach rank 0 at {address}, port {meeting['port']} ({error}); the hosts of "
            "a run must reach each other on all ports"
        ) from error
    peer = _Peer(sock)
    sock.settimeout(seconds)
    peer.send(token=meeting["token"], rank=rank, host=host)
    return peer


def describe(hosts: list[str], lost: dict[int, str], failed: dict[int, str]) -> str:
    """Return one message that names who is gone and where, why, and what to do."""
    causes = lost or {rank: f"it failed with {error}" for rank, error in failed.items()}
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, cause in sorted(causes.items()):
        groups.setdefault((hosts[rank], cause), []).append(rank)
    parts = [f"{_ranks(ranks)} on {host}: {cause}" for (host, cause), ranks in groups.items()]
    return (
        f"lost {'; '.join(parts)}. All processes of the run end. See the output there; to go on from the last "
        "checkpoint, start the run again with --load (checkpoint.load)"
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def _end_launcher_later() -> None:
    """See to it that torchrun ends, too, when it has had time to do so by itself.

    On a host that is cut off from the meeting point, torchrun waits for it, holding a lock, until the kernel gives up
    the connection: a quarter of an hour in which it neither sees that its processes have ended nor heeds a signal.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    # A handle of the process, not its number, which another process may have by then.
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(os.getppid())
        command = f"import signal, time; time.sleep({PATIENCE}); signal.pidfd_send_signal({handle}, signal.SIGKILL)"
        subprocess.Popen(
            [sys.executable, "-S", "-c", command],
            pass_fds=[handle],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _leave(code: int) -> None:
    """End the process, whatever its main thread waits for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def _held_sigterm(waker: socket.socket) -> Iterator[None]:
    """Let SIGTERM wake the watch, which ends the process a little later, where it would end the process at once.

    torchrun sends it as soon as it misses another host, before anybody could say which process is lost.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    fd = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(fd)
