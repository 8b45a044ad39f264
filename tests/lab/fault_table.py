"""The table of planted faults: what the walk names for each, and its verdicts on clean pairs.

`make faults` runs this module, which starts the processes itself.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.lab import clean_pairs, faults
from tests.lab.judged import Row, alone, judged, together
from tests.parallel.spawn import Turn

STAGES, TENSORS = 22, 20
"""The bars: right stages and right tensors."""


def rows(folder: Path) -> tuple[list[Row], list[Row]]:
    """Run every fault and every clean pair; processes of two are started once."""
    starts, turns = {kind: folder / kind for kind in faults.KINDS}, []
    for kind, start in starts.items():
        alone(faults.job_of(None, start, start, kind))
    turns += clean_pairs.turns(folder, starts)
    for name, fault in faults.FAULTS.items():
        job = faults.job_of(name, folder / name, starts[fault.kind])
        if fault.processes == 1:
            alone(job, name)
        else:
            turns.append(Turn(fault.processes, faults.planted, (name, job)))
    print(f"{len(turns)} pairs on two processes", flush=True)
    together(turns)
    planted = [
        Row(name, f"{fault.kind}, {fault.processes} process(es)", judged(starts[fault.kind], folder / name),
            fault.stage, fault.tensor)
        for name, fault in faults.FAULTS.items()
    ]  # fmt: skip
    return planted, clean_pairs.rows(folder, starts)


def table(planted: Sequence[Row]) -> tuple[str, bool]:
    """Return the table of the faults with its totals, and whether the bars are reached."""
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
    lines += ["", f"{len(planted)} faults: {right_stages} stages right, {tensors} tensors or fields right."]
    return "\n".join(lines), right_stages >= STAGES and tensors >= TENSORS


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
        planted, clean = rows(Path(folder))
    parts = table(planted), clean_pairs.table(clean)
    text, reached = "\n\n".join(part for part, _ in parts), all(ok for _, ok in parts)
    print(text)
    print(f"{time.perf_counter() - began:.0f} s; the bars are {'reached' if reached else 'MISSED'}")
    if options.write:
        options.write.write_text(f"{_HEAD}{text}\n")
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
