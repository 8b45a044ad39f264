"""The ``localise`` subcommand."""

import argparse
import contextlib
import json
import shutil
import sys
from pathlib import Path

from lockstep.errors import UserError


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lockstep localise``."""
    parser = subparsers.add_parser(
        "localise",
        help="run two sides again with probes on and name the first tensor that differs",
        description="Run both sides again at the iteration in question and walk through them in the order of "
        "execution. Exit code 0 for identical and rounding, 1 otherwise.",
    )
    parser.add_argument("a", metavar="A", help="run directory")
    parser.add_argument(
        "b",
        metavar="B",
        help="run directory, Hugging Face folder, transformers, reference; or A's own run by other code: here, "
        "commit:REV",
    )
    parser.add_argument(
        "--iteration",
        metavar="N",
        type=int,
        nargs="+",
        help="iterations to probe; the first at which the records differ, and the one before it, when unset",
    )
    parser.add_argument(
        "--from-checkpoint",
        action="store_true",
        help="begin at each run's newest checkpoint before those iterations instead of at its start",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the report; a new one under nemo_experiments/localise/ when unset"
    )
    parser.add_argument(
        "--keep-probes", action="store_true", help="keep the tensors of both sides, which can be large, in that folder"
    )
    parser.add_argument(
        "--code",
        choices=("recorded", "here"),
        default="recorded",
        help="runs of two commits are run again by a checkout of each (recorded), or both by the code that is here",
    )
    parser.add_argument("--json", action="store_true", help="print report.json instead of the walk")
    parser.set_defaults(func=_localise)


def _localise(arguments: argparse.Namespace) -> int:
    from lockstep.lab.correlate import new_folder
    from lockstep.lab.localise.code import by_their_code
    from lockstep.lab.localise.localise import localise
    from lockstep.lab.localise.report import as_json, show, write_report
    from lockstep.lab.localise.sides import COMMIT, HERE, open_sides

    sides = open_sides(arguments.a, arguments.b)
    if arguments.code == "here" and (arguments.b == HERE or arguments.b.startswith(COMMIT)):
        raise UserError(f"{arguments.b} is the run of A by other code, and --code here runs both by this; leave it out")
    folder = new_folder(Path(arguments.out) if arguments.out else None, "localise")
    output = sys.stderr if arguments.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=output, flush=True)

    with contextlib.nullcontext(sides) if arguments.code == "here" else by_their_code(*sides, say) as (a, b):
        found = localise(a, b, folder, arguments.iteration, say, checkpoints=arguments.from_checkpoint)
    page = write_report(found, folder)[-1]
    if not arguments.keep_probes:
        for side in ("a", "b"):
            shutil.rmtree(folder / side)
    if arguments.json:
        print(json.dumps(as_json(found), indent=1, allow_nan=False))
    else:
        show(found)
    say(f"report: {page}")
    return found.exit_code
