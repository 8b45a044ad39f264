"""The ``compare`` and ``correlate`` subcommands."""

import argparse
import json
from pathlib import Path

from lockstep.errors import UserError


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lockstep compare`` and ``lockstep correlate``."""
    _register_compare(subparsers)
    _register_correlate(subparsers)


def _register_compare(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compare = subparsers.add_parser(
        "compare",
        help="say whether two runs are the same run, or the first cause why not",
        description="Compare two runs and end with one verdict. Exit code 0 for identical and rounding, 1 otherwise.",
    )
    for name in ("a", "b"):
        compare.add_argument(name, metavar=name.upper(), help="run directory, console log, or another trainer's files")
    compare.add_argument(
        "--format",
        action="append",
        default=[],
        metavar="[A:|B:]NAME",
        help="format of a side where its content does not tell: megatron-lm, megatron-bridge, torchtitan, olmo-core, "
        "hugging-face, tensorboard, csv or jsonl",
    )
    compare.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="[A:|B:]loss=NAME,...",
        help="columns or TensorBoard tags of a side: loss, iteration, grad_norm, lr, next_lr, consumed_samples, "
        "consumed_tokens, evaluation; from=0 where it counts from 0, average=true where losses are means since the "
        "line before",
    )
    compare.add_argument(
        "--interval",
        action="append",
        default=[],
        metavar="[A:|B:]N",
        help="logging_steps of a Hugging Face console log, whose lines tell no step",
    )
    compare.add_argument(
        "--out", metavar="DIR", help="folder of the report; a new one under nemo_experiments/compare/ when unset"
    )
    compare.add_argument("--json", action="store_true", help="print report.json instead; files only with --out")
    compare.set_defaults(func=_compare)


def _register_correlate(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
        "--engine",
        metavar="megatron-lm=PATH",
        help="run the flags in this checkout of Megatron-LM, which needs a GPU, and in Lockstep, and compare the two",
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
    from lockstep.lab.foreign.options import make_readers
    from lockstep.lab.report import as_json, show, write_report
    from lockstep.record.paths import PARENT, fresh_dir

    readers = make_readers(arguments.format, arguments.columns, arguments.interval)
    found = compare_paths(arguments.a, arguments.b, *readers)
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
    if arguments.engine is not None:
        from lockstep.lab.engine import correlate_engine

        if arguments.left is not None or arguments.right is not None:
            raise UserError("--engine runs another trainer as side A; drop --left and --right")
        return correlate_engine(arguments.engine, arguments.mlm, arguments.bridge, out, arguments.calibrate)
    if arguments.left is not None or arguments.right is not None:
        from lockstep.lab.cores import correlate_cores

        if arguments.calibrate:
            raise UserError("--calibrate goes with two doors, not with two cores; run `lockstep calibrate` on a side")
        return correlate_cores(arguments.left, arguments.right, arguments.mlm, arguments.bridge, out)
    return correlate(arguments.mlm, arguments.bridge, out, arguments.calibrate)
