"""Checkpoints of adapters: small, exact to resume, and bound to the weights that they are for."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from lockstep.cli import main
from lockstep.guard import USER_ERROR
from tests.hf.tiny import saved
from tests.peft.runs import FLAGS, flags, trained


def _tensors(folder: Path) -> set[str]:
    names = set()
    for file in folder.glob("*.safetensors"):
        if not file.name.startswith("rng"):
            with safe_open(file, "pt") as opened:
                names |= set(opened.keys())
    return names


@pytest.mark.parametrize("scheme", ["lora", "dora"])
def test_a_resumed_run_goes_on_exactly_and_saves_adapters_alone(scheme, tmp_path, capsys) -> None:
    base, saves = saved(tmp_path / "hf", "llama32"), tmp_path / "saves"
    words = ["--train-iters", "20", "--lora-dropout", "0.1", "--bf16"]
    run, losses = trained(tmp_path / "a", base, scheme, *words)
    saving = [*words, "--save", str(saves), "--load", str(saves), "--save-interval", "10"]
    _, first = trained(tmp_path / "b", base, scheme, *saving, "--exit-interval", "10")
    _, rest = trained(tmp_path / "c", base, scheme, *saving)
    assert first + rest == losses
    assert losses[-1] < losses[0]
    shown = capsys.readouterr().out
    assert f"training {scheme} adapters for the weights of {base}" in shown
    assert f"resuming from {saves} at iteration 10" in shown
    assert run["base"]["checkpoint"] == str(base)

    names = _tensors(saves / "iter_0000020")
    assert names
    assert all(".adapter." in name for name in names)
    assert {name.split(".")[0] for name in names} == {"model", "optimizer"}
    resumed = json.loads((tmp_path / "c" / "run.json").read_text())
    assert resumed["initial_weights"]["parameters"].keys() == run["initial_weights"]["parameters"].keys()


def test_adapters_start_a_run_of_their_own(tmp_path) -> None:
    base, saves = saved(tmp_path / "hf", "llama"), str(tmp_path / "saves")
    trained(tmp_path / "a", base, "lora", "--save", saves, "--save-interval", "4")
    _, fresh = trained(tmp_path / "b", base, "lora")
    _, again = trained(tmp_path / "c", base, "lora", "--load", saves, "--finetune")
    assert again[0] < fresh[0]


def test_what_does_not_belong_together_is_refused(tmp_path, capsys) -> None:
    base, saves = saved(tmp_path / "hf", "llama"), str(tmp_path / "saves")
    trained(tmp_path / "a", base, "lora", "--save", saves, "--save-interval", "4")
    whole = str(tmp_path / "whole")
    assert main(["convert", "import", str(base), whole]) == 0
    moved = shutil.copytree(base, tmp_path / "moved")

    def refused(*words: str, base: Path = base, scheme: str = "lora") -> str:
        capsys.readouterr()
        assert main(flags(tmp_path / "x", base, scheme, "--load", saves, *words)) == USER_ERROR
        assert not (tmp_path / "x").exists()
        return capsys.readouterr().err

    assert "peft.alpha is 16, in the checkpoint 8" in refused("--lora-alpha", "16")
    assert "peft.scheme is dora, in the checkpoint lora" in refused(scheme="dora")
    assert "there is no such folder" in refused(base=tmp_path / "gone")
    assert "has adapters for linears that get none here" in refused("--peft-target-modules", "linear_qkv")
    assert "peft: linear_x is no linear of this model" in refused("--peft-target-modules", "linear_x")
    words = ["pretrain-gpt", *FLAGS, "--run-dir", str(tmp_path / "x")]
    assert main([*words, "--load", saves, "--lora-dim", "4"]) == USER_ERROR
    assert "needs checkpoint.pretrained_checkpoint" in capsys.readouterr().err
    assert main([*words, "--pretrained-checkpoint", saves]) == USER_ERROR
    assert "holds adapters only, for the weights of" in capsys.readouterr().err
    assert main([*words, "--peft-scheme", "lora", "--load", whole]) == USER_ERROR
    assert "needs checkpoint.pretrained_checkpoint" in capsys.readouterr().err
    assert main(flags(tmp_path / "x", base, "lora", "--load", whole)) == USER_ERROR
    assert "holds whole weights and no adapters" in capsys.readouterr().err
    capsys.readouterr()
    override = ["--override-opt_param-scheduler"]
    code = main(flags(tmp_path / "b", moved, "lora", "--load", saves, "--train-iters", "5", *override))
    assert code == 0, capsys.readouterr().err
    shutil.copyfile(saved(tmp_path / "changed", "llama", seed=6) / "model.safetensors", moved / "model.safetensors")
    assert f"are for the weights of {base}" in refused(base=moved)
