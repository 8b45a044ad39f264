"""Runs a function on several gloo processes of this machine and returns what each of them returned."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


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
