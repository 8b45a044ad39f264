"""The search: both ends first, then the commits that git bisect picks, until one is left.

git bisect keeps its state in a worktree of its own without files: merges, first parents and skipped commits are its
business, and a bisection that the user has under way is not disturbed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lockstep.errors import UserError
from lockstep.git import Commit, Repository
from lockstep.lab.bisect.curves import QUANTITIES, Curve, Judgement, Noise, Yardstick, distance, measure, yardstick
from lockstep.lab.bisect.running import READ_OUTPUT, Job, Outcome, Runner, check_command
from lockstep.lab.calibration.band import Band, load_band
from lockstep.lab.side import load_side
from lockstep.lab.worktrees import scratch_folder

REPEATS, NOISY_REPEATS = 2, 4
"""How often good runs where the user does not say: more often once two of its runs differ."""

_FIRST_BAD = re.compile(r"^# first bad commit: \[([0-9a-f]{40})\]", re.MULTILINE)
_POSSIBLE = re.compile(r"^# possible first bad commit: \[([0-9a-f]{40})\]", re.MULTILINE)

Say = Callable[[str], None]
Ended = Literal["found", "range", "no difference", "rounding", "cannot tell"]


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    ``repeats`` None leaves the number to the noise that is seen. ``band`` is the run directory of a calibrated run of
    good; with ``calibrate`` the band is measured.
    """

    repository: Repository
    good: str
    bad: str
    job: Job
    cache: Path
    repeats: int | None = None
    first_parent: bool = False
    any_change: bool = False
    band: Path | None = None
    calibrate: bool = False


@dataclass(frozen=True)
class Step:
    """One commit that was asked about: ``good``, ``bad``, or ``skip`` with the reason."""

    commit: Commit
    answer: Literal["good", "bad", "skip"]
    reason: str = ""


@dataclass
class Result:
    """How a search ended.

    Attributes:
        said: one sentence on it.
        before, after: outcomes to compare: around the commit that was found, else the two ends.
        possible: where commits that cannot run hide it, those it may be.
        share: part of the way from good to bad that the found commit went, where that has a size.
        silent: runs of good are equal in every digit, so that whatever differs is no noise.
        band: what rounding does to good, where that was measured.
    """

    ended: Ended
    said: str
    before: Outcome
    after: Outcome
    runs: int = 0
    steps: list[Step] = field(default_factory=list)
    commit: Commit | None = None
    possible: list[Commit] = field(default_factory=list)
    share: float | None = None
    silent: bool = False
    band: Band | None = None


def search(request: Request, say: Say) -> Result:
    """Find the commit that moved the curve.

    Whatever ends it, an interrupt included, every worktree is removed again.

    Raises:
        UserError: bad revisions, an end that does not run, or a run of other code than its commit's.
    """
    repository = request.repository
    check_command(repository, request.job.command)
    good, bad = _ends(request)
    with scratch_folder(repository) as scratch:
        runner = Runner(repository, request.job, request.cache, scratch)
        count = int(repository.do("rev-list", "--count", *_options(request), f"{good.hash}..{bad.hash}"))
        say(
            f"{count} {'commit' if count == 1 else 'commits'} after good {good.short} up to bad {bad.short}: "
            f"both ends, then about {max(count - 1, 0).bit_length()} more"
        )
        found = _between_ends(request, runner, good, bad, say)
        if isinstance(found, Result):
            found.runs = runner.runs
            return found
        result = _bisect(request, runner, found, say)
        result.silent = found.rule.noise.repeats > 1 and found.rule.noise.none
        result.band = found.rule.noise.band
        result.runs = runner.runs
        return result


@dataclass(frozen=True)
class _Ends:
    """The two ends as they ran, and the rule that they give."""

    good: Outcome
    bad: Outcome
    rule: Yardstick


def _options(request: Request) -> list[str]:
    return ["--first-parent"] if request.first_parent else []


def _ends(request: Request) -> tuple[Commit, Commit]:
    repository = request.repository
    good, bad = repository.commit(request.good, "--good"), repository.commit(request.bad, "--bad")
    if good.hash == bad.hash:
        raise UserError(f"--good {request.good} and --bad {request.bad} are the same commit, {good.short}")
    if repository.ask("merge-base", "--is-ancestor", good.hash, bad.hash) is None:
        if repository.ask("merge-base", "--is-ancestor", bad.hash, good.hash) is not None:
            raise UserError(
                f"--bad {request.bad} comes before --good {request.good}: exchange them, and read the result as the "
                "commit that mended the curve"
            )
        base = repository.ask("merge-base", good.hash, bad.hash)
        remedy = f"--good {base[:12]} is where they part" if base else "they have no common history"
        raise UserError(f"--good {request.good} is no ancestor of --bad {request.bad}; {remedy}")
    return good, bad


def _between_ends(request: Request, runner: Runner, good: Commit, bad: Commit, say: Say) -> "_Ends | Result":
    """Run both ends and measure good's noise; a result where there is nothing to look for."""
    outcomes = [_end("good", runner, good, say)]
    last = _end("bad", runner, bad, say)
    if _digits(last) != _digits(outcomes[0]):
        raise UserError(f"good tells {_digits(outcomes[0])} and bad {_digits(last)}; {READ_OUTPUT}")
    wanted = request.repeats or REPEATS
    while len(outcomes) < wanted:
        outcomes.append(_end("good again", runner, good, say, len(outcomes) + 1))
        noise = measure([_curve(outcome) for outcome in outcomes])
        if request.repeats is None and not noise.none:
            wanted = NOISY_REPEATS
    noise = measure([_curve(outcome) for outcome in outcomes])
    first = outcomes[0]
    if len(outcomes) == 1:
        say("noise: not measured (--repeats 1): every digit counts")
    elif noise.none:
        say(f"noise: none, {len(outcomes)} runs of good are equal in every digit: every digit counts")
    else:
        largest = max(noise.spread["lm loss"].values(), default=0.0)
        say(f"noise: {len(outcomes)} runs of good differ, by at most {largest:.3g} in the loss")
    rule = yardstick(_curve(first), _curve(last), noise, request.any_change)
    if rule is None:
        return _no_ends(first, last, noise.none)
    if request.band is not None or request.calibrate:
        band = _band(request, runner, first, noise, say)
        rule = yardstick(_curve(first), _curve(last), noise.with_band(band), request.any_change)
        if rule is None:
            return Result("rounding", "bad's curve lies inside the band of good", first, last, band=band)
        noise = rule.noise
    say(f"difference: {noise.beyond(rule.good, rule.bad, rule.quantity)}")
    return _Ends(first, last, rule)


def _band(request: Request, runner: Runner, good: Outcome, noise: Noise, say: Say) -> Band:
    """Return the band of good: from the run directory that the user names, or measured by good's own code."""
    if good.side is None or good.side.run is None:
        raise UserError("a band needs the run record of good, and what it tells is a log; leave --band and --calibrate")
    last = max(good.side.points)
    if request.band is None:
        say("calibrating good: 6 runs or more")
        band = runner.calibrate(good, last)
    else:
        found = load_band(request.band)
        if found is None:
            raise UserError(f"--band {request.band} has no band; `lockstep calibrate {request.band}` measures it")
        band, theirs = found, Curve.of(load_side(request.band, "A"))
        for quantity in QUANTITIES:
            if other := noise.with_band(band).beyond(theirs, _curve(good), quantity):
                raise UserError(f"--band {request.band} is of another run than good: {other}")
    if band.last < last:
        raise UserError(
            f"the band of good ends at iteration {band.last}, its run at {last}; "
            f"`lockstep calibrate` with --iterations {last} measures all"
        )
    say(f"band: only what lies outside {band.describe()} counts")
    return band


def _no_ends(good: Outcome, bad: Outcome, silent: bool) -> Result:
    apart = max(distance(_curve(good), _curve(bad), quantity) for quantity in QUANTITIES)
    if silent or not (apart.unlike or apart.apart):
        return Result("no difference", "good and bad have the same curve: there is nothing to find", good, bad)
    return Result(
        "cannot tell",
        "good and bad differ by no more than runs of good differ among themselves: make the run deterministic "
        "(--deterministic-mode, fixed seeds, one process), or longer until they part",
        good,
        bad,
    )


def _end(name: str, runner: Runner, commit: Commit, say: Say, repeat: int = 1) -> Outcome:
    say(f"{name}: {commit.short} {commit.subject}")
    outcome = runner.run(commit, repeat)
    if outcome.side is None:
        output = outcome.folder / "output.log"
        text = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
        tail = "".join(f"\n  | {line}" for line in text.splitlines()[-10:])
        raise UserError(f"{name} {outcome.commit.short} does not run: {outcome.problem}{tail}")
    notes = f"; {', '.join(outcome.notes)}" if outcome.notes and repeat == 1 else ""
    say(f"   {_took(outcome)}{notes}")
    return outcome


def _took(outcome: Outcome) -> str:
    return "from the cache" if outcome.cached else f"ran in {outcome.seconds:.1f} s"


def _digits(outcome: Outcome) -> str:
    """Return how a run tells its numbers: whole and cut ones differ although the run is the same."""
    return "printed digits" if outcome.side is not None and outcome.side.printed else "every digit"


def _curve(outcome: Outcome) -> Curve:
    assert outcome.side is not None
    return Curve.of(outcome.side)


def _bisect(request: Request, runner: Runner, ends: _Ends, say: Say) -> Result:
    steps: list[Step] = []
    repository = request.repository
    with repository.worktree(runner.scratch / "state", ends.bad.commit.hash, files=False) as state:
        revisions = ends.bad.commit.hash, ends.good.commit.hash
        state.do("bisect", "start", "--no-checkout", *_options(request), *revisions)
        while not (log := _finished(state)):
            commit = repository.commit(state.do("rev-parse", "BISECT_HEAD"))
            say(f"{len(steps) + 1}: {commit.short} {commit.subject}")
            step, told = _answer(runner, ends, commit)
            steps.append(step)
            say(f"   {step.answer}, {told}")
            # git ends with 2 where only skipped commits are left: its log says so.
            state.run("bisect", step.answer, commit.hash)
    if found := _FIRST_BAD.search(log):
        return _found(request, runner, ends, repository.commit(found[1]), steps, say)
    possible = [repository.commit(name) for name in reversed(_POSSIBLE.findall(log))]  # git tells the newest first
    first = possible[0]
    said = (
        f"the first bad commit is one of {len(possible)}, from {first.short} on: those between could not be judged; "
        "see the reasons above"
    )
    return Result("range", said, ends.good, ends.bad, steps=steps, possible=possible)


def _finished(state: Repository) -> str:
    """Return git bisect's log once it has come to an end, else nothing."""
    log = state.do("bisect", "log")
    return log if _FIRST_BAD.search(log) or _POSSIBLE.search(log) else ""


def _answer(runner: Runner, ends: _Ends, commit: Commit) -> tuple[Step, str]:
    """Run a commit and judge it; what cannot run, or is like neither end, is skipped."""
    outcome = runner.run(commit)
    if outcome.side is None:
        return Step(commit, "skip", outcome.problem), f"cannot run ({outcome.problem})"
    if _digits(outcome) != _digits(ends.good):
        reason = f"it tells {_digits(outcome)}, both ends tell {_digits(ends.good)}; {READ_OUTPUT}"
        return Step(commit, "skip", reason), reason
    judgement: Judgement = ends.rule.judge(_curve(outcome))
    if judgement == "neither":
        reason = "its curve is neither good's nor bad's"
        return Step(commit, "skip", reason), reason
    if ends.rule.noise.band is None:
        return Step(commit, judgement), _took(outcome)
    outside = ends.rule.noise.beyond(ends.rule.good, _curve(outcome), ends.rule.quantity)
    reason = f"outside the band: {outside}" if outside else "inside the band"
    return Step(commit, judgement, reason), f"{_took(outcome)}, {reason}"


def _found(request: Request, runner: Runner, ends: _Ends, commit: Commit, steps: list[Step], say: Say) -> Result:
    """Compare the commit with the one before it, which most often has run already."""
    after = ends.bad if commit.hash == ends.bad.commit.hash else runner.run(commit)
    said = f"the curve moved with {commit.short}"
    name = request.repository.ask("rev-parse", "--verify", "--quiet", f"{commit.hash}^1")
    if name is None:
        say(f"{commit.short} has no commit before it: both ends are compared")
        return Result("found", said, ends.good, ends.bad, steps=steps, commit=commit)
    before = ends.good if name == ends.good.commit.hash else runner.run(request.repository.commit(name))
    if after.side is None or before.side is None:  # ran a moment ago, and does not now
        say(f"the commit before it cannot run ({before.problem or after.problem}): both ends are compared instead")
        return Result("found", said, ends.good, ends.bad, steps=steps, commit=commit)
    share = ends.rule.share(_curve(before), _curve(after))
    return Result("found", said, before, after, steps=steps, commit=commit, share=share)
