"""The table of planted faults: what the walk names for each, and its verdicts on clean pairs.

`make faults` runs this module, which starts the processes itself.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lockstep.lab.localise.foreign import from_conversion
from lockstep.lab.localise.localise import Localised, judge
from lockstep.lab.localise.probes import load_probes
from lockstep.lab.localise.reference import ReferenceDecoder
from lockstep.lab.localise.replay import Decoder, replay
from lockstep.lab.localise.walk import Pass
from lockstep.lab.localise.worker import RUN, TWIN, Job
from tests.lab import faults
from tests.parallel.spawn import Turn, in_turn

STAGES, TENSORS, CLEAN = 22, 20, 40
"""The bars: right stages, right tensors, and clean pairs without a false ``bug``."""

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


@dataclass(frozen=True)
class Row:
    """What one pair gave: of a planted fault where ``stage`` is expected, else of a clean pair."""

    name: str
    where: str
    found: Localised
    stage: str = ""
    tensor: str = ""

    @property
    def named(self) -> tuple[str, str]:
        """The stage and the tensor that the walk stops at."""
        first = self.found.walked.first
        return ("", "") if first is None else (first.stage, first.name)


def _pass(label: str, folder: Path, foreign: bool = False) -> Pass:
    return Pass(label, folder.name, load_probes(folder, RUN), load_probes(folder, TWIN), foreign=foreign)


def _alone(job: Job, name: str | None = None) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        if faults.planted(name, job):
            raise RuntimeError(f"{name or 'clean run'}: probing failed")


def _together(turns: Sequence[Turn]) -> None:
    for turn, results in zip(turns, in_turn(turns), strict=True):
        if results != [0] * turn.processes:
            raise RuntimeError(f"{turn.arguments[0] or turn.arguments[1].config['model']}: {results}")


def _against(decoder: str, start: Path, folder: Path) -> Localised:
    run = load_probes(start, RUN)
    model = run.facts["config"]["model"]
    other: Decoder = ReferenceDecoder(model) if decoder == "reference" else from_conversion(model, folder)
    replay(other, run, [1], folder)
    return judge((_pass("A", start), _pass("B", folder, foreign=True)), [1])


def rows(folder: Path) -> list[Row]:
    """Run every fault and every clean pair; processes of two are started once."""
    starts, jobs, turns = {kind: folder / kind for kind in faults.KINDS}, {}, []
    for kind, start in starts.items():
        _alone(faults.job_of(None, start, start, kind))
        for name, layout in faults.LAYOUTS.items():
            for suffix, precision in (("", {}), (", BF16", BF16)):
                tree = faults.config({**faults.KINDS[kind], **layout, **precision}, 2)
                where = folder / f"{kind}-{name}{suffix}"
                jobs[kind, name + suffix] = where
                turns.append(Turn(2, faults.planted, (None, Job(tree, [1], str(where), str(start)))))
    for name, fault in faults.FAULTS.items():
        job = faults.job_of(name, folder / name, starts[fault.kind])
        if fault.processes == 1:
            _alone(job, name)
        else:
            turns.append(Turn(fault.processes, faults.planted, (name, job)))
    print(f"{len(turns)} pairs on two processes", flush=True)
    _together(turns)
    found = [
        Row(name, f"{fault.kind}, {fault.processes} process(es)", _judged(starts[fault.kind], folder / name),
            fault.stage, fault.tensor)
        for name, fault in faults.FAULTS.items()
    ]  # fmt: skip
    found += [Row(name, kind, _judged(starts[kind], where)) for (kind, name), where in jobs.items()]
    for kind, start in starts.items():
        for name, changes in ALONE.items():
            where = folder / f"{kind}-{name}"
            tree = faults.config({**faults.KINDS[kind], **changes})
            _alone(replace(faults.job_of(None, where, start, kind), config=tree))
            found.append(Row(name, kind, _judged(start, where)))
        for decoder in ("reference", "transformers"):
            found.append(Row(decoder, kind, _against(decoder, start, folder / f"{kind}-{decoder}")))
    return found


def _judged(a: Path, b: Path) -> Localised:
    return judge((_pass("A", a), _pass("B", b)), [1])


def table(found: Sequence[Row]) -> tuple[str, bool]:
    """Return the page's tables with their totals, and whether every bar is reached."""
    planted, clean = [row for row in found if row.stage], [row for row in found if not row.stage]
    lines = [
        "| fault | in | verdict | stage: found | expected | tensor or field: found | expected | |",
        "| --- " * 8 + "|",
    ]
    for row in planted:
        right = "✓" if row.named == (row.stage, row.tensor) else "✗"
        stage, tensor = row.named
        cells = (row.name, row.where, row.found.verdict, stage, row.stage, tensor, row.tensor, right)
        lines.append(f"| {' | '.join(cells)} |")
    right_stages = sum(row.named[0] == row.stage for row in planted)
    tensors = sum(row.named == (row.stage, row.tensor) for row in planted)
    # A clean pair may not be given a cause of any kind, which is more than no `bug`.
    false = [row for row in clean if row.found.verdict not in ("identical", "rounding")]
    lines += ["", f"{len(planted)} faults: {right_stages} stages right, {tensors} tensors or fields right.", ""]
    lines += ["| clean pair | model | verdict |", "| --- | --- | --- |"]
    lines += [f"| {row.name} | {row.where} | {row.found.verdict} |" for row in clean]
    bugs = sum(row.found.verdict == "bug" for row in clean)
    lines += ["", f"{len(clean)} clean pairs: {bugs} false `bug`, {len(false)} neither `identical` nor `rounding`."]
    return "\n".join(lines), right_stages >= STAGES and tensors >= TENSORS and len(clean) >= CLEAN and not bugs


_HEAD = """# Planted faults

What the walk of `lockstep localise` names for faults planted on purpose (`tests/lab/faults.py`), and its verdicts on
clean pairs. `make faults` writes this page. The walk is called on the probes of iteration 1, without the command around
it. It was developed against most of these faults, so the table guards what it can do and is no rate of error.

"""


def main() -> int:
    """Print the tables; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.fault_table", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="Also write the page.")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        text, reached = table(rows(Path(folder)))
    print(text)
    print(f"{time.perf_counter() - began:.0f} s; the bars are {'reached' if reached else 'MISSED'}")
    if options.write:
        options.write.write_text(f"{_HEAD}{text}\n")
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
