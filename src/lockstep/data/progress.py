"""Progress of preparation: a bar on a terminal, a line now and then elsewhere; both on standard error."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_MIB = 1024 * 1024


class PrepareProgress:
    """Shows documents, documents a second and MB a second (MiB of input).

    Args:
        total_bytes: size of the input.
        log_interval: documents between two lines where there is no terminal.
    """

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self._total = total_bytes
        self._interval = log_interval
        self._documents = 0
        self._bytes = 0
        self._start = time.perf_counter()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "PrepareProgress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("preparing"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("preparing", total=self._total, rate="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, documents: int, size: int) -> None:
        """Count documents that are done and the bytes of input they took."""
        before = self._documents
        self._documents += documents
        self._bytes += size
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._bytes, rate=self._rate())
        elif before // self._interval != self._documents // self._interval:
            print(self._rate(), file=sys.stderr)

    def _rate(self) -> str:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return (
            f"{self._documents:,} documents ({self._documents / seconds:,.0f} documents/s, "
            f"{self._bytes / seconds / _MIB:.2f} MB/s)"
        )
