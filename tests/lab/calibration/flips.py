"""How far apart correct BF16 runs get where a router chooses: ``python -m tests.lab.calibration.flips``.

Each row is a model; its curves start from weights moved by one ulp, with other micro-batch sizes, and on two processes.
Distances are in units of the bounds that `compare` uses where no band was measured; planted faults stand below. The
measured band is made from half of the moved weights, and judges the others.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch

from lockstep.lab.bands import loss_band, norm_band
from lockstep.lab.calibration.band import FACTOR, Band, Curve, measure
from lockstep.lab.calibration.worker import Job, train
from lockstep.lab.localise.worker import config_of
from lockstep.parallel import start_processes
from tests.lab.calibration.rates import ITERATIONS, curve, outside
from tests.lab.faults import FAULTS, LLAMA, config
from tests.parallel.spawn import Turn, in_turn

SEEDS = range(1, 9)
DENSE: dict[str, Any] = {
    **LLAMA,
    "mixed_precision.bf16": True,
    "model.num_layers": 3,
    "model.init_method_std": 0.1,
}
EXPERTS: dict[str, Any] = {
    **DENSE,
    "model.num_moe_experts": 8,
    "model.moe_router_topk": 2,
    "model.moe_ffn_hidden_size": 32,
    "model.moe_router_load_balancing_type": ["aux_loss"],
    "model.moe_aux_loss_coeff": [0.01],
    "model.moe_token_dispatcher_type": "alltoall",
}
LARGE, FAST = {"model.init_method_std": 0.3}, {"optimizer.lr": 1e-2}
MODELS: dict[str, dict[str, Any]] = {
    "no experts": DENSE,
    "no experts, large weights": {**DENSE, **LARGE},
    "8 experts, top 2": EXPERTS,
    "8 experts, top 1": {**EXPERTS, "model.moe_router_topk": 1, "model.moe_router_pre_softmax": True},
    "8 experts, top 2, capacity 1": {**EXPERTS, "model.moe_expert_capacity_factor": 1.0},
    "8 experts, top 2, small weights": {**EXPERTS, "model.init_method_std": 0.02},
    "8 experts, top 2, large weights": {**EXPERTS, **LARGE},
    "8 experts, top 2, high rate": {**EXPERTS, **FAST},
    "8 experts, top 2, 4 times the tokens": {**EXPERTS, **LARGE, "train.global_batch_size": 16},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "EP2": {"model.expert_model_parallel_size": 2},
    "TP2": {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
    "TP2, ETP1": {
        "model.tensor_model_parallel_size": 2,
        "model.sequence_parallel": True,
        "model.expert_tensor_parallel_size": 1,
        "model.expert_model_parallel_size": 2,
    },
    "CP2": {"model.context_parallel_size": 2},
}


def ratios(a: Curve, b: Curve) -> Iterator[tuple[float, float]]:
    """Yield by iteration how many times the unmeasured bounds the losses and the gradient norms are apart."""
    for iteration, values in a.items():
        loss, norm = values["lm_loss"], values["grad_norm"]
        others = b[iteration]["lm_loss"], b[iteration]["grad_norm"]
        assert loss is not None
        assert norm is not None
        assert others[0] is not None
        assert others[1] is not None
        yield (abs(loss - others[0]) / loss_band(loss, others[0]), abs(norm - others[1]) / norm_band(norm, others[1]))


def on_two(changes: dict[str, Any]) -> Curve:
    """Return the curve of a run on two processes; this is one of them."""
    tree = config({**changes, "train.train_iters": ITERATIONS}, 2)
    settings = config_of(tree)
    with start_processes(settings, torch.device("cpu")) as mesh:
        lines = train(settings, torch.device("cpu"), mesh, Job("", tree, ITERATIONS, ""))
    return {line["iteration"]: line for line in lines}


def row(title: str, base: Curve, others: list[Curve], band: Band) -> None:
    """Print how far others get from a base, at the first iteration and at any, and how many leave which bounds."""
    found = [list(ratios(base, other)) for other in others]
    first = [max(steps[0][part] for steps in found) for part in (0, 1)]
    widest = [max(step[part] for steps in found for step in steps) for part in (0, 1)]
    unmeasured = sum(any(max(step) > 1 for step in steps) for steps in found)
    measured = sum(outside(base, other, band) for other in others)
    numbers = "   ".join(f"{one:6.2f} {other:7.2f}" for one, other in (first, widest))
    print(f"{title:40} {len(others):3} {unmeasured:6} {measured:9}   {numbers}", flush=True)


def quiet(changes: dict[str, Any]) -> Curve:
    """Do the same as `on_two`, without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        return on_two(changes)


def main() -> None:
    """Print a row for every model, layout and fault."""
    print(f"{'':47}outside          iteration 1        any iteration")
    print(f"{'':40} of  unmeasured measured    loss    norm     loss    norm")
    bases: dict[str, tuple[Curve, Band]] = {}
    for title, changes in MODELS.items():
        base = curve(changes)
        seeds = [curve(changes, seed) for seed in SEEDS]
        band = Band(measure(base, seeds[: len(seeds) // 2]), FACTOR, [], True)
        sizes = [curve({**changes, "train.micro_batch_size": size}) for size in (2, 4)]
        row(title, base, seeds[len(seeds) // 2 :] + sizes, band)
        bases[title] = base, band
    for title in ("no experts", "8 experts, top 2", "8 experts, top 2, large weights"):
        layouts = {name: {**MODELS[title], **layout} for name, layout in LAYOUTS.items()}
        if title == "no experts":
            layouts = {name: layouts[name] for name in ("TP2", "CP2")}
        turns = [Turn(2, quiet, (changes,)) for changes in layouts.values()]
        for name, (found, _) in zip(layouts, in_turn(turns), strict=True):
            if isinstance(found, Exception):
                raise found
            row(f"{title}, {name}", bases[title][0], [found], bases[title][1])
    base, band = bases["8 experts, top 2"]
    for name, fault in FAULTS.items():
        if fault.processes == 1:
            with fault.plant():
                row(f"fault: {name}", base, [curve({**EXPERTS, **fault.layout})], band)


if __name__ == "__main__":
    main()
