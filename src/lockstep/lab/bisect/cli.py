"""The ``bisect`` subcommand."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import UserError

if TYPE_CHECKING:
    from lockstep.lab.bisect.search import Result
    from lockstep.lab.bisect.walk import Walk
    from lockstep.lab.compare import Comparison

REPORT_SCHEMA = 1
_EXIT_CODES = {"found": 0, "range": 1, "no difference": 1, "rounding": 1, "cannot tell": 1}
_SHOWN_COMMITS = 20


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lockstep bisect``."""
    parser = subparsers.add_parser(
        "bisect",
        help="find the commit that moved a loss curve",
        usage="lockstep bisect --good REV --bad REV [options] -- COMMAND ...",
        description="Run a training command at the commits between two revisions, each in a worktree of its own, and "
        "name the one that moved the curve. Any repository whose run prints a log that `lockstep compare` reads, or "
        "writes a Lockstep run record. {tree}, {repo}, {out} and {python} in the command stand for the commit's "
        "worktree, your tree, a fresh folder and this Python. Exit code 0 where the commit was found, 1 where not.",
    )
    parser.add_argument("--good", required=True, metavar="REV", help="revision with the curve that was right")
    parser.add_argument("--bad", required=True, metavar="REV", help="later revision with the curve that moved")
    parser.add_argument("--runs-in", default=".", metavar="REPO", help="repository; the one of this folder when unset")
    parser.add_argument(
        "--log",
        metavar="PATH",
        help="log or run directory of a run; - reads what it prints, not the record that it names",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="runs of good that measure noise; 2, or 4 with noise")
    parser.add_argument("--any-change", action="store_true", help="bad is what differs from good at all")
    band = parser.add_mutually_exclusive_group()
    band.add_argument("--calibrate", action="store_true", help="measure good's band; bad is what lies outside it")
    band.add_argument("--band", metavar="RUN", help="the same with the band of a calibrated run of good")
    parser.add_argument("--first-parent", action="store_true", help="keep to the first parents: name merges whole")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="skip a commit that runs longer; also the limit of what --calibrate starts, as a whole",
    )
    parser.add_argument("--out", metavar="DIR", help="new or empty folder of the report")
    parser.add_argument("--cache", metavar="DIR", help="folder of curves, by commit and command")
    parser.add_argument("run", nargs="*", metavar="COMMAND", help="the training run, after --")
    parser.set_defaults(func=_bisect)


def _bisect(arguments: argparse.Namespace) -> int:
    from lockstep.git import Repository
    from lockstep.lab.bisect.running import Job
    from lockstep.lab.bisect.search import Request, search
    from lockstep.lab.bisect.walk import Walk, walk_between
    from lockstep.lab.compare import compare
    from lockstep.lab.correlate import new_folder

    for option, value in (("--repeats", arguments.repeats), ("--timeout", arguments.timeout)):
        if value is not None and value <= 0:
            raise UserError(f"{option} {value:g}: give a number above 0")
    request = Request(
        Repository.at(Path(arguments.runs_in)),
        arguments.good,
        arguments.bad,
        Job(tuple(arguments.run), arguments.log, arguments.timeout),
        (Path(arguments.cache) if arguments.cache else default_cache()).absolute(),
        arguments.repeats,
        arguments.first_parent,
        arguments.any_change,
        Path(arguments.band).absolute() if arguments.band else None,
        arguments.calibrate,
    )
    folder = new_folder(Path(arguments.out)) if arguments.out else None

    def say(text: str) -> None:
        print(text, flush=True)

    result = search(request, say)
    band = (result.band, "good") if result.band else None
    found = _by_what_was_measured(result, compare(_labelled(result.before, "A"), _labelled(result.after, "B"), band))
    folder = folder or new_folder(None, "bisect")
    _show_commit(result)
    walk = Walk()
    if result.commit is not None:
        walk = walk_between(result.before, result.after, request.repository, folder, say)
    _show_cause(result, found, walk)
    print(f"report: {_write(result, found, walk, folder)}")
    return _EXIT_CODES[result.ended]


def default_cache() -> Path:
    """Return the folder of curves: below ``XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep" / "bisect"


def _labelled(outcome: Any, label: str) -> Any:
    import dataclasses

    return dataclasses.replace(outcome.side, label=label)


def _by_what_was_measured(result: "Result", found: "Comparison") -> "Comparison":
    """Return the comparison of one step with what the search knows beside it.

    Without a measured band, what moved a run that repeats in every digit is no rounding. With one, a step that is
    rounding by itself can be the one that took the curve out of the band.
    """
    import dataclasses

    from lockstep.lab.verdict import Decision

    if found.decision.verdict not in ("rounding", "cannot tell") or result.commit is None:
        return found
    if result.band is not None:
        cause = f"{found.decision.cause} With what came before it the curve left the band of good."
        return dataclasses.replace(found, decision=dataclasses.replace(found.decision, cause=cause))
    if not result.silent or found.decision.verdict != "rounding":
        return found
    step = str(found.decision.cause).split("; no band was measured")[0]
    cause = f"{step}; but runs of good are equal in every digit, so {result.commit.short} changed what is computed."
    return dataclasses.replace(found, decision=Decision("bug", cause, "Look at what the commit changes."))


def first_stage(found: "Comparison", walk: "Walk") -> str:
    """Return the first stage that differs, with what was found there: of the walk, else of the comparison."""
    if walk.first is not None:
        return walk.first
    stage = next((stage for stage in found.stages if stage.state == "differs"), None)
    return f"{stage.name}: {stage.detail}" if stage else "none that the runs tell of"


def _show_commit(result: "Result") -> None:
    """Say what was found, before the walk, which takes its time."""
    print(f"\n{result.said}")
    if result.commit is not None:
        print(f"  commit   {result.commit.hash}")
        print(f"  date     {result.commit.date}")
        print(f"  subject  {result.commit.subject}")
        if result.share is not None:
            print(f"  share    {result.share:.0%} of the way from good to bad")
    for commit in result.possible[:_SHOWN_COMMITS]:
        print(f"  {commit.short}  {commit.date}  {commit.subject}")
    if len(result.possible) > _SHOWN_COMMITS:
        print(f"  and {len(result.possible) - _SHOWN_COMMITS} more, in the report")
    sys.stdout.flush()


def _show_cause(result: "Result", found: "Comparison", walk: "Walk") -> None:
    if result.ended != "no difference":
        print(f"  first differing stage  {first_stage(found, walk)}")
        print(f"  verdict  {found.decision.verdict}: {found.decision.cause}")
    if walk.found is not None:
        print(f"  walk     {walk.found.verdict}: {walk.found.sentence}")
    elif walk.problem:
        print(f"  walk     none: {walk.problem}")
    print(f"  compared  A = {result.before.commit.short}, B = {result.after.commit.short}; {result.runs} runs")
    sys.stdout.flush()


def _write(result: "Result", found: "Comparison", walk: "Walk", folder: Path) -> Path:
    from lockstep.lab.localise.report import as_json as walk_as_json
    from lockstep.lab.report import as_json, write_report
    from lockstep.record.schema import encode

    report = write_report(found, folder)[-1]
    told = {
        "schema": REPORT_SCHEMA,
        "ended": result.ended,
        "said": result.said,
        "commit": result.commit,
        "possible": result.possible,
        "share": result.share,
        "stage": first_stage(found, walk),
        "walk": walk_as_json(walk.found) if walk.found is not None else None,
        "steps": result.steps,
        "runs": result.runs,
        "band": result.band.describe() if result.band else None,
        "compared": {"A": result.before.commit, "B": result.after.commit},
        "comparison": as_json(found),
    }
    text = json.dumps(encode(told), indent=1, allow_nan=False) + "\n"
    (folder / "bisect.json").write_text(text, encoding="utf-8")
    return report
