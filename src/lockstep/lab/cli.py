"""The ``compare`` and ``correlate`` subcommands."""

import argparse
import json
from pathlib import Path

from lockstep.errors import UserError


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lockstep compare`` and ``lockstep correlate``."""
    compare = subparsers.add_parser(
        "compare",
        help="say whether two runs are the same run, or the first cause why not",
        description="Compare two runs and end with one verdict. Exit code 0 for identical and rounding, 1 otherwise.",
    )
    for name in ("a", "b"):
        compare.add_argument(name, metavar=name.upper(), help="run directory, or console log of one run")
    compare.add_argument(
        "--out", metavar="DIR", help="folder of the report; a new one under nemo_experiments/compare/ when unset"
    )
    compare.add_argument("--json", action="store_true", help="print report.json instead; files only with --out")
    compare.set_defaults(func=_compare)

    correlate = subparsers.add_parser(
        "correlate",
        help="run the same job through both doors and compare the runs",
        description="Run a pair, one side through each door, and compare it. Without --mlm and --bridge it is the "
        "reference pair (2 layers, hidden 256); a side that is not given is derived from the other.",
    )
    correlate.add_argument("--mlm", metavar='"FLAGS"', help="Megatron-LM flags of one side, as one argument")
    correlate.add_argument(
        "--bridge", metavar='"RECIPE OVERRIDES"', help="recipe and key=value overrides of the other, as one argument"
    )
    for option, label in (("--left", "A"), ("--right", "B")):
        correlate.add_argument(
            option,
            metavar="core=NAME",
            help=f"core of side {label}, main or dev: one job on two cores, through one door",
        )
    correlate.add_argument(
        "--out", metavar="DIR", help="new or empty folder; a new one under nemo_experiments/correlate/ when unset"
    )
    correlate.add_argument(
        "--calibrate", action="store_true", help="measure what rounding does to the pair, for the verdict"
    )
    correlate.set_defaults(func=_correlate)


def _compare(arguments: argparse.Namespace) -> int:
    from lockstep.lab.compare import compare_paths
    from lockstep.lab.report import as_json, show, write_report
    from lockstep.record.paths import PARENT, fresh_dir

    found = compare_paths(arguments.a, arguments.b)
    if arguments.json:
        print(json.dumps(as_json(found), indent=1))
    else:
        show(found)
    if arguments.out or not arguments.json:
        folder = Path(arguments.out) if arguments.out else fresh_dir(Path.cwd() / PARENT / "compare")
        report = write_report(found, folder)[-1]
        if not arguments.json:
            print(f"report: {report}")
    return found.exit_code


def _correlate(arguments: argparse.Namespace) -> int:
    from lockstep.lab.correlate import correlate

    out = Path(arguments.out) if arguments.out else None
    if arguments.left is not None or arguments.right is not None:
        from lockstep.lab.cores import correlate_cores

        if arguments.calibrate:
            raise UserError("--calibrate goes with two doors, not with two cores; run `lockstep calibrate` on a side")
        return correlate_cores(arguments.left, arguments.right, arguments.mlm, arguments.bridge, out)
    return correlate(arguments.mlm, arguments.bridge, out, arguments.calibrate)
