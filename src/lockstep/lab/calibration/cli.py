"""The ``calibrate`` subcommand."""

import argparse
import shlex


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lockstep calibrate``."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure what rounding does to a run, for the verdicts about it",
        description="Run a recorded run again, a few times and in short: as it is, from weights moved by one ulp, in "
        "float32, and in other layouts where asked. The band of its losses and gradient norms goes beside its record.",
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="runs from moved weights (4)")
    parser.add_argument("--iterations", type=int, metavar="N", help="iterations of each; all, but at most 100")
    parser.add_argument(
        "--layout", action="append", default=[], metavar='"KEY=VALUE ..."', help="a further run with these settings"
    )
    parser.set_defaults(func=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from lockstep.lab.calibration.calibrate import calibrate

    def say(line: str) -> None:
        print(line, flush=True)

    calibrate(arguments.run, say, seeds=arguments.seeds, iterations=arguments.iterations, layouts=arguments.layout)
    say(f"Next: `lockstep compare {shlex.quote(arguments.run)} OTHER` judges by this band.")
    return 0
