"""When gradients are added up over the processes that have the same weights: after each micro-batch, or once a step.

Once a step costs the fewest exchanges. Whole weights always do so. With sharded weights it is a choice: gradients are
then kept whole between the micro-batches of a step, in what they are added up in, and each process otherwise keeps its
rows of them only.
"""

from dataclasses import dataclass

import torch
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.parallel import Mesh
from lockstep.parallel.fsdp import is_sharded
from lockstep.training.precision import compute_dtype

PART_OF_MEMORY = 10
"""Whole gradients may take one part in so many of a GPU's memory; measured is neither this nor another."""


@dataclass(frozen=True)
class GradientSync:
    """When gradients are added up over processes, and why."""

    once_a_step: bool
    reason: str

    def __str__(self) -> str:
        return f"{'once a step' if self.once_a_step else 'after every micro-batch'} ({self.reason})"


def choose_gradient_sync(
    config: ConfigContainer, model: nn.Module, mesh: Mesh, memory_bytes: int | None
) -> GradientSync:
    """Return when the gradients of a model that was laid out are added up, the same on all processes.

    ``memory_bytes`` is the memory of a GPU, None on CPUs.
    """
    wanted = config.run.gradient_sync
    if not is_sharded(model):
        return GradientSync(True, "weights are whole")
    if wanted != "auto":
        return GradientSync(wanted == "step", f"run.gradient_sync={wanted}")
    if memory_bytes is None:
        return GradientSync(False, "auto, on a CPU")
    needed = _whole_gradients_bytes(config, model, mesh)
    small = needed * PART_OF_MEMORY <= memory_bytes
    sizes = f"{needed / 2**30:.1f} GiB, {'at most' if small else 'more than'} a tenth of {memory_bytes / 2**30:.1f} GiB"
    return GradientSync(small, f"auto, whole gradients take {sizes}")


def _whole_gradients_bytes(config: ConfigContainer, model: nn.Module, mesh: Mesh) -> int:
    """Return the size of the gradients of the process that has most parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    dtype = compute_dtype(model)
    size = dtype.itemsize if config.ddp.grad_reduce_in_fp32 is False else max(4, dtype.itemsize)
    elements = torch.tensor(sum(p.numel() for p in trained), device=trained[0].device)
    return size * int(mesh.world.highest_(elements))


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
