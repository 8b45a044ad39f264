"""Comparing two runs: configs, data, initial weights, schedule, numbers, and the verdict over them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.lab.calibration.band import Band, load_band
from lockstep.lab.config_diff import ConfigDifference, Stated, stated_differences
from lockstep.lab.findings import Findings
from lockstep.lab.foreign.detect import Reader
from lockstep.lab.foreign.trace import Settings
from lockstep.lab.ledger import ledger_stage
from lockstep.lab.numbers import compare_numbers
from lockstep.lab.samples import by_size
from lockstep.lab.side import Side, align, load_side, ruler
from lockstep.lab.stages import Stage, data_stage, init_stage, schedule_stage
from lockstep.lab.verdict import Decision, decide

_SHOWN_KEYS = 4
_SHOWN_UNMAPPED = 12


@dataclass(frozen=True)
class Comparison:
    """The outcome: the verdict with its cause, and everything it rests on."""

    findings: Findings
    decision: Decision
    stages: list[Stage]
    notes: list[str]

    @property
    def exit_code(self) -> int:
        """0 for ``identical`` and ``rounding``, 1 for every other verdict."""
        return 0 if self.decision.verdict in ("identical", "rounding") else 1


def compare_paths(
    a: Path | str, b: Path | str, reader_a: Reader | None = None, reader_b: Reader | None = None
) -> Comparison:
    """Compare two run directories, console logs or foreign runs; the readers say how, where content does not.

    Raises:
        UserError: one of them is none of these, or is damaged.
    """
    return compare(load_side(a, "A", reader_a), load_side(b, "B", reader_b))


def compare(a: Side, b: Side, measured: tuple[Band, str] | None = None) -> Comparison:
    """Walk over both sides in the order of the verdicts and decide.

    ``measured`` is a band with the name of the run that it is of; without it that of A or B is used.
    """
    aligned = by_size(a, b)
    a, b = aligned.a, aligned.b
    pairs = align(a, b)
    band, band_of = measured or _measured(a, b)
    printed = a.printed or b.printed
    differences = None
    if a.config is not None and b.config is not None:
        differences = stated_differences(
            *(Stated(side.config or {}, side.origins, partial=side.run is None) for side in (a, b))
        )
    numbers = compare_numbers(a, b, pairs, band)
    findings = Findings(
        a=a,
        b=b,
        pairs=pairs,
        printed=printed,
        differences=differences,
        data=data_stage(a, b, pairs, aligned.sizes),
        init=init_stage(a, b),
        schedule=schedule_stage(pairs, ruler(a, b)),
        numbers=numbers,
        ledger=ledger_stage(a, b, pairs, numbers.first_outside is not None),
        band=band,
        band_of=band_of,
    )
    decision = decide(findings)
    stages = [
        _config_stage(findings),
        findings.data,
        findings.init,
        findings.schedule,
        *([findings.ledger] if findings.ledger.state != "unknown" else []),
        _numbers_stage(findings),
        _evaluations_stage(findings),
    ]
    notes = []
    if aligned.unit:
        notes.append(f"aligned by consumed {aligned.unit}, as {aligned.sizes}: iterations are those of A")
    return Comparison(findings, decision, stages, [*notes, *_notes(findings)])


def _measured(a: Side, b: Side) -> tuple[Band | None, str]:
    """Return the band of the side that has one, and the side: A where both have."""
    for side in (a, b):
        band = load_band(side.run.path) if side.run else None
        if band is not None:
            return band, side.label
    return None, ""


def _config_stage(found: Findings) -> Stage:
    if found.differences is None:
        silent = [side.label for side in (found.a, found.b) if side.config is None]
        return Stage(
            "config", "unknown", f"{' and '.join(silent)} {'state' if len(silent) > 1 else 'states'} no config"
        )
    acting = found.active
    if acting:
        keys = _list(acting)
        return Stage("config", "differs", f"{len(acting)} {'setting' if len(acting) == 1 else 'settings'}: {keys}")
    idle = f" ({len(found.differences)} differ without effect)" if found.differences else ""
    what = "both tell" if found.partial else "acts"
    return Stage("config", "equal", f"every setting that {what} is equal{idle}")


def _numbers_stage(found: Findings) -> Stage:
    name = "losses and gradient norms"
    training = [m for m in found.numbers.mismatches if m.key is None]
    missing = found.missing_text()
    if not training and not missing:
        count = len(found.numbers.rows)
        return Stage(name, "equal", f"{count} iterations are equal") if count else Stage(name, "unknown", "none")
    if training:
        detail = f"{training[0].spelled} is the first of {len(training)} numbers that differ"
        return Stage(name, "differs", detail + (f"; {missing}" if missing else ""), training[0].iteration)
    return Stage(name, "differs", missing)


def _evaluations_stage(found: Findings) -> Stage:
    numbers = found.numbers
    differing = [m for m in numbers.mismatches if m.key is not None]
    missing = found.missing_evaluations_text()
    if not differing and not missing:
        count = len(numbers.evaluations)
        return Stage("evaluations", "equal", f"{count} are equal") if count else Stage("evaluations", "unknown", "none")
    detail = f"{differing[0].spelled} differs" if differing else ""
    return Stage("evaluations", "differs", "; ".join(part for part in (detail, missing) if part))


def _notes(found: Findings) -> list[str]:
    notes = []
    for side in (found.a, found.b):
        if side.digits:
            notes.append(f"{side.label} ({side.printer}): numbers are compared to the digits it tells ({_told(side)})")
        notes += [f"{side.label}: {note}" for note in side.notes]
        if side.settings:
            notes.append(f"{side.label}: {_settings(side.settings)}")
        if not side.tells_evaluations:
            notes.append(f"{side.label} tells no evaluation: none is compared")
        if side.run and side.run.status != "finished":
            notes.append(f"{side.label} has the status {side.run.status}: it did not come to its end")
        if side.past:
            notes.append(f"{side.label} {side.past}")
    if found.band:
        notes.append(f"the band was measured on {found.band_of}: {found.band.describe()}")
        if found.pairs.pairs and found.pairs.pairs[-1][0].iteration > found.band.last:
            notes.append(f"no band was measured after iteration {found.band.last}")
    idle = [d for d in found.differences or [] if d.role != "active"]
    if idle:
        notes.append(f"settings that differ without effect: {', '.join(d.path for d in idle)}")
    ruled_out = found.ruled_out()
    if ruled_out:
        what = "cannot have caused this" if found.anchor or found.missing else "changed no number"
        notes.append(f"settings that differ but {what}: {_list(ruled_out)}")
    return notes + _surroundings(found)


def _settings(settings: Settings) -> str:
    text = f"{len(settings.values)} settings are read from its {settings.source}"
    names = list(settings.unmapped)
    if not names:
        return text
    more = f" and {len(names) - _SHOWN_UNMAPPED} more" if len(names) > _SHOWN_UNMAPPED else ""
    return f"{text}; without a counterpart in the tree: {', '.join(names[:_SHOWN_UNMAPPED])}{more}"


def _told(side: Side) -> str:
    spelled = {"lm_loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate"}
    return ", ".join(f"{what} {side.digits[name]}" for name, what in spelled.items() if name in side.digits)


def _surroundings(found: Findings) -> list[str]:
    """Name what differs around the runs: it decides nothing, and explains rounding."""
    notes: list[str] = []
    if not found.a.run or not found.b.run:
        return notes
    for entry in ("lockstep_version", "code", "packages", "device", "environment", "features"):
        a, b = found.a.fact(entry), found.b.fact(entry)
        if a == b:
            continue
        notes.append(f"{entry.replace('_', ' ')} differs: {', '.join(_apart('', a, b))}")
    return notes


def _apart(path: str, a: Any, b: Any) -> list[str]:
    """Name what differs of two facts, inside of those that hold others too."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [f"{path} {a} against {b}".strip()]
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    return [text for key in keys for text in _apart(f"{path}.{key}" if path else key, a.get(key), b.get(key))]


def _list(differences: list[ConfigDifference]) -> str:
    shown = ", ".join(str(d) for d in differences[:_SHOWN_KEYS])
    more = len(differences) - _SHOWN_KEYS
    return f"{shown} and {more} more" if more > 0 else shown
