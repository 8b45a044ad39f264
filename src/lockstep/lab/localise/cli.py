"""The ``localise`` subcommand."""

import argparse
import json
import shutil
import sys
from pathlib import Path


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
        "b", metavar="B", help="run directory, Hugging Face folder, or one of the words transformers and reference"
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
    parser.add_argument("--json", action="store_true", help="print report.json instead of the walk")
    parser.set_defaults(func=_localise)


def _localise(arguments: argparse.Namespace) -> int:
    from lockstep.lab.correlate import new_folder
    from lockstep.lab.localise.localise import localise
    from lockstep.lab.localise.report import as_json, show, write_report
    from lockstep.lab.localise.sides import open_sides

    sides = open_sides(arguments.a, arguments.b)
    folder = new_folder(Path(arguments.out) if arguments.out else None, "localise")
    output = sys.stderr if arguments.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=output, flush=True)

    found = localise(*sides, folder, arguments.iteration, say, checkpoints=arguments.from_checkpoint)
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
