"""Differences of two resolved configs, and which of them can change a loss."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lockstep.config import all_fields
from lockstep.lab.dormant import reach, why_dormant
from lockstep.record.schema import encode

Role = Literal["active", "derived", "dormant", "no effect"]
ABSENT = "(absent)"
_NO_EFFECT = {
    "speed": "changes speed, not the result",
    "log": "changes what is logged or when a run stops, not the result",
    "path": "a location, not the result",
}


@dataclass(frozen=True)
class ConfigDifference:
    """One setting with another value. ``role`` says whether it acts in both runs by itself; ``reason`` why not."""

    path: str
    a: Any
    b: Any
    origin_a: str
    origin_b: str
    role: Role
    reason: str

    @property
    def reach(self) -> frozenset[str]:
        """The parts of a run it can change."""
        return reach(self.path)

    def __str__(self) -> str:
        return f"{self.path} ({show(self.a)} against {show(self.b)})"


def show(value: Any) -> str:
    """Spell a config value for a sentence."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Stated:
    """Settings of a side by dotted path, with their origins; ``partial`` where a log prints only some of them."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]
    partial: bool = False

    def left_open(self, path: str, other: "Stated") -> bool:
        """Tell whether a log leaves a setting open, or calls unset what follows from others on the other side."""
        if not self.partial or path not in self.values:
            return self.partial
        given = not other.origins.get(path, "default").startswith(("default", "derived"))
        return self.values[path] is None and not given


def config_differences(
    a: Mapping[str, Any], b: Mapping[str, Any], origins_a: Mapping[str, str], origins_b: Mapping[str, str]
) -> list[ConfigDifference]:
    """Return every setting that differs between two resolved trees (by dotted path), in the order of the tree."""
    return stated_differences(Stated(a, origins_a), Stated(b, origins_b))


def stated_differences(a: Stated, b: Stated) -> list[ConfigDifference]:
    """Return every setting that differs, in the order of the tree.

    Where a side is partial, only settings that both tell and that can change a result are compared; what it does not
    tell is taken as on the other side.
    """
    known = all_fields()
    order = {path: position for position, path in enumerate(known)}
    paths = sorted(set(a.values) | set(b.values), key=lambda path: (order.get(path, len(order)), path))
    differing: list[tuple[str, Any, Any]] = []
    for path in paths:
        if a.left_open(path, b) or b.left_open(path, a):
            continue
        if (a.partial or b.partial) and (path not in known or known[path].spec.effect != "run"):
            continue
        # A version of Lockstep without the setting behaves as its default says.
        default = encode(known[path].default) if path in known else ABSENT
        value_a, value_b = a.values.get(path, default), b.values.get(path, default)
        if value_a != value_b:
            differing.append((path, value_a, value_b))
    whole_a = {**b.values, **a.values} if a.partial else a.values
    whole_b = {**a.values, **b.values} if b.partial else b.values
    found = []
    for path, value_a, value_b in differing:
        role, reason = _role(path, whole_a, whole_b)
        origin_a, origin_b = a.origins.get(path, "default"), b.origins.get(path, "default")
        source = _source(origin_a, origin_b, [other for other, *_ in differing if other != path])
        if role == "active" and source:
            role, reason = "derived", f"follows from {source}"
        found.append(ConfigDifference(path, value_a, value_b, origin_a, origin_b, role, reason))
    return found


def _source(origin_a: str, origin_b: str, differing: list[str]) -> str | None:
    """Return the differing setting that a value was derived from on both sides: it, not this one, is the cause."""
    if not (origin_a.startswith("derived") and origin_b.startswith("derived")):
        return None
    named = set(re.findall(r"\w+\.\w+", origin_a)) & set(re.findall(r"\w+\.\w+", origin_b))
    return next((path for path in differing if path in named), None)


def _role(path: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Role, str]:
    info = all_fields().get(path)
    effect = info.spec.effect if info else "run"
    if effect != "run":
        return "no effect", _NO_EFFECT[effect]
    for name, config in (("A", a), ("B", b)):
        reason = why_dormant(path, config)
        if reason:
            return "dormant", f"does nothing in {name}: {reason}"
    return "active", ""
