"""The commands of README.md and of the guides do what the pages say."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.config import resolve
from lockstep.lab.correlate import REFERENCE_FLAGS
from lockstep.megatron_lm.parser import parse_flags
from lockstep.recipes.door import parse_recipe_args
from lockstep.record import load_run
from tests.lab.bisect.history import git

ROOT = Path(__file__).resolve().parents[1]


def readme_command(script: str) -> list[str]:
    """Return the arguments that README.md gives a script."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    line = re.search(rf"^\$ .*{re.escape(script)}(.*)$", text, re.MULTILINE)
    assert line is not None
    return shlex.split(line[1])


def block(page: str, name: str) -> str:
    """Return the fenced block of a page that stands below a comment with its name."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_two_commands_of_the_readme_are_the_reference_pair_but_for_warm_up() -> None:
    flags = readme_command("pretrain_gpt.py")
    assert flags == shlex.split(REFERENCE_FLAGS)
    mlm = resolve(parse_flags(flags)).as_dict()
    bridge = resolve(parse_recipe_args(readme_command("run_recipe.py"))).as_dict()
    differ = {f"{s}.{k}" for s, section in mlm.items() for k, value in section.items() if value != bridge[s][k]}
    without_effect = {"model.use_mcore_models", "scheduler.lr_warmup_init", "scheduler.lr_decay_iters"}
    assert differ - without_effect == {"scheduler.lr_warmup_iters"}


@pytest.mark.slow
def test_real_data_as_the_first_hour_says(tmp_path: Path) -> None:
    page = "docs/first-hour.md"
    subprocess.run([sys.executable, "-c", block(page, "corpus")], cwd=tmp_path, check=True)
    commands = block(page, "real data")
    assert "--train-iters 100 " in commands
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    quick = commands.replace("--train-iters 100 ", "--train-iters 10 ").replace("--eval-iters 4 ", "--eval-iters 1 ")
    ended = subprocess.run(
        ["bash", "-ec", quick], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "verified: no problem found" in ended.stdout
    assert json.loads((tmp_path / "my-data/pair/report.json").read_text())["verdict"] == "identical"
    metrics = (tmp_path / "my-data/pair/mlm/metrics.jsonl").read_text().splitlines()
    losses = [line["lm_loss"] for line in map(json.loads, metrics) if line["kind"] == "train"]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5


def run_blocks(page: str, folder: Path, *names: str, path: str) -> str:
    """Run blocks of a page, one after the other in one shell; return what they print."""
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": path}
    environ |= {"PYTHON": sys.executable, "XDG_CACHE_HOME": str(folder.parent / "cache")}
    for role in ("AUTHOR", "COMMITTER"):
        environ |= {f"GIT_{role}_NAME": "t", f"GIT_{role}_EMAIL": "t@example.org"}
    environ.pop("LOCKSTEP_CORE", None)
    script = "".join(block(page, name) for name in names)
    ended = subprocess.run(
        ["bash", "-ec", script], cwd=folder, env=environ, capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout + ended.stderr


@pytest.mark.slow
def test_a_hugging_face_folder_learns_answers_as_the_first_fine_tuning_says(tmp_path: Path) -> None:
    page = "docs/first-finetune.md"
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    subprocess.run([sys.executable, "-c", block(page, "model")], cwd=tmp_path, check=True)
    before = run_blocks(page, tmp_path, "before", "samples", path=str(ROOT / "src"))
    assert "It is Lima ." in before
    assert "--> " in before
    assert "-->  It is Lima ." not in before
    assert "assistant :[[It is Lima . </s>]]" in before
    assert "logits in float32       same" in before
    after = run_blocks(page, tmp_path, "train", "after", path=str(ROOT / "src"))
    assert after.count("-->  It is Lima .") == 2, "with adapters, and merged"
    losses = [line.lm_loss or 0.0 for line in load_run(tmp_path / "my-data/lora").train]
    assert losses[0] > 3
    assert 0 < losses[-1] < 0.1
    code = block(page, "transformers")
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "assistant : It is Oslo . </s>" in told.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a clone of this repository with history."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(folder)], check=True)
    return folder


@pytest.mark.slow
def test_a_change_of_numerics_is_found_as_the_bisect_guide_says(clone: Path) -> None:
    said = run_blocks("docs/bisect.md", clone, "history", "bisect", path=str(ROOT / "src"))
    planted = git(clone / "my-data/history", "rev-parse", "HEAD~1")
    told = json.loads((clone / "my-data/bisect/bisect.json").read_text())
    assert (told["ended"], told["commit"]["hash"], told["runs"]) == ("found", planted, 5)
    assert told["stage"] == "forward: decoder.layers.0.input_layernorm at iteration 1"
    assert told["walk"]["verdict"] == "bug"
    assert (clone / "my-data/bisect/walk/report.html").is_file()
    stages = {stage["name"]: stage["state"] for stage in told["comparison"]["stages"]}
    assert (stages["config"], stages["data"], stages["initial weights"]) == ("equal", "equal", "equal")
    assert told["comparison"]["sides"]["A"]["kind"] == "Lockstep run record"
    assert git(clone / "my-data/history", "status", "--porcelain") == ""
    for line in (
        "every digit counts",
        f"the curve moved with {planted[:12]}",
        "share    100%",
        "verdict  bug",
    ):
        assert line in said


@pytest.mark.slow
def test_both_records_name_their_core_as_the_guide_on_core_versions_says(clone: Path) -> None:
    """The pinned dev core may be older than cores are: it runs all the same, and its record tells."""
    page = "docs/core-versions.md"
    said = run_blocks(page, clone, "switch", "correlate", path=str(clone / "src"))
    assert re.findall(r"^core in use: (\w+)$", said, re.MULTILINE) == ["dev", "dev", "main"]
    commits = {"dev": (ROOT / ".dev.commit").read_text().strip(), "main": git(clone, "rev-parse", "HEAD")}
    for name, commit in commits.items():
        code = load_run(clone / f"my-data/on-{name}").facts["code"]
        assert (code["core"], code["commit"], code["dirty"]) == (name, commit, False)
        assert f"core: {name}, commit {commit[:12]}" in said
        assert f"core {name}, commit {commit}" in said
    report = json.loads((clone / "my-data/cores/report.json").read_text())
    assert f"commit {commits['main']} against {commits['dev']}, core main against dev" in " ".join(report["notes"])
    assert len(report["rows"]) == 3
    assert (clone / ".core/current").read_text() == "main\n"
    assert git(clone, "status", "--porcelain") == ""
