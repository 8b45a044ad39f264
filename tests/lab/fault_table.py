"""The table of planted faults: what the walk names for each, and its verdicts on clean pairs.

`make faults` runs this module, which starts the processes itself.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.lab import clean_pairs, command_faults, faults
from tests.lab.faults import FAULTS
from tests.lab.judged import Row, alone, judged, together
from tests.parallel.spawn import Turn

STAGES, TENSORS = 22, 20
"""The bars: right stages and right tensors."""


def planted(folder: Path, starts: dict[str, Path], turns: Sequence[Turn] = ()) -> list[Row]:
    """Run every fault; all processes of two, with those of other ``turns``, are started once.

    ``starts`` are the clean runs of one process by job; those that are missing are added.
    """
    walked = {name: fault for name, fault in FAULTS.items() if not fault.commands}
    besides, together_ = dict[str, Path](), list(turns)
    for number, (name, fault) in enumerate(walked.items(), 1):
        _say(f"{number} of {len(walked)} by the walk: {name}")
        start = starts.setdefault(fault.kind, folder / fault.kind)
        if not start.exists():
            alone(faults.job_of(None, start, start, fault.kind))
        if fault.beside:
            start = besides[name] = folder / f"{name}, clean"
            together_.append(Turn(fault.processes, faults.planted, (None, faults.clean_job_of(name, start))))
        job = faults.job_of(name, folder / name, start)
        if fault.processes == 1:
            alone(job, name)
        else:
            together_.append(Turn(fault.processes, faults.planted, (name, job)))
    _say(f"{len(together_)} jobs on two processes")
    together(together_)
    rows = {
        name: _row(name, "walk", judged(besides.get(name, starts[fault.kind]), folder / name))
        for name, fault in walked.items()
    }
    rows |= _commanded(folder / "commands")
    return [rows[name] for name in FAULTS]


def _commanded(folder: Path) -> dict[str, Row]:
    names, rows = [name for name, fault in FAULTS.items() if fault.commands], {}
    _say(f"{len(names)} faults in training")
    for number, (name, (a, b)) in enumerate(command_faults.train_all(names, folder).items(), 1):
        _say(f"{number} of {len(names)} by the commands: {name}")
        verdict, found = command_faults.judged(name, a, b, folder / f"{b.name}-reports")
        rows[name] = _row(name, f"commands; compare: {verdict}", found, verdict)
    return rows


def _row(name: str, way: str, found: command_faults.Localised, compared: str = "") -> Row:
    fault = FAULTS[name]
    where = f"{fault.kind}, {fault.processes} process{'es' if fault.processes > 1 else ''}"
    return Row(name, where, found, fault.stage, fault.tensor, way, compared)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(found: Sequence[Row]) -> tuple[str, bool]:
    """Return the table of the faults with its totals, and whether the bars are reached."""
    lines = ["| fault | in | by | verdict | stage: expected | found | tensor or field: expected | found | |"]
    lines.append("| --- " * 9 + "|")
    for row in found:
        right = "✓" if row.named == (row.stage, row.tensor) else "✗"
        stage, tensor = row.named
        cells = (row.name, row.where, row.way, row.found.verdict, row.stage, stage, row.tensor, tensor, right)
        lines.append(f"| {' | '.join(cells)} |")
    right_stages = sum(row.named[0] == row.stage for row in found)
    tensors = sum(row.named == (row.stage, row.tensor) for row in found)
    missed = sum(row.found.exit_code == 0 for row in found)
    compared = [row.compared for row in found if row.compared]
    unseen = sum(verdict in ("identical", "rounding") for verdict in compared)
    lines += ["", f"{len(found)} faults: {right_stages} stages right, {tensors} tensors or fields right."]
    lines += [f"Missed: `localise` called {missed} of {len(found)} `identical` or `rounding`."]
    lines += [f"`compare`, which has only the records and no band here, did so with {unseen} of {len(compared)}."]
    return "\n".join(lines), right_stages >= STAGES and tensors >= TENSORS


_HEAD = """# Planted faults

What `lockstep localise` names for faults planted on purpose (`tests/lab/faults.py`), and its verdicts on clean pairs.
`make faults` writes this page. *By commands*: both sides trained 5 iterations, then `lockstep compare A B` and
`lockstep localise A B` got the two run directories, with the fault in the processes of B. *By walk*: the part of
`localise` that walks over probes got those of iteration 1. Clean pairs by commands: [clean pairs](clean-pairs.md).

The two error rates stand below the tables: faults that were missed, and clean pairs that were called a `bug`. The lab
was developed against these faults and pairs: what is known at development time is no estimate of the error in the
field. The table guards what the lab can do. A first run tells more: of the last 22 faults, written down with what had
to be named before they ran, the router in low precision was missed (`rounding`) and the shared dropout streams were
named a stage late, until the walk was mended.

"""


def main() -> int:
    """Print the tables; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.fault_table", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="Also write the page.")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        starts = {kind: folder / kind for kind in faults.KINDS}
        for kind, start in starts.items():
            alone(faults.job_of(None, start, start, kind))
        found = planted(folder, starts, clean_pairs.turns(folder, starts))
        _say("clean pairs")
        clean = clean_pairs.rows(folder, {kind: starts[kind] for kind in faults.KINDS})
    parts = table(found), clean_pairs.table(clean)
    text, reached = "\n\n".join(part for part, _ in parts), all(ok for _, ok in parts)
    print(text)
    print(f"{time.perf_counter() - began:.0f} s; the bars are {'reached' if reached else 'MISSED'}")
    if options.write:
        options.write.write_text(f"{_HEAD}{text}\n")
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
