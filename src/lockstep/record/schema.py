"""What ``run.json`` and ``metrics.jsonl`` hold, version 2, and how values become JSON without losing a digit."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SCHEMA = 2

READABLE = (1, 2)
"""The schemas that are read; version 2 added the ledger."""

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"

Status = Literal["running", "finished", "failed"]
STATUSES: tuple[str, ...] = ("running", "finished", "failed")
DOORS: tuple[str, ...] = ("megatron_lm", "bridge", "python")

FACTS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "lockstep_version": str,
    "door": str,
    "command": dict,
    "name": str,
    "started": str,
    "finished": (str, type(None)),
    "status": str,
    "code": dict,
    "packages": dict,
    "device": dict,
    "environment": dict,
    "config": dict,
    "origins": dict,
    "seeds": dict,
    "data": dict,
    "initial_weights": (dict, type(None)),
    "features": dict,
    "summary": dict,
    "resumed_from": dict,
    "base": dict,
}
"""The entries of ``run.json`` and their JSON types; all but ``OPTIONAL`` ones are present in a finished record."""

OPTIONAL = ("resumed_from", "base")
"""Entries that only some runs have: the checkpoint, iteration and run directory that a run continued from."""


@dataclass(frozen=True, kw_only=True)
class TrainLine:
    """One training iteration. Losses are in nats per token; a value that a run does not know is None.

    Attributes:
        lr: learning rate this iteration's update used; ``next_lr`` is the one the console line prints.
        grad_norm: L2 norm before clipping.
        consumed_samples: samples taken by all iterations so far, this one included.
        batch_hash: hash of the global batch's token ids.
        skipped: no update was made (overflow under FP16).
        seconds: from where the iteration began, or the results of the one before were known if that was later, to where
            its own were known; evaluations and saves do not count.
        memory_bytes: peak memory of the device, or of the process on a CPU.
        router_losses: losses that routers of experts add, by name; left out of the line where there are none.
        ledger: what the sums are made of, by micro-batch and kind of parameter (``training.step.Ledger``, and
            ``hashes`` of the token ids); left out where it is not known.
    """

    iteration: int
    lm_loss: float | None
    grad_norm: float | None = None
    lr: float | None = None
    next_lr: float | None = None
    weight_decay: float | None = None
    loss_scale: float | None = None
    consumed_samples: int | None = None
    global_batch_size: int | None = None
    valid_tokens: int | None = None
    batch_hash: str | None = None
    skipped: bool = False
    seconds: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None
    router_losses: dict[str, float] | None = None
    ledger: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationLine:
    """One evaluation; ``final`` marks those after training. ``lm_loss`` is in nats per token."""

    iteration: int
    split: str
    final: bool
    lm_loss: float | None
    ppl: float | None = None
    samples: int | None = None


OPTIONAL_KEYS = ("router_losses", "ledger")
"""Keys that only some runs' lines have; a reader must do without them."""

LINES: dict[str, type[TrainLine] | type[EvaluationLine]] = {"train": TrainLine, "evaluation": EvaluationLine}


def shape_problem(facts: dict[str, Any]) -> str | None:
    """Return what is wrong with the entries of a record that have an inner shape, or None."""
    for name, known in (("door", DOORS), ("status", STATUSES)):
        if facts[name] not in known:
            return f"{name} is {facts[name]!r}, not one of {', '.join(known)}"
    if not all(isinstance(keys, dict) for keys in facts["config"].values()):
        return "config is not a mapping of sections"
    weights = facts["initial_weights"]
    if weights is not None and not (
        isinstance(weights.get("fingerprint"), str) and isinstance(weights.get("parameters"), dict)
    ):
        return "initial_weights lacks its fingerprint or its parameters"
    return None


def encode(value: Any) -> Any:
    """Return ``value`` as plain JSON values: floats keep every digit, NaN and infinities become strings."""
    if isinstance(value, bool) or value is None or isinstance(value, int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [encode(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return encode(dataclasses.asdict(value))
    if hasattr(value, "item"):
        return encode(value.item())
    return str(value)


def decode_number(value: Any) -> Any:
    """Undo ``encode`` for a number: the strings ``nan``, ``inf`` and ``-inf`` become floats."""
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else value


def decode_numbers(value: Any) -> Any:
    """Undo ``encode`` for a number, or for mappings and lists of them."""
    if isinstance(value, dict):
        return {name: decode_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [decode_number(item) for item in value]
    return decode_number(value)
