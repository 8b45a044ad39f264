"""``lockstep recipes``."""

import subprocess
import sys

import pytest

from lockstep.cli import main
from lockstep.guard import USER_ERROR
from lockstep.recipes.registry import RECIPES


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of every line by the recipe it begins with."""
    lines = [line.split() for line in text.splitlines()[1:]]
    return {cells[0]: cells[1:] for cells in lines}


def test_every_recipe_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = rows(capsys.readouterr().out)
    assert list(listed) == sorted(RECIPES)
    assert listed["llama3_8b_pretrain_config"] == ["8.03B", "8.03B", "4,194,304", "2", "sharded", "CP2"]
    assert listed["qwen3_600m_pretrain_config"] == ["596M", "596M", "4,194,304", "1", "one", "process"]
    assert listed["deepseek_v2_lite_pretrain_config"] == [
        "15.71B",
        "15.71B",
        "2,097,152",
        "8",
        "EP8",
        "x",
        "sharded",
        "DP8",
    ]
    assert listed["vanilla_gpt_pretrain_config"] == ["-", "-", "32,768", "1", "one", "process"]
    assert listed["qwen3_8b_peft_config"] == ["8.19B", "5M", "65,536", "1", "one", "process"]


def test_named_recipes_alone_by_either_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "qwen3_4b_pretrain_2gpu_h100_bf16_config"]) == 0
    assert list(rows(capsys.readouterr().out)) == ["qwen3_4b_pretrain_config"]


def test_the_list_needs_no_torch() -> None:
    code = "import sys; from lockstep.cli import main; main(['recipes']); sys.exit('torch' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert listed.returncode == 0, listed.stderr


@pytest.mark.slow
def test_memory_is_that_of_a_plan_or_says_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vanilla, sized = "vanilla_gpt_pretrain_config", "qwen3_600m_pretrain_config"
    assert main(["recipes", "--memory", "--gpu", "rtx4090", vanilla, sized]) == 0
    shown = capsys.readouterr().out
    memory = rows(shown)[sized]
    assert main(["plan", "--no-layouts", "--gpu", "rtx4090", "--", "train", "--recipe", sized]) == 0
    planned = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("peak "))
    assert float(memory[6]) == pytest.approx(float(planned.split()[-1]), abs=0.06)
    assert memory[7:] == ["fits"]
    assert f"{vanilla}: model.num_layers (--num-layers) is not set; give it a value (and 2 more)" in shown


@pytest.mark.slow
def test_memory_of_fine_tuning_needs_no_data_and_no_weights_yet(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("qwen3_600m_sft_config", "qwen3_600m_peft_config")
    assert main(["recipes", "--memory", "--gpu", "rtx4090", *names, "vanilla_gpt_peft_config"]) == 0
    shown = rows(capsys.readouterr().out)
    whole, adapters = (float(shown[name][6]) for name in names)
    assert 1 < adapters < whole - 4
    assert shown["vanilla_gpt_peft_config"][6:] == ["-"]
    assert main(["plan", "--no-layouts", "--gpu", "rtx4090", "--", "train", "--recipe", names[1]]) == 0
    planned = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("peak "))
    assert float(planned.split()[-1]) == pytest.approx(adapters, abs=0.06)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama9_pretrain_config"], "unknown recipe llama9_pretrain_config"),
        (["--gpu", "h200"], "--gpu h200 says on what --memory is measured; add --memory"),
        (["--memory", "--gpu", "h1000"], "--gpu h1000: known are"),
        (["--mem"], "unrecognized arguments: --mem"),
    ],
)
def test_options_are_checked(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *words]) == USER_ERROR
    assert message in capsys.readouterr().err
