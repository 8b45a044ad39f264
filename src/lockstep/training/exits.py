"""When a run stops before its last iteration."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ExitRule:
    """Stops a run after an iteration divisible by ``interval``, or ``minutes`` after ``started``.

    ``started`` is on the clock of ``time.monotonic``; None means no limit of that kind.
    Clocks differ: ``agree`` turns what this process sees into what all of them act on.
    """

    started: float
    interval: int | None = None
    minutes: int | None = None
    agree: Callable[[bool], bool] = lambda over: over

    def out_of_time(self) -> bool:
        """Tell whether the time of the run is over."""
        return self.minutes is not None and self.agree(time.monotonic() - self.started > self.minutes * 60)

    def reason(self, iteration: int) -> str | None:
        """Return why the run stops after an iteration; None when it goes on."""
        if self.out_of_time():
            return f"exiting program after {(time.monotonic() - self.started) / 60} minutes"
        if self.interval is not None and iteration % self.interval == 0:
            return f"exiting program at iteration {iteration}"
        return None
