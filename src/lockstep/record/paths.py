"""Where a run writes: one directory a run, never shared and never reused."""

from datetime import datetime
from itertools import count
from pathlib import Path

from lockstep.errors import UserError
from lockstep.record.schema import RUN_FILE

PARENT = "nemo_experiments"
_CLAIM = "tb_logs"


def create_run_dir(explicit: str | None, parent_name: str) -> Path:
    """Create the directory of a new run and return it.

    ``explicit`` is taken as it is and has to be new or empty. Without it the run gets a folder of its own,
    ``nemo_experiments/<parent_name>/<YYYYmmdd-HHMMSS>[-k]`` under the working directory.

    Raises:
        UserError: the directory holds a run or other files, or cannot be created.
    """
    run_dir = _claim(Path(explicit)) if explicit else fresh_dir(Path.cwd() / PARENT / _component(parent_name))
    for name in (_CLAIM, "checkpoints"):
        (run_dir / name).mkdir(exist_ok=True)
    return run_dir


def fresh_dir(parent: Path) -> Path:
    """Create and return a folder of ``parent`` named after the present second; two callers never get the same one."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for k in count(1):
        candidate = parent / (stamp if k == 1 else f"{stamp}-{k}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            if candidate.exists():
                continue
            raise UserError(f"cannot create {candidate}: {parent} is not a directory") from None
        except OSError as error:
            raise UserError(f"cannot create the run directory {candidate}: {error.strerror}") from None
        return candidate
    raise AssertionError("unreachable")


def _claim(run_dir: Path) -> Path:
    """Take an explicit directory; the exclusive creation of one folder in it decides between two takers."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / RUN_FILE).exists():
            raise UserError(f"run directory {run_dir} already holds a run; give another --run-dir or remove it")
        held = sorted(path.name for path in run_dir.iterdir())
        if held:
            raise UserError(
                f"run directory {run_dir} is not empty (it holds {held[0]}); give a new or an empty directory"
            )
        (run_dir / _CLAIM).mkdir()
    except FileExistsError:
        if run_dir.is_dir():
            raise UserError(f"run directory {run_dir} was just taken by another run; give another") from None
        raise UserError(f"run directory {run_dir} is a file; give a new or an empty directory") from None
    except OSError as error:
        raise UserError(f"cannot create the run directory {run_dir}: {error.strerror}") from None
    return run_dir


def _component(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise UserError(f"run name {name!r} cannot name a folder; use letters, digits, '-' and '_'")
    return name
