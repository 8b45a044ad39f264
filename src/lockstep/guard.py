"""The outermost call of every command: errors of the user become one message and an exit code."""

import os
import sys
import time
from collections.abc import Callable

from lockstep.errors import CommonError, ConfigError, UserError

USER_ERROR = 2
INTERRUPTED = 130
CLOSED_PIPE = 141
PATIENCE_SECONDS = 10


def run(job: Callable[[], int]) -> int:
    """Run a job and turn what the user can mend into one short message and an exit code."""
    try:
        return job()
    except UserError as error:
        # Under a launcher every process finds the same mistake in the configuration: one of them says it.
        if not isinstance(error, ConfigError | CommonError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        else:
            # A launcher ends all processes when the first one ends: that must be the one with something to say.
            time.sleep(PATIENCE_SECONDS)
        return USER_ERROR
    except BrokenPipeError:
        # Whoever read the output has seen enough. What is still buffered has nowhere to go when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
