"""Compilation of the layers of a model by torch.compile: when it pays, and what it works with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lockstep.config import ConfigContainer
from lockstep.models import GPTModel
from lockstep.models.decoder import Layer
from lockstep.models.mlp import MLP
from lockstep.models.ops import matmul_mode
from lockstep.training.attention import choose_attention, keeps_documents_apart
from lockstep.training.precision import params_dtype
from lockstep.training.switch import Switch, decide

# Floating-point operations of one process in a run from which compiling pays; docs/performance.md has the measurement.
PAYING_OPERATIONS = 2.5e16


def choose_compilation(config: ConfigContainer, device: torch.device, operations: float) -> Switch:
    """Return whether a run of so many floating-point operations on each process compiles its layers.

    Raises:
        UserError: compilation is asked for where it does not work.
    """
    pays = operations >= PAYING_OPERATIONS
    worth = pays, f"{'pays' if pays else 'does not pay'} for {operations:.1e} operations a process"
    return decide("run.compile", config.run.compile, "layer by layer", partial(_obstacle, config, device), worth)


def compile_blocks(model: GPTModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have layers compiled when they first run.

    A layer without experts is compiled as a whole; of one with experts attention, shared experts, activations and the
    sums over copies of a token, while routers, exchanges and grouped products stay as they are. Hooks on layers stay
    outside: what brings weights from other processes and takes gradients there. What does not become one graph is an
    error.
    """
    whole_graph = partial(torch.compile, backend=backend, fullgraph=True)
    for layer in model.decoder.layers.values():
        assert isinstance(layer, Layer), "the decoder has layers"
        if isinstance(layer.mlp, MLP):
            layer.forward = whole_graph(layer.forward, dynamic=False)  # type: ignore[method-assign]
        else:
            layer.attend = whole_graph(layer.attend, dynamic=False)  # type: ignore[method-assign]
            layer.mlp.compile(whole_graph)  # The number of rows may change from step to step.


def _obstacle(config: ConfigContainer, device: torch.device) -> str | None:
    """Return where compilation does not work, or does not help, of what is asked; None where it does."""
    model = config.model
    if device.type == "cpu":
        return "on a CPU"
    if max(model.hidden_dropout, model.attention_dropout) > 0:
        return "with dropout"
    if config.peft.scheme is not None:
        return "with adapters"
    if keeps_documents_apart(config):
        return "with documents apart"
    if matmul_mode(device, params_dtype(config)) != "native":
        return "where products are not native"
    if choose_attention(config, device).kernel == "explicit":
        return "with explicit scores"
    return None
