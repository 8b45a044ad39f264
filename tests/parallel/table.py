"""The table of layouts: the float64 sweep, and the lab's verdict on a BF16 run of every layout.

`make sweep` runs this module, which starts the processes itself.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.parallel import sweep, verdicts

_BEGIN, _END = "<!-- sweep -->\n", "<!-- end of sweep -->"
_COLUMNS = ("model", "layout", "gradients", "grad norm", "weights", "", "BF16 verdict")


def table(rows: Sequence[sweep.Row], found: Sequence[verdicts.Row]) -> str:
    """Return a Markdown table; a layout with dropout has no verdict."""
    verdict = {(row.kind, row.layout): row.verdict for row in found}
    lines = [f"| {' | '.join(_COLUMNS)} |", "| --- " * len(_COLUMNS) + "|"]
    lines += [
        f"| {row.kind} | {row.layout} | {row.grads:.1e} | {row.norm:.1e} | {row.weights:.1e} "
        f"| {'equal' if row.passes else 'DIFFERS'} | {verdict.get((row.kind, row.layout), '')} |"
        for row in rows
    ]
    return "\n".join(lines)


def write_into(page: Path, text: str) -> None:
    """Replace what stands between the marks of the page."""
    before, _, rest = page.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n{text}\n\n{_END}{after}")


def main() -> int:
    """Print the table; exit code 1 where a layout differs by more than rounding."""
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.table", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="Also write the table between the marks of a page.")
    options = parser.parse_args()
    rows = sweep.sweep()
    with tempfile.TemporaryDirectory() as folder:
        found = verdicts.verdicts(sweep.CASES, Path(folder))
    print(f"largest relative differences from one process, float64, limit {sweep.LIMIT:.0e}\n")
    print(table(rows, found))
    if options.write:
        write_into(options.write, table(rows, found))
    return 0 if all(row.passes for row in rows) and all(row.passes for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
