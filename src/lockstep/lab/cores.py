"""One job on two cores: ``correlate --left core=main --right core=dev``."""

from pathlib import Path

from lockstep.core.state import DEV, NAMES, VARIABLE
from lockstep.core.switch import checked_out, switchable
from lockstep.errors import UserError
from lockstep.lab.compare import compare_paths
from lockstep.lab.correlate import build_pair, new_folder, run_side
from lockstep.lab.report import show, write_report

_PREFIX = "core="


def correlate_cores(left: str | None, right: str | None, mlm: str | None, bridge: str | None, out: Path | None) -> int:
    """Run one job by two cores, whichever is switched on, and return the exit code of the comparison.

    Without ``mlm`` and ``bridge`` the job is the reference pair's side of the flag door.

    Raises:
        UserError: a side that is no core, a job for both doors, or a side that fails.
    """
    cores = _core("--left", left), _core("--right", right)
    if mlm is not None and bridge is not None:
        raise UserError("--left and --right run one job on two cores; give --mlm or --bridge, not both")
    root = switchable()
    if DEV in cores:
        checked_out(root)
    pair = build_pair(mlm, bridge)
    words = ["train", *pair.recipe] if bridge is not None else ["pretrain-gpt", *pair.flags]
    folder = new_folder(out)
    print(f"correlate: writing to {folder}", flush=True)
    names = [f"{side}-{core}" for side, core in zip(("left", "right"), cores, strict=True)]
    for name, core in zip(names, cores, strict=True):
        run_side(name, [*words, *_run_dir(words[0], folder / name)], folder, {VARIABLE: core})
    found = compare_paths(folder / names[0], folder / names[1])
    show(found)
    print(f"report: {write_report(found, folder)[-1]}")
    return found.exit_code


def _core(option: str, given: str | None) -> str:
    known = " or ".join(_PREFIX + name for name in NAMES)
    if given is None:
        raise UserError(f"--left and --right belong together; give {option} {known}")
    name = given.removeprefix(_PREFIX)
    if not given.startswith(_PREFIX) or name not in NAMES:
        raise UserError(f"{option} {given}: no such side; give {known}")
    return name


def _run_dir(command: str, folder: Path) -> list[str]:
    from lockstep.recipes.translate import spell

    return ["--run-dir", str(folder)] if command == "pretrain-gpt" else [f"run.dir={spell(str(folder))}"]
