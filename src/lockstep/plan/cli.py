"""The ``plan`` subcommand."""

import argparse
import json
from pathlib import Path

from lockstep.errors import UserError
from lockstep.plan.gpus import gpu_type, known_gpus

DOES_NOT_FIT = 1


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lockstep plan``."""
    parser = subparsers.add_parser(
        "plan",
        help="tell whether a run fits on GPUs, in which layouts, and what to change",
        description="Tell what a training command needs of each GPU, and in which layouts it fits. Nothing is started; "
        "no GPU is needed. The exit code is 0 where it fits and 1 where it does not.",
        usage="%(prog)s --gpu TYPE --gpus N [options] -- COMMAND ...",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", required=True, metavar="TYPE", help=f"one of {', '.join(known_gpus())}")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs, one process each (default: 1)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of each GPU, where it is not the usual")
    parser.add_argument("--no-layouts", action="store_true", help="look at the asked layout only")
    parser.add_argument("--json", metavar="FILE", help="also write the plan for other programs")
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="COMMAND", help="pretrain-gpt or train, and its arguments"
    )
    parser.set_defaults(func=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from lockstep.jobfile.command import read_command

    gpu = gpu_type(arguments.gpu, arguments.gpu_memory)
    if arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus}: give 1 or more")
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    door, config = read_command(words)

    from rich.console import Console

    from lockstep.plan.advice import advise
    from lockstep.plan.planner import Planner
    from lockstep.plan.report import advice_lines, as_json, print_plan, words_for

    planner, gpus, console = Planner(config, gpu), arguments.gpus, Console()
    asked = planner.ask(gpus)
    layouts = [] if arguments.no_layouts else planner.layouts(gpus)
    print_plan(planner, gpus, asked, layouts, console)
    advice, change = None, []
    if not asked.fits:
        advice = advise(planner, gpus)
        console.print()
        change = words_for(door, config, advice.changes) if advice is not None else []
        for line in advice_lines(advice, change, gpus):
            console.print(line, highlight=False, soft_wrap=True)
    if arguments.json is not None:
        _write(Path(arguments.json), json.dumps(as_json(planner, gpus, asked, layouts, advice, change), indent=2))
    return 0 if asked.fits else DOES_NOT_FIT


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: {error.strerror}") from None
