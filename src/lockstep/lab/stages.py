"""The steps of a comparison before the numbers: data, initial weights, schedule."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep.lab.digits import Ruler
from lockstep.lab.point import Point
from lockstep.lab.side import Pairs, Side

State = Literal["equal", "differs", "unknown"]


@dataclass(frozen=True)
class Stage:
    """What one step found. ``first`` is the first iteration concerned, ``detail`` one clause without a full stop."""

    name: str
    state: State
    detail: str
    first: int | None = None
    evidence: list[str] = field(default_factory=list)


def both(pair: tuple[Point, Point], name: str) -> tuple[Any, Any] | None:
    """Return a number of both points, or None where one side does not tell it."""
    values = getattr(pair[0], name), getattr(pair[1], name)
    return None if values[0] is None or values[1] is None else values


def data_stage(a: Side, b: Side, pairs: Pairs, sizes: str = "") -> Stage:
    """Compare batch sizes and token hashes by iteration, then the hashes in the descriptions of the data.

    ``sizes`` says how the sizes of the iterations differ, where the sides were aligned by something else.
    """
    if sizes:
        return Stage("data", "differs", sizes, min((pair[0].iteration for pair in pairs.pairs), default=None))
    for name, spelled in (
        ("consumed_samples", "consumed samples"),
        ("global_batch_size", "global batch size"),
        ("valid_tokens", "number of tokens with a loss"),
    ):
        for pair in pairs.pairs:
            values = both(pair, name)
            if values and values[0] != values[1]:
                at = pair[0].iteration
                return Stage(
                    "data", "differs", f"the {spelled} at iteration {at} is {values[0]} against {values[1]}", at
                )
    hashed = [(pair[0].iteration, values) for pair in pairs.pairs if (values := both(pair, "batch_hash"))]
    differing = [(at, values) for at, values in hashed if values[0] != values[1]]
    if differing:
        return _other_tokens(hashed, differing)
    described = _description_difference(a.fact("data") or {}, b.fact("data") or {})
    if described:
        return Stage("data", "differs", described)
    if not hashed or len(hashed) < len(pairs.pairs):
        return Stage("data", "unknown", f"{_silent(a, b, 'batch_hash')} no token hashes")
    return Stage("data", "equal", f"the token hashes of {len(hashed)} iterations are equal")


def _other_tokens(hashed: list[tuple[int, tuple[str, str]]], differing: list[tuple[int, tuple[str, str]]]) -> Stage:
    at, (hash_a, hash_b) = differing[0]
    detail = f"the tokens of iteration {at} differ (hash {hash_a[:12]} against {hash_b[:12]})"
    if sorted(values[0] for _, values in hashed) == sorted(values[1] for _, values in hashed):
        detail += ", the same batches come in another order"
    evidence = [f"token hashes differ in {len(differing)} of {len(hashed)} iterations"]
    elsewhere = [i for i, values in hashed if values[0] == hash_b]
    if elsewhere:
        evidence.append(f"B's batch of iteration {at} is A's of iteration {elsewhere[0]}")
    return Stage("data", "differs", detail, at, evidence)


_HASH_MARKS = ("sha256", "hash", "fingerprint")


def _description_difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """Compare the hashes in the descriptions of the splits; paths may differ between machines and say nothing."""
    for split in (name for name in a if name in b):
        hashes_a, hashes_b = dict(_hashes(a[split])), dict(_hashes(b[split]))
        for key in (key for key in hashes_a if key in hashes_b):
            if hashes_a[key] != hashes_b[key]:
                return f"the {split} data differ ({key} {str(hashes_a[key])[:12]} against {str(hashes_b[key])[:12]})"
    return None


def _hashes(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _hashes(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _hashes(item, f"{path}[{position}]")
    elif any(mark in path.rpartition(".")[2] for mark in _HASH_MARKS):
        yield path, value


def init_stage(a: Side, b: Side) -> Stage:
    """Compare the fingerprints of the initial weights and name the first parameter that differs."""
    weights_a, weights_b = a.fact("initial_weights"), b.fact("initial_weights")
    if not weights_a or not weights_b:
        silent = " and ".join(side.label for side, known in ((a, weights_a), (b, weights_b)) if not known)
        return Stage("initial weights", "unknown", f"{silent} {_state(silent)} no initial weights")
    parameters_a, parameters_b = weights_a["parameters"], weights_b["parameters"]
    names = list(dict.fromkeys([*parameters_a, *parameters_b]))
    differing = [name for name in names if _identity(parameters_a, name) != _identity(parameters_b, name)]
    if differing:
        detail = _parameter_difference(differing[0], parameters_a, parameters_b)
        evidence = [f"{len(differing)} of {len(names)} parameters differ"]
        device_a, device_b = (side.fact("device").get("name") for side in (a, b))
        if device_a != device_b:
            evidence.append(f"the weights were drawn on {device_a} in A and {device_b} in B")
        return Stage("initial weights", "differs", detail, evidence=evidence)
    fingerprint_a, fingerprint_b = weights_a["fingerprint"], weights_b["fingerprint"]
    if fingerprint_a != fingerprint_b:
        detail = f"the fingerprints differ ({fingerprint_a[:12]} against {fingerprint_b[:12]})"
        return Stage("initial weights", "differs", detail)
    return Stage("initial weights", "equal", f"the fingerprints of {len(names)} parameters are equal")


def _identity(parameters: dict[str, Any], name: str) -> tuple[Any, ...] | None:
    entry = parameters.get(name)
    return None if entry is None else (entry.get("shape"), entry.get("dtype"), entry.get("sha256"))


def _parameter_difference(name: str, a: dict[str, Any], b: dict[str, Any]) -> str:
    if name not in a or name not in b:
        return f"the parameter {name} exists only in {'A' if name in a else 'B'}"
    for key in ("shape", "dtype"):
        if a[name].get(key) != b[name].get(key):
            return f"the parameter {name} has the {key} {a[name].get(key)} in A and {b[name].get(key)} in B"
    return f"the parameter {name} starts from other values (sum {a[name].get('sum')} against {b[name].get('sum')})"


def schedule_stage(pairs: Pairs, ruler: Ruler) -> Stage:
    """Compare learning rate and weight decay; ``first`` is the first iteration whose update they can change."""
    compared: set[int] = set()
    found: list[tuple[int, int, str]] = []
    for name, spelled, delay in (
        ("lr", "learning rate", 0),
        ("next_lr", "learning rate", 1),
        ("weight_decay", "weight decay", 0),
    ):
        for position, pair in enumerate(pairs.pairs):
            values = both(pair, name)
            if values is None:
                continue
            compared.add(pair[0].iteration)
            if not ruler.same_in(name, pair):
                at = pair[0].iteration + delay
                values = ruler.cut(name, values[0]), ruler.cut(name, values[1])
                text = f"the {spelled} of iteration {at} is {values[0]:.7g} against {values[1]:.7g}"
                found.append((at, _may_differ_from(pairs, position, at), text))
                break
    if found:
        _, first, detail = min(found)
        return Stage("schedule", "differs", detail, first)
    if not compared:
        return Stage("schedule", "unknown", "no learning rate is known of both sides")
    return Stage("schedule", "equal", f"the learning rates of {len(compared)} iterations are equal")


def _may_differ_from(pairs: Pairs, position: int, at: int) -> int:
    """Return the first iteration whose rate may differ where ``at`` is the first that is seen to.

    A line tells the rates of its last iteration and of the following one, not those within its window.
    """
    if position:
        return min(at, pairs.pairs[position - 1][0].iteration + 2)
    pair = pairs.pairs[0]
    return at if both(pair, "lr") and pair[0].start == pair[0].iteration else pair[0].start


def _silent(a: Side, b: Side, name: str) -> str:
    sides = [side.label for side in (a, b) if any(getattr(point, name) is None for point in side.points.values())] or [
        a.label,
        b.label,
    ]
    silent = " and ".join(sides)
    return f"{silent} {_state(silent)}"


def _state(silent: str) -> str:
    return "state" if " and " in silent else "states"
