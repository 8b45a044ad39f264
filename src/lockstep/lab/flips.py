"""Choices that rounding can flip: where a run has some, no bound that nobody measured tells rounding from a bug."""

import shlex

from lockstep.lab.config_diff import show
from lockstep.lab.findings import Findings
from lockstep.lab.numbers import NORM, Mismatch
from lockstep.lab.side import Side

LOSSES, FIRST_NORM, NORMS = 16.0, 32.0, 256.0
"""So many times the unmeasured bounds flips can take losses, the gradient norm before any update, and norms after it.

Each is about twice the widest that was measured; docs/verdicts.md has the figures.
"""

_LOW = {"mixed_precision.bf16": "BF16", "mixed_precision.fp16": "FP16"}
_LAYOUT = (
    "model.tensor_model_parallel_size",
    "model.sequence_parallel",
    "model.context_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.expert_model_parallel_size",
    "model.expert_tensor_parallel_size",
    "model.moe_token_dispatcher_type",
    "train.micro_batch_size",
)
"""Settings in which two layouts of one job differ; `lockstep calibrate --layout` takes them."""


def chooser(side: Side) -> str | None:
    """Say what in a run chooses by numbers that low precision rounds; None for nothing."""
    config = side.config or {}
    low = next((name for path, name in _LOW.items() if config.get(path)), None)
    if low is None or not config.get("model.num_moe_experts"):
        return None
    return f"a router chooses experts by numbers rounded to {low}"


def may_be_flips(found: Findings) -> str | None:
    """Say what chooses, where every number outside the bounds lies within what a flipped choice explains."""
    said = chooser(found.a) or chooser(found.b)
    return said if said and found.ledger.state != "differs" and beyond_flips(found) is None else None


def beyond_flips(found: Findings) -> Mismatch | None:
    """Return the first number outside a measured band, or further off than flips take it."""
    outside = [m for m in found.numbers.mismatches if m.grade == "outside"]
    return next((m for m in outside if m.measured or not m.size <= reach(found, m) * m.unmeasured_band), None)


def reach(found: Findings, m: Mismatch) -> float:
    """Return how many times its unmeasured bound flips can take a number; 1 where nothing flips."""
    if not (chooser(found.a) or chooser(found.b)):
        return 1.0
    if m.what != NORM:
        return LOSSES
    return FIRST_NORM if m.iteration == found.a.first else NORMS


def command(found: Findings) -> str:
    """Return the command that measures the band of A, with the layout of B where that is another."""
    words = ["lockstep", "calibrate", str(found.a.path)]
    differing = {d.path: d for d in found.differences or []}
    layout = [f"{path}={show(differing[path].b)}" for path in _LAYOUT if path in differing]
    processes = [_processes(side) for side in (found.a, found.b)]
    if None not in processes and (layout or processes[0] != processes[1]):
        layout.append(f"processes={processes[1]}")
    return shlex.join([*words, "--layout", " ".join(layout)] if layout else words)


def _processes(side: Side) -> int | None:
    layout = (side.fact("features") or {}).get("layout") or {}
    return int(layout["processes"]) if "processes" in layout else None
