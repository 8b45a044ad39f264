"""A run names the kernels of Lockstep's own that it takes."""

import pytest
import torch

from lockstep.config import ConfigContainer
from lockstep.training.kernels import describe_kernels

GPU = torch.device("meta")  # which stands for a GPU


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "cross entropy, large copies between dtypes (Triton)"),
        ({"swiglu": True}, "cross entropy, SwiGLU, large copies between dtypes (Triton)"),
        ({"swiglu": True, "bias": True}, "cross entropy, large copies between dtypes (Triton)"),
        ({"bf16": False, "swiglu": True}, "SwiGLU (Triton)"),
        ({"bf16": False}, "none"),
    ],
)
def test_what_is_taken_is_named(monkeypatch, changes, named) -> None:
    config = ConfigContainer()
    config.mixed_precision.bf16 = changes.get("bf16", True)
    config.model.add_bias_linear = changes.get("bias", False)
    config.model.gated_linear_unit = changes.get("swiglu", False)
    config.model.activation_func = "silu" if changes.get("swiglu") else "gelu"
    assert describe_kernels(config, torch.device("cpu")) == "none"
    monkeypatch.setattr("lockstep.training.kernels.runs_triton", lambda device: True)
    assert describe_kernels(config, GPU) == named
