"""Two hosts on this machine: network namespaces with names and addresses of their own, joined by one link."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20).stdout


@dataclass(frozen=True)
class Host:
    """One namespace; the other hosts know it by its address only, and its own name means the loopback device."""

    name: str
    namespace: str
    device: str
    address: str
    folder: Path

    def start(self, *words: str, log: Path) -> "subprocess.Popen[bytes]":
        """Start Python with some words in this host."""
        hosts = self.folder / f"{self.name}.hosts"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n", encoding="utf-8")
        inside = ["unshare", "--uts", "--mount", "sh", "-c", _ENTER, "sh", self.name, str(hosts)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("GLOO_SOCKET_IFNAME", None)
        with log.open("wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *inside, sys.executable, *words],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def kill_all(self) -> None:
        """End all processes of this host at once, without a word."""
        pids = _ip("netns", "pids", self.namespace).split()
        if pids:
            subprocess.run(["kill", "-9", *pids], check=False, capture_output=True, timeout=20)

    def cut_off(self) -> None:
        """Take the link down: nothing arrives any more, not even that a connection is closed."""
        _ip("-n", self.namespace, "link", "set", self.device, "down")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Make two hosts for the duration of a test, which skips where the machine does not allow them."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs root, ip and unshare to make network namespaces")
    unique = os.getpid()
    hosts = [
        Host(f"host-{letter}", f"lockstep-{unique}-{letter}", f"ls{unique}{letter}", f"10.77.0.{number}", folder)
        for number, letter in ((1, "a"), (2, "b"))
    ]
    made: list[Host] = []
    try:
        for host in hosts:
            try:
                _ip("netns", "add", host.namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
            made.append(host)
        first, second = hosts
        peer = ["peer", "name", second.device, "netns", second.namespace]
        try:
            _ip("link", "add", first.device, "netns", first.namespace, "type", "veth", *peer)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"a link between network namespaces cannot be made here: {error.stderr.strip()}")
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
            for device in ("lo", host.device):
                _ip("-n", host.namespace, "link", "set", device, "up")
        yield first, second
    finally:
        for host in made:
            host.kill_all()
            _ip("netns", "del", host.namespace)
