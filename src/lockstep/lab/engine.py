"""One job in the user's own checkout of Megatron-LM and in Lockstep, and the comparison of the two."""

import importlib.util
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from lockstep.errors import UserError
from lockstep.lab.compare import compare
from lockstep.lab.correlate import REFERENCE_FLAGS, build_pair, measure_band, new_folder, run_logged, run_side
from lockstep.lab.report import show, write_report
from lockstep.lab.side import load_side

ENGINE = "megatron-lm"
WITHOUT_TRANSFORMER_ENGINE = (
    ("--transformer-impl", "local"),
    ("--no-gradient-accumulation-fusion",),
    ("--no-persist-layer-norm",),
    ("--no-masked-softmax-fusion",),
    ("--no-rope-fusion",),
)
"""Flags that a checkout needs where Transformer Engine and its companions are not installed."""


def correlate_engine(
    engine: str, mlm: str | None, bridge: str | None, out: Path | None, calibrated: bool = False
) -> int:
    """Run a job in Megatron-LM (A) and in Lockstep (B), write the report, and return the comparison's exit code.

    B takes the recipe where one is given beside flags, and A's flags otherwise. Both are checked before either starts.
    ``calibrated`` has the band of B measured before the comparison.

    Raises:
        UserError: no checkout there, bad flags or overrides, a folder that is not empty, or a side that fails.
    """
    from lockstep.recipes.translate import spell

    checkout = find_checkout(engine)
    if mlm is None and bridge is None:
        mlm = REFERENCE_FLAGS
    pair = build_pair(mlm, bridge)
    added = flags_to_add(pair.flags)
    flags = [*pair.flags, *added]
    folder = new_folder(out)
    print(f"correlate: writing to {folder}", flush=True)
    print(f"Megatron-LM: {checkout}, {_commit(checkout)}")
    if added:
        print(f"added, as Transformer Engine is not installed: {shlex.join(added)}", flush=True)
    log = _run_megatron(checkout, flags, folder)
    run_dir = folder / "lockstep"
    if mlm is not None and bridge is not None:
        run_side("lockstep", ["train", *pair.recipe, f"run.dir={spell(str(run_dir))}"], folder)
    else:
        run_side("lockstep", ["pretrain-gpt", *flags, "--run-dir", str(run_dir)], folder)
    if calibrated:
        measure_band(run_dir)
    found = compare(replace(load_side(log, "A"), engine=True), load_side(run_dir, "B"))
    show(found)
    print(f"report: {write_report(found, folder)[-1]}")
    return found.exit_code


def find_checkout(engine: str) -> Path:
    """Return the checkout that ``megatron-lm=PATH`` names.

    Raises:
        UserError: another trainer, or no checkout there.
    """
    name, equals, path = engine.partition("=")
    if name != ENGINE or not equals or not path:
        raise UserError(f"--engine: {engine!r} is not of the form {ENGINE}=PATH, the one trainer that can be run")
    checkout = Path(path).expanduser().resolve()
    if not (checkout / "pretrain_gpt.py").is_file():
        raise UserError(f"--engine: {checkout} holds no pretrain_gpt.py; give the folder of a checkout of Megatron-LM")
    return checkout


def flags_to_add(flags: list[str]) -> list[str]:
    """Return what Megatron-LM needs beside ``flags`` where Transformer Engine is not installed."""
    if importlib.util.find_spec("transformer_engine") is not None:
        return []
    given = {word.partition("=")[0] for word in flags}
    return [word for words in WITHOUT_TRANSFORMER_ENGINE if words[0] not in given for word in words]


def _run_megatron(checkout: Path, flags: list[str], folder: Path) -> Path:
    """Run the flags in the checkout, in one process of torch.distributed.run, with its own source first."""
    search = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH", "")]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", f"--master_port={_free_port()}"]
    command = [*launcher, str(checkout / "pretrain_gpt.py"), *flags]
    print(f"[{ENGINE}] {shlex.join(['python', *command[1:]])}", flush=True)
    variables = {"PYTHONPATH": search, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return run_logged(ENGINE, command, folder, variables)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _commit(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "which is no git clone"
