"""The walk between the commit that was found and the one before it, each run again with probes by its own code."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lockstep.errors import UserError
from lockstep.git import Repository
from lockstep.lab.bisect.running import Outcome
from lockstep.lab.localise.code import by_their_code
from lockstep.lab.localise.localise import Localised, localise
from lockstep.lab.localise.report import write_report
from lockstep.lab.localise.sides import Rerun, from_record

FOLDER = "walk"


@dataclass(frozen=True)
class Walk:
    """The outcome of a walk, or ``problem``, why there is none."""

    found: Localised | None = None
    problem: str = ""

    @property
    def first(self) -> str | None:
        """The first stage that differs, with its tensor."""
        row = self.found.walked.first if self.found else None
        if row is None:
            return None
        return f"{row.stage}: {row.name}" + (f" at iteration {row.iteration}" if row.iteration else "")


def walk_between(
    before: Outcome, after: Outcome, repository: Repository, folder: Path, say: Callable[[str], None]
) -> Walk:
    """Localise between two commits of a repository; the page goes to ``walk`` in ``folder``.

    Commits that cannot show what they compute, as those of other programs, are no error: there is no walk then.
    """
    place = folder / FOLDER
    try:
        a, b = _side(before, repository), _side(after, repository)
        with by_their_code(a, b, say, repository) as sides:
            place.mkdir(parents=True, exist_ok=True)
            found = localise(*sides, place, say=say)
        write_report(found, place)
    except UserError as error:
        shutil.rmtree(place, ignore_errors=True)
        return Walk(problem=str(error))
    for side in ("a", "b"):
        shutil.rmtree(place / side)
    return Walk(found)


def _side(outcome: Outcome, repository: Repository) -> Rerun:
    run = outcome.side.run if outcome.side is not None else None
    if run is None:
        raise UserError("the runs tell a log, not a record")
    if run.facts["code"].get("commit") != outcome.commit.hash:
        raise UserError("the record tells the commit of Lockstep, not of this repository")
    return replace(from_record(run), title=outcome.commit.subject, place=repository.root)
