"""What a checkpoint holds of a run: tensors under canonical names, everything else as plain values.

Tensors are named by the full name of their parameter in the model, whatever the layout: ``model.<name>`` and
``optimizer.<kind>.<name>``, where kind is ``main`` (FP32 weights beside low-precision ones) or a state of the optimizer
such as ``exp_avg``.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

from lockstep.errors import UserError
from lockstep.models import GPTModel
from lockstep.parallel.fsdp import is_sharded, own_weights, take_weights
from lockstep.parallel.placement import Placed, Placement
from lockstep.training.checkpoint_index import Stored
from lockstep.training.optimizer import Optimizer
from lockstep.training.sharded import FullyShardedMainWeights

MODEL, OPTIMIZER = "model.", "optimizer."
_STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def model_tensors(model: GPTModel, placement: Placement) -> dict[str, Placed]:
    """Return the weights and buffers that this process has, by canonical name, in the dtype the model computes in.

    The tensors are the model's own but for those of sharded weights, which `take_model_tensors` takes back.
    """
    if is_sharded(model):
        own = own_weights(model, placement.shards_of)
        placed = {MODEL + name: placement.placed(name, *rows) for name, rows in own.items()}
        return placed | {MODEL + name: placement.placed(name, buffer) for name, buffer in model.named_buffers()}
    # state_dict waits for weights that are still on their way from other processes; named_parameters would not.
    return {MODEL + name: placement.placed(name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def take_model_tensors(model: GPTModel, tensors: Mapping[str, Placed]) -> None:
    """Give sharded weights the values of their tensors, which others share already."""
    if is_sharded(model):
        names = (name for name, _ in model.named_parameters())
        take_weights(model, {name: tensors[MODEL + name].tensor for name in names if MODEL + name in tensors})


def optimizer_tensors(optimizer: Optimizer, placement: Placement) -> dict[str, Placed]:
    """Return what this process has of main weights and optimizer state; the tensors are the optimizer's own.

    State that no step has made yet is left out.
    """
    tensors = {}
    weights = optimizer.weights
    for name, main, span in zip(weights.main_names, weights.main_params, weights.main_spans, strict=True):
        state = {kind: value for kind, value in optimizer.inner.state.get(main, {}).items() if kind in _STATES}
        if weights.copies:
            state["main"] = main
        for kind, value in state.items():
            if value is not None:
                tensors[f"{OPTIMIZER}{kind}.{name}"] = placement.placed(name, value, span)
    return tensors


def written_here(tensors: dict[str, Placed], optimizer: Optimizer, placement: Placement) -> dict[str, Placed]:
    """Return the tensors that this process saves, of those it has: together the processes save each one once."""
    weights = optimizer.weights
    chosen: dict[str, Placed] = {}
    for group, replicated in (
        (MODEL, not isinstance(weights, FullyShardedMainWeights)),
        (OPTIMIZER, not weights.sharded),
    ):
        having = {name: placed for name, placed in tensors.items() if name.startswith(group)}
        sizes = {name: placed.tensor.nbytes for name, placed in having.items()}
        names = placement.written(sizes, parameter_of, replicated=replicated)
        chosen |= {name: having[name] for name in names}
    return chosen


def parameter_of(name: str) -> str:
    """Return the parameter that a tensor of a checkpoint belongs to."""
    return name.removeprefix(MODEL) if name.startswith(MODEL) else name.removeprefix(OPTIMIZER).partition(".")[2]


def optimizer_step(optimizer: Optimizer) -> int | None:
    """Return how many updates the optimizer has made, where it counts them."""
    steps = {int(state["step"]) for state in optimizer.inner.state.values() if "step" in state}
    assert len(steps) <= 1, "all parameters are updated together"
    return steps.pop() if steps else None


def make_optimizer_state(
    optimizer: Optimizer, placement: Placement, saved: Iterable[str], step: int | None
) -> dict[str, Placed]:
    """Give the optimizer empty state of the kinds that were ``saved``, and return what has to be filled.

    ``saved`` are canonical names; ``step`` counts the updates made.

    Raises:
        UserError: a name belongs to no parameter of the model, or to a kind of state that is not known.
    """
    weights = optimizer.weights
    params = dict(zip(weights.main_names, weights.main_params, strict=True))
    for full in saved:
        kind, _, name = full.removeprefix(OPTIMIZER).partition(".")
        if (kind != "main" and kind not in _STATES) or name not in placement.shapes:
            raise UserError(f"the checkpoint holds {full}, which this run's optimizer has not; add --no-load-optim")
        if kind == "main" or name not in params:
            continue
        state = optimizer.inner.state[params[name]]
        state[kind] = torch.zeros_like(params[name])
        if step is not None:
            # Where the optimizer itself would make it: fused updates count on the device of the parameter.
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=params[name].device)
    return optimizer_tensors(optimizer, placement)


def check_tensors(wanted: Mapping[str, Placed], saved: Mapping[str, Stored], remedy: str, *, convert: bool) -> None:
    """Check that a checkpoint has every wanted tensor in its shape and, unless it may be converted, its dtype.

    Raises:
        UserError: it has not; names the first tensor that is missing or differs.
    """
    missing = [name for name in wanted if name not in saved]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the checkpoint has no tensor {missing[0]}{more}; {remedy}")
    for name, placed in wanted.items():
        for what, ours, theirs in _differences(placed, saved[name], convert):
            raise UserError(f"the checkpoint has {name} with {what} {theirs}, this run with {ours}; {remedy}")


def _differences(placed: Placed, stored: Stored, convert: bool) -> Iterator[tuple[str, object, object]]:
    if placed.shape != stored.shape:
        yield "shape", list(placed.shape), list(stored.shape)
    dtype = str(placed.tensor.dtype).removeprefix("torch.")
    if dtype != stored.dtype and not convert:
        yield "dtype", dtype, stored.dtype
