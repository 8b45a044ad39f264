"""Make the virtual environment ``.venv`` and install Lockstep into it, from nothing but ``python3``.

uv is used where it is on PATH, else ``venv`` and pip. uv does not read pip's settings, so the ones that say where
packages come from are handed to it: a CPU build of torch that pip would find is then found by both. This file runs
before anything is installed and under interpreters too old for Lockstep: standard library only.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)
NEWER_NAMES = ("python3.13", "python3.12", "python3.11", "python3.14")
PIP_TO_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
}
ROOT = Path(__file__).resolve().parents[2]


def can_use(python: str) -> bool:
    """Say whether an interpreter starts and is new enough."""
    probe = f"import sys; sys.exit(sys.version_info < {OLDEST})"
    try:
        return subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def find_python() -> str | None:
    """Return the interpreter to build the environment with: this one, or a newer one on PATH."""
    candidates = [sys.executable, *(path for name in NEWER_NAMES if (path := shutil.which(name)))]
    return next(filter(can_use, candidates), None)


def has_modules(python: str, *names: str) -> bool:
    """Say whether an interpreter can import all of some modules."""
    probe = f"import {', '.join(names)}"
    return subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0


def parse_pip_config(listing: str) -> dict[str, str]:
    """Return the settings in the output of ``pip config list``; an environment variable beats a file.

    Args:
        listing: lines such as ``global.find-links='/wheels'`` or ``:env:.find-links='/wheels'``.
    """
    found: dict[str, str] = {}
    for scope in ("global.", "install.", ":env:."):
        for line in listing.splitlines():
            key, equals, value = line.partition("=")
            if equals and key.startswith(scope):
                found[key[len(scope) :]] = str(ast.literal_eval(value))
    return found


def uv_settings(pip: dict[str, str], environ: dict[str, str]) -> dict[str, str]:
    """Return the variables that make uv look where pip looks; what the user set for uv stays."""
    settings = {}
    for option, variable in PIP_TO_UV.items():
        if option in pip and variable not in environ:
            separator = "," if option == "find-links" else " "
            settings[variable] = separator.join(pip[option].split())
    if "UV_INDEX" in settings:
        # pip takes the best version over all indexes; uv by itself stops at the first index that has the name.
        settings.setdefault("UV_INDEX_STRATEGY", environ.get("UV_INDEX_STRATEGY", "unsafe-best-match"))
    return settings


def pip_settings(python: str) -> dict[str, str]:
    """Return pip's settings as the interpreter's pip reports them; none where it has no pip."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    return parse_pip_config(listing.stdout) if listing.returncode == 0 else {}


def core_requirements(python: str) -> list[str]:
    """Return what the core in use requires beside the tree's requirements: nothing unless it is ``dev``."""
    if not (ROOT / ".core" / "current").is_file():
        return []
    command = [python, "-m", "lockstep.core.dependencies"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"set-up failed: {done.stderr.strip()}")
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def run(command: list[str], environ: dict[str, str]) -> None:
    """Run a command in the repository root, showing it first; end with its status where it fails."""
    print("+ " + " ".join(command), flush=True)
    status = subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode
    if status != 0:
        sys.exit(f"set-up failed: the command above ended with status {status}")


def install(venv: Path, python: str, uv: str | None, extras: str) -> None:
    """Make ``venv`` where there is no usable one and install the package, with its pinned dependencies, into it."""
    environ = dict(os.environ)
    inside = str(venv / "bin" / "python")
    target = ["--editable", f".[{extras}]" if extras else ".", "--constraint", "constraints.txt"]
    target += core_requirements(python)
    fresh = not can_use(inside)
    if uv is not None:
        environ.update(uv_settings(pip_settings(python), environ))
        if fresh:
            run([uv, "venv", "--quiet", "--clear", "--python", python, str(venv)], environ)
        run([uv, "pip", "install", "--quiet", "--python", inside, *target], environ)
        return
    if fresh or not has_modules(inside, "pip"):  # an environment that uv made has no pip
        run([python, "-m", "venv", "--clear", str(venv)], environ)
    run([inside, "-m", "pip", "install", "-qq", *target], environ)


def main() -> None:
    """Set up the environment, or end with one message that says what is missing."""
    parser = argparse.ArgumentParser(description="make the virtual environment and install Lockstep into it")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment goes")
    parser.add_argument("--extras", default="dev", help="extras to install, comma-separated")
    parser.add_argument("--no-uv", action="store_true", help="use venv and pip even where uv is on PATH")
    args = parser.parse_args()
    oldest = ".".join(map(str, OLDEST))
    python = find_python()
    if python is None:
        sys.exit(
            f"Lockstep needs Python {oldest} or later; {sys.executable} is {sys.version.split()[0]}. "
            "Install a newer one and give it as: make PYTHON=/path/to/python3"
        )
    uv = None if args.no_uv else shutil.which("uv")
    if uv is None and not has_modules(python, "ensurepip", "venv"):  # some distributions split these off
        sys.exit(
            f"{python} cannot make virtual environments: install its venv package "
            "(Debian and Ubuntu: apt-get install python3-venv), or install uv"
        )
    install(args.venv, python, uv, args.extras)


if __name__ == "__main__":
    main()
