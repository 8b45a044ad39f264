import json
from pathlib import Path

import pytest

from lockstep.cli import main
from lockstep.guard import USER_ERROR
from lockstep.plan.cli import DOES_NOT_FIT
from tests.commands import RECIPE, TINY

GPT = ["pretrain-gpt", *TINY]
BIG = (
    "pretrain-gpt --num-layers 2 --hidden-size 2048 --num-attention-heads 16 --seq-length 1024 "
    "--max-position-embeddings 1024 --micro-batch-size 4 --global-batch-size 16 --train-iters 3 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 32000 --lr 1e-3 --bf16"
).split()


def test_a_run_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "--gpu", "h100", "--gpus", "2", "--json", str(file), "--", *GPT]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("DP2 on 2 x h100: ")
    for part in ("weights", "gradients", "optimizer", "experts", "activations", "logits", "workspace", "peak", "GPU"):
        assert f"\n{part} " in shown
    assert "fits, " in shown
    assert "TP2+SP" in shown
    plan = json.loads(file.read_text())
    assert plan["gpu"]["name"] == "h100"
    assert plan["gpu"]["count"] == 2
    assert plan["gpu"]["memory_bytes"] > 79e9
    assert plan["asked"]["fits"] is True
    assert plan["advice"] is None
    for answer in [plan["asked"], *plan["layouts"]]:
        assert answer["peak_bytes"] == sum(answer["parts"].values())
        assert all(answer["highest"][part] >= size for part, size in answer["parts"].items())
    assert {answer["layout"]["name"] for answer in plan["layouts"]} == {"TP2+SP", "sharded DP2", "sharded CP2"}


@pytest.mark.parametrize("door", ["flags", "recipe"])
def test_the_advice_of_either_door_fits_when_it_is_followed(
    door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    keys = "model.num_layers=4 model.hidden_size=2048 model.num_attention_heads=16 train.micro_batch_size=8".split()
    inner = BIG if door == "flags" else ["train", "--recipe", "vanilla_gpt_pretrain_config", *keys]
    plan = ["plan", "--no-layouts", "--gpu", "h100", "--gpus", "1", "--gpu-memory"]
    memory = "5" if door == "flags" else "11"
    assert main([*plan, memory, "--json", str(file), "--", *inner]) == DOES_NOT_FIT
    advice = json.loads(file.read_text())["advice"]
    assert " ".join(advice["words"]) in capsys.readouterr().out
    assert advice["gpus"] == 1
    assert main([*plan, memory, "--", *inner, *advice["words"]]) == 0


def test_where_nothing_helps_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lockstep.plan.advice._MOST_GPUS", 1)
    assert main(["plan", "--gpu", "h100", "--gpu-memory", "0.7", "--no-layouts", "--", *BIG]) == DOES_NOT_FIT
    assert "no layout fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h100", "--", "pretrain-gpt", *TINY, "--num-layer", "2"], "unknown flag --num-layer. Did you mean"),
        (["--gpu", "h100", "--", "train", *RECIPE, "model.num_layer=2"], "unknown key model.num_layer. Did you mean"),
        (["--gpu", "h100", "--", *GPT, "--hidden-size", "15"], "not divisible by --num-attention-heads"),
        (["--gpu", "h100", "--gpus", "2", "--", *GPT, "--tensor-model-parallel-size", "0"], "give 1 or more"),
        (["--gpu", "h100", "--gpus", "3", "--", *GPT, "--tensor-model-parallel-size", "2"], "3 processes are not a"),
        (["--gpu", "h100", "--gpus", "2", "--", *GPT, "--pipeline-model-parallel-size", "2"], "num-layers"),
        (["--gpu", "h100", "--gpus", "8", "--", *GPT], "--global-batch-size = 4 is not divisible"),
        (["--gpu", "h100", "--", *GPT, "--tokenizer-type", "HuggingFaceTokenizer"], "--tokenizer-model"),
        (["--gpu", "h100"], "no training command; give it after --"),
        (["--gpu", "h10", "--", *GPT], "--gpu h10: known are h100, h200"),
        (["--gpu", "h100", "--gpus", "0", "--", *GPT], "--gpus 0: give 1 or more"),
        (["--gpu", "h100", "--gpu-memory", "-1", "--", *GPT], "--gpu-memory -1: give GiB above 0"),
        (["--gpu", "h100", "--json", "no/such/file", "--no-layouts", "--", *GPT], "--json no/such/file: No such file"),
    ],
)
def test_mistakes_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == USER_ERROR
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("words", [[], ["--gpus", "2"], ["--gpu", "h100", "--gp", "2"], ["--gpus", "two"]])
def test_options_are_not_guessed(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *words, "--", *GPT])
    assert caught.value.code == 2


def test_every_problem_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*GPT, "--tensor-model-parallel-size", "4", "--adam-beta1", "2"]
    assert main(["plan", "--gpu", "h100", "--gpus", "4", "--", *words]) == USER_ERROR
    error = capsys.readouterr().err
    assert "--num-attention-heads = 2 is not divisible" in error
    assert "--adam-beta1 = 2.0: give a value" in error
