"""The ``inspect`` subcommand."""

import argparse
import json


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lockstep inspect``."""
    parser = subparsers.add_parser(
        "inspect", help="show what a run was and what it measured", description="Show the record of a run."
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    parser.set_defaults(func=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from lockstep.record.inspection import as_json, show
    from lockstep.record.reader import load_run

    run = load_run(arguments.run)
    if arguments.json:
        print(json.dumps(as_json(run), indent=1))
    else:
        show(run)
    return 0
