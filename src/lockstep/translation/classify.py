"""Which class an option falls in, on its way to the other side."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lockstep.config import all_fields
from lockstep.translation.differing import effect_reason
from lockstep.translation.flags import Option

Class = Literal["mapped", "default", "waived", "blocking"]
CLASSES: tuple[Class, ...] = ("mapped", "default", "waived", "blocking")


@dataclass(frozen=True)
class Side:
    """The system that a run is translated to.

    Attributes:
        name: as users know it.
        values: its effective value for every path of the tree, where nothing is said.
        keys: the names under which it takes a path with a value; empty where it takes none.
        fixed: what it always does, by path: the value and one sentence.
    """

    name: str
    values: Mapping[str, Any]
    keys: Callable[[str, Any], tuple[str, ...]]
    fixed: Mapping[str, tuple[Any, str]]


@dataclass(frozen=True)
class Verdict:
    """An option with its class, what it becomes on the other side, and the reason."""

    option: Option
    kind: Class
    there: dict[str, Any]
    reason: str


def classify(options: Iterable[Option], side: Side, waived: Iterable[str] = ()) -> list[Verdict]:
    """Return one verdict an option; a blocking one whose name is in ``waived`` is waived."""
    names = set(waived)
    verdicts = []
    for option in options:
        verdict = _verdict(option, side)
        if verdict.kind == "blocking" and option.written.flag in names:
            verdict = Verdict(option, "waived", {}, f"waived by the user: {verdict.reason}")
        verdicts.append(verdict)
    return verdicts


def _verdict(option: Option, side: Side) -> Verdict:
    if option.inert:
        return Verdict(option, "default", {}, option.inert)
    if option.elsewhere is not None:
        entry = option.elsewhere
        if entry.default is not None and ",".join(option.written.values) == entry.default:
            return Verdict(
                option, "default", {}, f"Megatron-LM's default; {side.name} has nothing of {entry.family.name}"
            )
        return Verdict(option, entry.family.verdict, {}, f"{entry.family.name}: {entry.family.reason}")
    if not option.sets:
        return _implied(option)
    carried = {path: value for path, value in option.sets.items() if side.keys(path, value)}
    if not carried:
        return _missing(option, side)
    there = {key: value for path, value in carried.items() for key in side.keys(path, value)}
    if all(_same(side.values[path], value) for path, value in option.sets.items()):
        already = ", ".join(f"{key} = {_as_there(key, value, carried)}" for key, value in there.items())
        return Verdict(option, "default", there, f"{side.name} does so already: {already}")
    return Verdict(option, "mapped", there, "")


def _as_there(key: str, value: Any, sets: Mapping[str, Any]) -> str:
    if key == "mixed_precision":
        return next(path for path in sets).rpartition(".")[2] + "_mixed"
    return shown(value)


def _implied(option: Option) -> Verdict:
    """Return the verdict on a flag that another flag's field carries, or that only picks a kernel."""
    if option.written.flag == "--group-query-attention":
        return Verdict(option, "mapped", {}, "carried by model.num_query_groups")
    return Verdict(option, "waived", {}, effect_reason("speed"))


def _missing(option: Option, side: Side) -> Verdict:
    paths = list(option.sets)
    if all(path in side.fixed and side.fixed[path][0] in (value, ...) for path, value in option.sets.items()):
        return Verdict(option, "default", {}, side.fixed[paths[0]][1])
    if all(all_fields()[path].default == value for path, value in option.sets.items()):
        return Verdict(option, "default", {}, f"the default of both; {side.name} has no such option")
    effects = {all_fields()[path].spec.effect for path in paths}
    if "run" in effects:
        return Verdict(option, "blocking", {}, f"changes the run, and {side.name} has no counterpart")
    return Verdict(option, "waived", {}, f"{effect_reason(effects.pop())}; {side.name} has no counterpart")


def refusals(sets: Mapping[str, Any]) -> dict[str, str]:
    """Return why Lockstep's trainer refuses values, by path; empty when it takes them all."""
    found = {path: all_fields()[path] for path in sets}
    return {p: i.spec.refused for p, i in found.items() if i.spec.refused and sets[p] not in i.accepted}


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) is isinstance(other, bool)


def shown(value: Any) -> str:
    """Return a value as the other side's language spells it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
