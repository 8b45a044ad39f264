"""Which of Lockstep's own kernels a run takes."""

import torch

from lockstep.config import ConfigContainer
from lockstep.models.mlp import Nonlinearity
from lockstep.models.ops import matmul_mode, runs_triton
from lockstep.training.precision import params_dtype


def describe_kernels(config: ConfigContainer, device: torch.device) -> str:
    """Name what Triton kernels compute; the rest is PyTorch's and, where layers are compiled, its compiler's."""
    dtype = params_dtype(config)
    if not runs_triton(device):
        return "none"
    low, names = dtype in (torch.bfloat16, torch.float16), []
    if low and matmul_mode(device, dtype) == "native":
        names.append("cross entropy")
    if Nonlinearity(config.model).swiglu and not config.model.add_bias_linear:
        names.append("SwiGLU")
    if low:
        names.append("large copies between dtypes")
    return f"{', '.join(names)} (Triton)" if names else "none"
