"""Runs functions on several gloo processes of this machine and returns what each of them returned."""

import contextlib
import os
import random
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_NEVER_GIVEN = (15_000, 32_000)  # Linux gives ports from 32768 on


def _worker(rank: int, job: Callable[..., Any], processes: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    results[rank] = job()
    dist.destroy_process_group()


def on_processes(job: Callable[[], Any], processes: int) -> list[Any]:
    """Return the results of a module-level function, which are plain values, in the order of the ranks."""
    with tempfile.TemporaryDirectory() as folder, mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_worker, args=(job, processes, folder, results), nprocs=processes)
        return [results[rank] for rank in range(processes)]


@dataclass(frozen=True)
class Turn:
    """A module-level function with its arguments, to be called on the first so many of the processes."""

    processes: int
    job: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


def in_turn(turns: Sequence[Turn]) -> list[list[Any]]:
    """Call functions one after another, each in the environment that a launcher makes; one spawn serves all of them.

    Returns for each turn what its processes returned or, as an exception, raised.
    """
    count = max(turn.processes for turn in turns)
    ports = [free_port() for _ in turns]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_take_turns, args=(turns, ports, results), nprocs=count)
        return [[results[n, rank] for rank in range(turn.processes)] for n, turn in enumerate(turns)]


def _take_turns(rank: int, turns: Sequence[Turn], ports: Sequence[int], results: Any) -> None:
    torch.set_num_threads(1)
    for number, (turn, port) in enumerate(zip(turns, ports, strict=True)):
        if rank >= turn.processes:
            continue
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({key: str(value) for key, value in {**where, "WORLD_SIZE": turn.processes}.items()})
        try:
            results[number, rank] = turn.job(*turn.arguments)
        except Exception as error:
            results[number, rank] = error


def free_port() -> int:
    """Return a port that nothing listens on, and that the system does not give to sockets which name none.

    A port that was free when asked for can belong to somebody's connection by the time it is used, and processes that
    meet there then wait for each other in vain.
    """
    while True:
        port = random.randrange(*_NEVER_GIVEN)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
