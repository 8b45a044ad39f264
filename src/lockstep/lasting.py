"""Imports that stay to the end of the process."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Within it the garbage collector rests, and after it leaves alone what there was: modules are no garbage.

    PyTorch's import makes it look through a quarter of a million objects again and again, and once more at the exit, a
    quarter of the time that both take. Nothing happens where PyTorch was imported before: what a process has since
    thrown away could never be collected.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
