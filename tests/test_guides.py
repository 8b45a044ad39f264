"""The commands of README.md and docs/first-hour.md do what the pages say."""

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
