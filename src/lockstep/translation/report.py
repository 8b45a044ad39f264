"""What a translation did: counts and reasons for the terminal, everything for a file."""

import json
from typing import Any

from lockstep.translation.classify import CLASSES, Verdict, shown
from lockstep.translation.emit import words
from lockstep.translation.translate import REFUSED, Difference, Translation

VERSION = 1


def summary(translation: Translation) -> str:
    """Return the counts of every class, then each option that was not simply mapped, with its reason."""
    counts = translation.counts()
    lines = [" · ".join(f"{kind} {counts[kind]}" for kind in CLASSES) + f" · differing defaults {counts['differing']}"]
    for kind in ("blocking", "waived", "default"):
        lines += _section(kind, [f"{v.option.written.shown}: {v.reason}" for v in translation.of_class(kind)])
    lines += _section("differing defaults, written out", [_difference(d) for d in translation.differing])
    untrained = [f"{v.option.written.shown}: {v.reason}" for v in _untrained(translation)]
    lines += _section("mapped, but refused by Lockstep's trainer; see --waive-refused and --waive", untrained)
    lines += _section("notes", translation.notes)
    return "\n".join(lines) + "\n"


def _section(title: str, entries: list[str]) -> list[str]:
    return [f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []


def _untrained(translation: Translation) -> list[Verdict]:
    if translation.target != "lockstep":
        return []
    return [v for v in translation.of_class("mapped") if v.reason.startswith(REFUSED)]


def _difference(d: Difference) -> str:
    return f"{d.path}: {shown(d.here)} here, {shown(d.there)} there; {d.reason}"


def as_dict(translation: Translation) -> dict[str, Any]:
    """Return a translation as plain values, fit for JSON."""
    return {
        "version": VERSION,
        "target": translation.target,
        "recipe": translation.recipe,
        "counts": translation.counts(),
        "options": [_option(verdict) for verdict in translation.verdicts],
        "differing": [
            {
                "path": d.path,
                "here": _plain(d.here),
                "there": _plain(d.there),
                "written": list(d.written),
                "reason": d.reason,
            }
            for d in translation.differing
        ],
        "notes": translation.notes,
        "output": words(translation),
    }


def _option(verdict: Verdict) -> dict[str, Any]:
    written = verdict.option.written
    return {
        "option": written.flag,
        "values": list(written.values),
        "place": written.place,
        "class": verdict.kind,
        "here": {path: _plain(value) for path, value in verdict.option.sets.items()},
        "there": {key: _plain(value) for key, value in verdict.there.items()},
        "reason": verdict.reason,
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return [_plain(item) for item in value] if isinstance(value, list) else str(value)


def as_json(translation: Translation) -> str:
    """Return the text of a report file."""
    return json.dumps(as_dict(translation), indent=2) + "\n"
