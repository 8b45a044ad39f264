"""Errors that users cause and can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: shown as one short message with the remedy, without a traceback."""


class CommonError(UserError):
    """A mistake that all processes of a run learn of together: one of them says it."""


class ConfigError(UserError):
    """One or more problems in a configuration, collected and reported together.

    ``problems`` holds one sentence a problem; ``str()`` joins them, one a line.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = f"{len(self.problems)} problems in the configuration:\n" + "\n".join(
                f"  - {problem}" for problem in self.problems
            )
        super().__init__(text)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``" Did you mean a, b?"`` with the names in ``known`` nearest to ``name``, or an empty string."""
    candidates = list(known)
    matches = difflib.get_close_matches(name, candidates, n=count, cutoff=0.6)
    if not matches:
        leaf = name.rsplit(".", 1)[-1]
        by_leaf = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        matches = [by_leaf[m] for m in difflib.get_close_matches(leaf, list(by_leaf), n=count, cutoff=0.7)]
    return f" Did you mean {' or '.join(matches)}?" if matches else ""
