"""The smallest change that makes a configuration fit, found by measuring."""

from collections.abc import Iterator
from dataclasses import dataclass

from lockstep.config import ConfigContainer
from lockstep.errors import ConfigError
from lockstep.plan.layouts import Changes, Layout, layout_of, layouts_for
from lockstep.plan.planner import Answer, Planner

_MOST_GPUS = 16  # times those that were asked for


@dataclass(frozen=True)
class Advice:
    """Changes, in the order of how much they intrude, and what they come to. ``gpus`` may be more than asked for."""

    changes: Changes
    gpus: int
    answer: Answer


@dataclass(frozen=True)
class _Step:
    """One change; of the steps of one kind only one is taken, later ones spare more."""

    kind: str
    changes: Changes


def advise(planner: Planner, gpus: int) -> Advice | None:
    """Return the smallest change that fits; None where nothing does on up to 16 times the GPUs.

    Changes are tried in this order, each alone and then with those before it: sharded optimizer, sequence parallelism,
    recomputation, a smaller micro-batch. Then come other layouts, with as few of these as they need, and then more
    GPUs. Every result has been measured.
    """
    asked = planner.resolved(gpus)
    steps = list(_steps(asked, gpus))
    taken: list[_Step] = []
    for step in steps:
        taken = [*(t for t in taken if t.kind != step.kind), step]
        for tried in ([step], taken):
            if _fits(planner, gpus, tried):
                return _advice(planner, gpus, _pruned(planner, gpus, tried, steps))
    times = 1
    while times <= _MOST_GPUS:
        found = _other_layout(planner, gpus * times, steps, layout_of(asked, gpus))
        if found is not None:
            return found
        times *= 2
    return None


def _steps(config: ConfigContainer, gpus: int) -> Iterator[_Step]:
    layout, model = layout_of(config, gpus), config.model
    if layout.replicas > 1 and not layout.sharded_optimizer:
        yield _Step("sharded optimizer", {"ddp.use_distributed_optimizer": True})
    if layout.tp > 1 and not layout.sequence_parallel:
        yield _Step("sequence parallelism", {"model.sequence_parallel": True})
    if model.recompute_granularity is None:
        yield _Step("recomputation", {"model.recompute_granularity": "selective"})
    if (model.recompute_granularity, model.recompute_method, model.recompute_num_layers) != ("full", "uniform", 1):
        full: Changes = {
            "model.recompute_granularity": "full",
            "model.recompute_method": "uniform",
            "model.recompute_num_layers": 1,
        }
        yield _Step("recomputation", full if not model.recompute_modules else {**full, "model.recompute_modules": None})
    micro = config.train.micro_batch_size or 1
    while micro > 1:
        micro = next(size for size in range(micro // 2, 0, -1) if micro % size == 0)
        yield _Step("micro-batch", {"train.micro_batch_size": micro})


def _other_layout(planner: Planner, gpus: int, steps: list[_Step], asked: Layout) -> Advice | None:
    """Return the layout with least model parallelism that fits with all that spares memory, and what of it it needs."""
    sparing = {step.kind: step for step in steps if step.kind in ("recomputation", "micro-batch")}
    for layout in layouts_for(gpus, asked):
        if layout.model_parallel < asked.model_parallel:
            continue
        taken = [_Step("layout", layout.changes(asked)), *sparing.values()]
        if _fits(planner, gpus, taken):
            return _advice(planner, gpus, _pruned(planner, gpus, taken, steps))
    return None


def _pruned(planner: Planner, gpus: int, taken: list[_Step], steps: list[_Step]) -> list[_Step]:
    """Drop every step that the others do without, what intrudes most first, or take a lesser one of its kind."""
    for step in reversed(taken):
        at = taken.index(step)
        before, after = taken[:at], taken[at + 1 :]
        alike = [other for other in steps if other.kind == step.kind]
        lesser = alike[: alike.index(step)] if step in alike else []
        for instead in ([], *([other] for other in lesser)):
            if _fits(planner, gpus, [*before, *instead, *after]):
                taken = [*before, *instead, *after]
                break
    return taken


def _merged(steps: list[_Step]) -> Changes:
    return {path: value for step in steps for path, value in step.changes.items()}


def _fits(planner: Planner, gpus: int, steps: list[_Step]) -> bool:
    return planner.fitting(gpus, _merged(steps)) is not None


def _advice(planner: Planner, gpus: int, steps: list[_Step]) -> Advice:
    changes = _merged(steps)
    return Advice(_differences(planner, gpus, changes), gpus, planner.ask(gpus, changes))


def _differences(planner: Planner, gpus: int, changes: Changes) -> Changes:
    """Leave out what the configuration says already."""
    try:
        asked = planner.resolved(gpus)
    except ConfigError:  # so many GPUs are possible with the changes only
        return changes
    return {path: value for path, value in changes.items() if asked.get(path) != value}
