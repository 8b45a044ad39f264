"""What a checkpoint holds of a run: tensors under canonical names, everything else as plain values.

Tensors are named by the full name of their parameter in the model, whatever the layout: ``model.<name>`` and
``optimizer.<kind>.<name>``, where kind is ``main`` (FP32 weights beside low-precision ones) or a state of the optimizer
such as ``exp_avg``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from lockstep.errors import UserError
from lockstep.training.optimizer import Optimizer

MODEL, OPTIMIZER = "model.", "optimizer."
_STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights by canonical name; the tensors are the model's own."""
    return {MODEL + name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Return main weights and optimizer state by canonical name; the tensors are the optimizer's own.

    State that no step has made yet is left out.
    """
    tensors = {f"{OPTIMIZER}main.{name}": main.detach() for name, main in _main_copies(optimizer)}
    weights = optimizer.weights
    for name, main in zip(weights.names, weights.main_params, strict=True):
        for kind, value in optimizer.inner.state.get(main, {}).items():
            if kind in _STATES and value is not None:
                tensors[f"{OPTIMIZER}{kind}.{name}"] = value
    return tensors


def optimizer_step(optimizer: Optimizer) -> int | None:
    """Return how many updates the optimizer has made, where it counts them."""
    steps = {int(state["step"]) for state in optimizer.inner.state.values() if "step" in state}
    assert len(steps) <= 1, "all parameters are updated together"
    return steps.pop() if steps else None


def make_optimizer_state(optimizer: Optimizer, names: Iterator[str], step: int | None) -> dict[str, torch.Tensor]:
    """Give the optimizer empty state for the canonical ``names``, and return what has to be filled.

    ``step`` counts the updates made.

    Raises:
        UserError: a name belongs to no parameter of the model.
    """
    weights = optimizer.weights
    params = dict(zip(weights.names, weights.main_params, strict=True))
    for full in names:
        kind, _, name = full.removeprefix(OPTIMIZER).partition(".")
        if kind == "main":
            continue
        if kind not in _STATES or name not in params:
            raise UserError(f"the checkpoint holds {full}, which this run's optimizer has not; add --no-load-optim")
        state = optimizer.inner.state[params[name]]
        state[kind] = torch.zeros_like(params[name])
        if step is not None:
            # Where the optimizer itself would make it: fused updates count on the device of the parameter.
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=params[name].device)
    return optimizer_tensors(optimizer)


@torch.no_grad()
def reload_main_weights(optimizer: Optimizer) -> None:
    """Set the main weights to the model's own, where they are copies."""
    weights = optimizer.weights
    for main, param in zip(weights.main_params, weights.model_params, strict=True):
        if main is not param:
            main.copy_(param)


def _main_copies(optimizer: Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    weights = optimizer.weights
    for name, main, param in zip(weights.names, weights.main_params, weights.model_params, strict=True):
        if main is not param:
            yield name, main


def cause(error: BaseException) -> str:
    """Return what went wrong in one line: PyTorch wraps what a rank raised, with its traceback, in another error."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    return " ".join(str(error).split()) or type(error).__name__


def describe(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return shape and dtype of each tensor, fit for JSON."""
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }


def check_tensors(wanted: dict[str, torch.Tensor], saved: dict[str, Any], remedy: str, *, convert: bool) -> None:
    """Check that a checkpoint has every wanted tensor in its shape and, unless it may be converted, its dtype.

    Raises:
        UserError: it has not; names the first tensor that is missing or differs.
    """
    described = describe(wanted)
    missing = [name for name in described if name not in saved]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the checkpoint has no tensor {missing[0]}{more}; {remedy}")
    for name, ours in described.items():
        for key in ("shape",) if convert else ("shape", "dtype"):
            if saved[name].get(key) != ours[key]:
                raise UserError(
                    f"the checkpoint has {name} with {key} {saved[name].get(key)}, this run with {ours[key]}; {remedy}"
                )
