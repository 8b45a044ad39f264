"""When a run stops before its last iteration."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from lockstep.errors import UserError


@dataclass
class ExitSignal:
    """Remembers that the signal called ``name`` has arrived, while it is watched for."""

    name: str
    received: bool = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Let the signal be noted instead of ending the process.

        Raises:
            UserError: called outside the main thread, where Python delivers no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise UserError("train.exit_signal_handler (--exit-signal-handler) works in the main thread only; drop it")
        before = signal.signal(signal.Signals[self.name], self._note)
        try:
            yield
        finally:
            signal.signal(signal.Signals[self.name], before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


@dataclass(frozen=True)
class ExitRule:
    """Stops a run on a signal, after an iteration divisible by ``interval``, or ``minutes`` after ``started``.

    ``started`` is on the clock of ``time.monotonic``; None means no limit of that kind.
    Clocks differ, and signals arrive at different moments, perhaps at one process only: ``agree`` turns what this
    process sees into what the first one sees, ``anywhere`` into whether any of them sees it.
    """

    started: float
    interval: int | None = None
    minutes: int | None = None
    signal: ExitSignal | None = None
    agree: Callable[[bool], bool] = lambda over: over
    anywhere: Callable[[bool], bool] = lambda received: received

    def out_of_time(self) -> bool:
        """Tell whether the time of the run is over."""
        return self.minutes is not None and self.agree(time.monotonic() - self.started > self.minutes * 60)

    def reason(self, iteration: int) -> str | None:
        """Return why the run stops after an iteration; None when it goes on."""
        if self.signal is not None and self.anywhere(self.signal.received):
            return f"exiting program after receiving {self.signal.name}."
        if self.out_of_time():
            return f"exiting program after {(time.monotonic() - self.started) / 60} minutes"
        if self.interval is not None and iteration % self.interval == 0:
            return f"exiting program at iteration {iteration}"
        return None
