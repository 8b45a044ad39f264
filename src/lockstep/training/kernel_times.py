"""Where the time of a step on a GPU goes: kernels by kind, and what of communication nothing else hides."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

# The first that fits a kernel's name counts.
_KINDS = {
    "communication": r"nccl",
    "attention": r"sdpa|flash_(fwd|bwd)|fmha|flash::|cudnn::fusion",
    "activation": r"^_swiglu",
    "between dtypes": r"^_put$",
    "loss": r"^_(log_sums|put_gradients)$",
    "matrix products": r"gemm|nvjet|xmma|cutlass",
    "optimizer and norms of gradients": r"multi_tensor|foreach|FusedAdam|reduce_kernel.*Norm|vector_norm",
    "copies for communication": r"split_with_sizes_copy|chunk_cat|CatArrayBatched",
    "compiled": r"^triton_",
    "memory": r"Memcpy|Memset",
}

# What the host waits for, where it asks a GPU for numbers.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")

Interval = tuple[float, float]


def profiled(job: Callable[[], object], path: Path, writes: bool) -> dict[str, float] | None:
    """Run a job once; return milliseconds of its kernels by kind, of the whole, and of what is not hidden.

    The process that ``writes`` has kernels, the host's calls and how often it waits written to a file, and gets the
    result; others None.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        job()
        if cuda:
            torch.cuda.synchronize()
    if not writes:
        return None
    averages = found.key_averages()
    tables = [averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)]
    if cuda:
        tables.insert(0, averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))
    waits = {each.key: each.count for each in averages if each.key in _WAITS or "DtoH" in each.key}
    path.write_text("\n".join([f"the host waits: {waits}", *tables]))
    with TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        found.export_chrome_trace(str(trace))
        return summary(json.loads(trace.read_text())["traceEvents"])


def summary(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return milliseconds by kind of kernel, and of the whole.

    Communication is exposed while no other kernel runs; the GPU is idle while none does.
    """
    of_kind: dict[str, list[Interval]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            of_kind[_kind(event["name"])].append((event["ts"], event["ts"] + event["dur"]))
    if not of_kind:
        return {}
    found = {kind: sum(end - begin for begin, end in runs) for kind, runs in of_kind.items()}
    everything = [run for runs in of_kind.values() for run in runs]
    others = [run for kind, runs in of_kind.items() if kind != "communication" for run in runs]
    span = max(end for _, end in everything) - min(begin for begin, _ in everything)
    busy = covered(everything)
    found |= {"exposed communication": busy - covered(others), "idle": span - busy, "whole": span}
    return {kind: round(us / 1e3, 1) for kind, us in sorted(found.items(), key=lambda pair: -pair[1])}


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), "others")


def covered(runs: list[Interval]) -> float:
    """Return how long at least one of the intervals lasts."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(runs):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
