"""Clean pairs: layouts, precisions, repeats and other decoders, none of which may be given a cause."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.lab.localise.foreign import from_conversion
from lockstep.lab.localise.localise import Localised, judge
from lockstep.lab.localise.probes import load_probes
from lockstep.lab.localise.reference import ReferenceDecoder
from lockstep.lab.localise.replay import Decoder, replay
from lockstep.lab.localise.worker import RUN, Job
from tests.lab import faults
from tests.lab.judged import Row, alone, as_pass, judged
from tests.parallel.spawn import Turn

CLEAN = 40
"""The bar: so many clean pairs without a false ``bug``."""

BF16 = {"mixed_precision.bf16": True}
RECOMPUTED = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}
ALONE: dict[str, dict[str, Any]] = {
    "again": {},
    "BF16": BF16,
    "FP16": {"mixed_precision.fp16": True},
    "recomputation": RECOMPUTED,
    "recomputation, BF16": {**RECOMPUTED, **BF16},
}


def _against(decoder: str, start: Path, folder: Path) -> Localised:
    run = load_probes(start, RUN)
    model = run.facts["config"]["model"]
    other: Decoder = ReferenceDecoder(model) if decoder == "reference" else from_conversion(model, folder)
    replay(other, run, [1], folder)
    return judge((as_pass("A", start), as_pass("B", folder, foreign=True)), [1])


def turns(folder: Path, starts: Mapping[str, Path]) -> list[Turn]:
    """Return the jobs on two processes."""
    found = []
    for kind, start in starts.items():
        for name, layout, precision in _layouts():
            tree = faults.config({**faults.KINDS[kind], **layout, **precision}, 2)
            found.append(Turn(2, faults.planted, (None, Job(tree, [1], str(folder / f"{kind}-{name}"), str(start)))))
    return found


def _layouts() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    precisions: tuple[tuple[str, dict[str, Any]], ...] = (("", {}), (", BF16", BF16))
    return [
        (name + suffix, layout, precision)
        for name, layout in faults.LAYOUTS.items()
        for suffix, precision in precisions
    ]


def rows(folder: Path, starts: Mapping[str, Path]) -> list[Row]:
    """Judge every clean pair; the jobs of ``turns`` are done."""
    found = [
        Row(name, kind, judged(start, folder / f"{kind}-{name}"))
        for kind, start in starts.items()
        for name, _, _ in _layouts()
    ]
    for kind, start in starts.items():
        for name, changes in ALONE.items():
            where = folder / f"{kind}-{name}"
            tree = faults.config({**faults.KINDS[kind], **changes})
            alone(replace(faults.job_of(None, where, start, kind), config=tree))
            found.append(Row(name, kind, judged(start, where)))
        for decoder in ("reference", "transformers"):
            found.append(Row(decoder, kind, _against(decoder, start, folder / f"{kind}-{decoder}")))
    return found


def names() -> list[tuple[str, str]]:
    """Return name and kind of model of all pairs, in the order of the table."""
    others = [*ALONE, "reference", "transformers"]
    return [(name, kind) for kind in faults.KINDS for name, _, _ in _layouts()] + [
        (name, kind) for kind in faults.KINDS for name in others
    ]


def table(found: Sequence[Row]) -> tuple[str, bool]:
    """Return the table with its totals, and whether the bar is reached."""
    # A clean pair may not be given a cause of any kind, which is more than no `bug`.
    false = [row for row in found if row.found.verdict not in ("identical", "rounding")]
    lines = ["| clean pair | model | verdict |", "| --- | --- | --- |"]
    lines += [f"| {row.name} | {row.where} | {row.found.verdict} |" for row in found]
    bugs = sum(row.found.verdict == "bug" for row in found)
    lines += ["", f"{len(found)} clean pairs: {bugs} false `bug`, {len(false)} neither `identical` nor `rounding`."]
    return "\n".join(lines), len(found) >= CLEAN and not bugs
