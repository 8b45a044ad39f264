"""Cores on a temporary clone: the switch reaches both doors, is never half done, and tells what it needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.core import dependencies

ROOT = Path(__file__).resolve().parents[2]
FLAG_DOOR, RECIPE_DOOR = "3rdparty/Megatron-LM/pretrain_gpt.py", "scripts/training/run_recipe.py"
DEV = (ROOT / ".dev.commit").read_text().strip()


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def python(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a clone as a user does: nothing but the clone says what is imported."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LOCKSTEP_CORE")}
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=folder, env=environ | variables, capture_output=True, text=True, timeout=120, check=False
    )


def core(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "lockstep.cli", "core", *words, PYTHONPATH=str(folder / "src"), **variables)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a clone of this repository with history."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture
def marked(clone: Path) -> Path:
    """Return a clone whose dev core tells itself from its main core: it calls the recipe door's program otherwise."""
    for name, core_name in (("run_recipe.py", "run_recipe_dev.py"), ("run_recipe_dev.py", "run_recipe_main.py")):
        file = clone / "src/lockstep/recipes/door.py"
        text = file.read_text()
        assert f'prog="{name}"' in text
        file.write_text(text.replace(f'prog="{name}"', f'prog="{core_name}"'))
        git(clone, "commit", "-qam", core_name)
    assert core(clone, "pin", "HEAD~1").returncode == 0
    return clone


def door_of(folder: Path, *words: str, **variables: str) -> str:
    """Return which core answers a command of the recipe door."""
    text = python(folder, *words, "--help", **variables).stdout
    return "dev" if "run_recipe_dev.py" in text else "main" if "run_recipe_main.py" in text else text


def test_switch_reaches_script_and_command(marked: Path) -> None:
    command = ("-m", "lockstep.cli", "train")
    source = {"PYTHONPATH": str(marked / "src")}
    assert door_of(marked, RECIPE_DOOR) == "main"
    switched = core(marked, "dev")
    assert switched.stdout.startswith("core in use: dev\n"), switched.stderr
    assert (marked / ".core/current").read_text() == f"dev {git(marked, 'rev-parse', 'HEAD~1')}\n"
    assert git(marked, "status", "--porcelain") == "M .dev.commit"
    assert door_of(marked, RECIPE_DOOR) == door_of(marked, *command, **source) == "dev"
    assert door_of(marked, RECIPE_DOOR, LOCKSTEP_CORE="main") == "main"
    assert core(marked, "main").stdout.startswith("core in use: main\n")
    assert door_of(marked, RECIPE_DOOR) == door_of(marked, *command, **source) == "main"
    assert door_of(marked, RECIPE_DOOR, LOCKSTEP_CORE="dev") == "dev"
    (inside,) = (marked / ".core").glob("dev-*")
    itself = {"PYTHONPATH": str(inside / "src")}
    assert door_of(marked, *command, **itself) == door_of(marked, *command, **itself, LOCKSTEP_CORE="dev") == "dev"
    assert "is the core dev itself" in python(marked, *command, **itself, LOCKSTEP_CORE="main").stderr


def test_status_tells_changes_and_a_pin_that_moved(marked: Path) -> None:
    assert core(marked, "dev").returncode == 0
    (folder,) = (marked / ".core").glob("dev-*")
    (folder / "README.md").write_text("mine\n")
    (marked / ".dev.commit").write_text(DEV + "\n")
    shown = core(marked, "status").stdout
    assert "local changes" in next(line for line in shown.splitlines() if line.startswith("  dev"))
    assert f".dev.commit now names {DEV[:12]}" in shown
    assert door_of(marked, RECIPE_DOOR) == "dev"


@pytest.mark.parametrize("damage", ["removed", "elsewhere", "state"])
def test_doors_refuse_a_core_that_is_not_what_the_switch_says(marked: Path, damage: str) -> None:
    assert core(marked, "dev").returncode == 0
    (folder,) = (marked / ".core").glob("dev-*")
    if damage == "removed":
        shutil.rmtree(folder)
    elif damage == "elsewhere":
        git(folder, "checkout", "--quiet", "HEAD~1")
    else:
        (marked / ".core/current").write_text("dev\n")
    message = {"removed": "and is not; `lockstep core dev`", "elsewhere": "that folder is at", "state": "does not name"}
    ended = python(marked, RECIPE_DOOR, "--help")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message[damage] in ended.stderr
    assert core(marked, "status").returncode == 0
    if damage != "elsewhere":
        assert core(marked, "dev").returncode == 0
        assert door_of(marked, RECIPE_DOOR) == "dev"
    assert core(marked, "main").returncode == 0
    assert door_of(marked, RECIPE_DOOR) == "main"


def test_a_switch_that_fails_leaves_the_core_in_use(marked: Path) -> None:
    file = marked / ".dev.commit"
    for text, message in (
        ("0" * 40, f"names {'0' * 40}, which is not in the clone"),
        ("main", "not a commit's hash of 40 digits"),
    ):
        file.write_text(text)
        ended = core(marked, "dev")
        assert ended.returncode == 2
        assert message in ended.stderr
        assert ended.stderr.count("\n") == 1
    assert door_of(marked, RECIPE_DOOR) == "main"
    assert len(git(marked, "worktree", "list").splitlines()) == 1


def test_an_interrupted_checkout_leaves_nothing(marked: Path) -> None:
    (marked / ".core").mkdir()
    git_stand_in = marked.parent / "bin" / "git"
    git_stand_in.parent.mkdir()
    real = shutil.which("git")
    git_stand_in.write_text(
        f'#!/bin/bash\n"{real}" "$@" || exit $?\n'
        '[[ "$*" == *"worktree add"* ]] && rm -r .core/.partial-*/src && kill -INT $PPID && sleep 5\nexit 0\n'
    )
    git_stand_in.chmod(0o755)
    ended = core(marked, "dev", PATH=f"{git_stand_in.parent}:{os.environ['PATH']}")
    assert ended.returncode == 130
    assert [path.name for path in (marked / ".core").iterdir()] == []
    assert len(git(marked, "worktree", "list").splitlines()) == 1
    assert door_of(marked, RECIPE_DOOR) == "main"


def test_a_shallow_clone_is_told_how_to_get_the_commit(tmp_path: Path) -> None:
    folder = tmp_path / "shallow"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(folder)], check=True)
    ended = core(folder, "dev")
    assert ended.returncode == 2
    assert f"`git -C {folder} fetch --unshallow`" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_an_installed_package_has_no_core_to_switch(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src/lockstep", tmp_path / "site/lockstep", ignore=shutil.ignore_patterns("__pycache__"))
    words = ("-m", "lockstep.cli", "core")
    assert "installed package" in python(tmp_path, *words, "status", PYTHONPATH=str(tmp_path / "site")).stdout
    ended = python(tmp_path, *words, "dev", PYTHONPATH=str(tmp_path / "site"))
    assert ended.returncode == 2
    assert "there is no core to switch" in ended.stderr
    run = ("-m", "lockstep.cli", "train", "--help")
    assert python(tmp_path, *run, PYTHONPATH=str(tmp_path / "site")).returncode == 0
    ended = python(tmp_path, *run, PYTHONPATH=str(tmp_path / "site"), LOCKSTEP_CORE="dev")
    assert ended.returncode == 2
    assert "LOCKSTEP_CORE=dev: Lockstep runs from an installed package" in ended.stderr


def test_dependencies_that_differ_are_told_and_installed(marked: Path) -> None:
    project = marked / "pyproject.toml"
    git(marked, "checkout", "--quiet", "-b", "next")
    project.write_text(project.read_text().replace('"rich>=13",', '"rich>=99",\n    "some-kernels>=2",'))
    git(marked, "commit", "-qam", "next")
    git(marked, "checkout", "--quiet", "-")
    assert core(marked, "pin", "next").returncode == 0
    shown = core(marked, "dev").stdout
    assert "rich: main pinned" in shown
    assert "some-kernels: main not named; dev some-kernels>=2" in shown
    assert "`make setup` installs what dev needs beside main's: rich>=99, some-kernels>=2" in shown
    script = (
        "import bootstrap, pathlib, sys; ran = []; bootstrap.run = lambda command, environ: ran.append(command)\n"
        "bootstrap.has_modules = lambda *names: True\n"
        "bootstrap.install(pathlib.Path(sys.prefix), sys.executable, None, 'dev'); print(ran[-1])"
    )
    command = python(marked, "-c", script, PYTHONPATH=str(marked / "scripts/setup")).stdout
    assert "'rich>=99', 'some-kernels>=2'" in command
    assert core(marked, "main").returncode == 0
    assert "some-kernels" not in python(marked, "-c", script, PYTHONPATH=str(marked / "scripts/setup")).stdout


def test_dependencies_are_compared_by_package() -> None:
    main = {"pyproject.toml": '[project]\nrequires-python = ">=3.11"\ndependencies = ["Torch>=2.11"]'}
    dev = {"pyproject.toml": '[project]\nrequires-python = ">=3.12"\ndependencies = ["torch>=2.11"]'}
    dev["constraints.txt"] = "torch==2.12\n# comment\n"
    lines = dependencies.differing(dependencies.read(main.get), dependencies.read(dev.get))
    assert lines == [
        "python: main python>=3.11; dev python>=3.12",
        "torch: main Torch>=2.11; dev pinned 2.12, torch>=2.11",
    ]


def test_two_cores_run_one_job_through_one_door(marked: Path) -> None:
    words = ("-m", "lockstep.cli", "correlate", "--left", "core=main")
    for given, message in (
        ((), "--left and --right belong together"),
        (("--right", "core=next"), "--right core=next: no such side; give core=main or core=dev"),
        (("--right", "core=dev", "--mlm", "x", "--bridge", "y"), "give --mlm or --bridge, not both"),
    ):
        ended = python(marked, *words, *given, PYTHONPATH=str(marked / "src"))
        assert ended.returncode == 2
        assert message in ended.stderr
