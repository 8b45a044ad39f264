"""What surrounds a run and may explain a difference: code version, packages, device, environment variables."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lockstep.core.state import core_name, tree

PACKAGES = (
    "lockstep-lm",
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "hydra-core",
    "omegaconf",
    "tensorboard",
    "wandb",
    "triton",
    "torchao",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "nvidia-cublas-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-nccl-cu12",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
    "nvidia-nccl-cu13",
)
VARIABLES = (
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "PYTHONHASHSEED",
    "PYTHONPATH",
)
_GIT_SECONDS = 10


def code_version() -> dict[str, Any]:
    """Return ``{"commit", "dirty", "core"}`` of the checkout that Lockstep runs from; all None without one."""
    root = tree()
    if root is None:
        return {"commit": None, "dirty": None, "core": None}
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "dirty": None if status is None else bool(status), "core": core_name(root)}


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a result, Python included."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment_variables() -> dict[str, str]:
    """Return the variables among ``VARIABLES`` that are set; others, which may hold secrets, are not recorded."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def device_facts(device: str) -> dict[str, Any]:
    """Describe ``device`` (``cpu``, ``cuda`` or ``cuda:N``): name, memory in bytes, library versions, threads."""
    import torch

    facts: dict[str, Any] = {"type": torch.device(device).type, "host": platform.machine(), "system": sys.platform}
    if facts["type"] == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        return facts | {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts | {
        "name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
