"""Choice of the device, process-wide switches for the duration of a run, and copies that nobody waits for."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from lockstep.config import ConfigContainer
from lockstep.errors import UserError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")


def choose_device(wanted: str) -> torch.device:
    """Return the device of ``run.device``: auto takes a GPU when there is one, that of LOCAL_RANK under a launcher.

    Raises:
        UserError: a GPU is asked for and PyTorch sees none, or fewer than there are processes.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("run.device=cuda, but PyTorch sees no GPU; use run.device=cpu or auto")
    if not available or wanted == "cpu":
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK") or torch.cuda.current_device())
    if number >= torch.cuda.device_count():
        raise UserError(
            f"process {number} of this host has no GPU, PyTorch sees {torch.cuda.device_count()}; "
            "start fewer with --nproc_per_node, or use run.device=cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@contextmanager
def switches(config: ConfigContainer, device: torch.device) -> Iterator[None]:
    """Hold PyTorch's global switches as the run needs them, and put them back after it.

    Raises:
        UserError: deterministic mode on a GPU without the environment that cuBLAS needs for it.
    """
    with ExitStack() as stack:
        if config.model.deterministic_mode:
            stack.enter_context(_deterministic(device))
        if config.model.disable_bf16_reduced_precision_matmul and device.type == "cuda":
            stack.enter_context(_full_bf16_reductions())
        yield


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    if device.type == "cuda" and os.environ.get(_WORKSPACE) not in _WORKSPACES:
        raise UserError(
            f"deterministic mode on a GPU needs {_WORKSPACE}={_WORKSPACES[0]} in the environment "
            f"(it is {os.environ.get(_WORKSPACE, 'unset')})"
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _full_bf16_reductions() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def is_asynchronous(device: torch.device) -> bool:
    """Tell whether a device works on what it was given while the host goes on."""
    return device.type != "cpu"


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device, without waiting for what the device does."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor on its way to the host: of what it holds where the device's work is queued now."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> torch.Tensor:
        """Wait for the copy and return it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of the device so far, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
