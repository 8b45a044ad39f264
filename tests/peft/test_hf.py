"""Adapters against Hugging Face's PEFT: the same losses, the same files, the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lockstep.cli import main
from lockstep.guard import USER_ERROR
from lockstep.models import GPTModel
from lockstep.models.init import fill
from lockstep.peft.apply import add_adapters
from lockstep.peft.files import AdapterCheckpoint, BaseWeights
from tests.hf.tiny import saved
from tests.peft.runs import trained

peft = pytest.importorskip("peft")

_FUSED = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def theirs_at(folder: Path, base: Path, targets: list[str], *, dora: bool = False, seed: int = 3) -> Any:
    """Save random adapters with PEFT and return the model with them."""
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def ours_at(folder: Path, base: Path, dtype: torch.dtype = torch.float32) -> GPTModel:
    """Return the model of one process with the adapters of a checkpoint."""
    adapters = AdapterCheckpoint.open(folder)
    weights = BaseWeights.open(base, adapters.config)
    model = GPTModel(adapters.config.model, dtype=dtype, device=torch.device("meta"))
    add_adapters(model, adapters.config.peft)
    names = [name for name, _ in model.named_parameters()]
    fill(model, ((n, (adapters if n in adapters.tensors else weights).whole(n).to(dtype)) for n in names))
    return model.eval()


def _difference(ours: GPTModel, theirs: Any) -> float:
    tokens = torch.randint(0, 70, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a = ours(tokens, torch.arange(16).expand(2, 16))
        b = theirs.eval()(tokens).logits
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_files_of_peft_go_through_bit_for_bit(family, dora, tmp_path, capsys) -> None:
    base, targets = saved(tmp_path / "hf", family), [*_FUSED[family][:1], *_FUSED[family][2:]]
    theirs = theirs_at(tmp_path / "peft", base, targets, dora=dora)
    assert main(["adapter", "import", str(tmp_path / "peft"), str(tmp_path / "ours"), "--base", str(base)]) == 0
    assert _difference(ours_at(tmp_path / "ours", base), theirs) < 1e-5
    assert main(["adapter", "export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["target_modules"] == sorted(targets)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "back")
    assert _difference(ours_at(tmp_path / "ours", base), again) < 1e-5


@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "lora"), ("llama32", "dora"), ("qwen3", "dora"), ("gpt2", "lora")]
)
def test_trained_adapters_load_in_peft_and_merge(family, scheme, tmp_path, capsys) -> None:
    base, ours = saved(tmp_path / "hf", family), str(tmp_path / "ours")
    trained(tmp_path / "run", base, scheme, "--save", ours, "--save-interval", "4")
    model = ours_at(Path(ours), base)
    assert main(["adapter", "export", ours, str(tmp_path / "peft")]) == 0
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    assert _difference(model, loaded) < 1e-5
    assert _difference(model, AutoModelForCausalLM.from_pretrained(base)) > 1e-3

    assert main(["adapter", "merge", ours, str(tmp_path / "merged"), "--hf"]) == 0
    assert _difference(model, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) < 1e-5
    assert main(["adapter", "merge", ours, str(tmp_path / "whole")]) == 0
    assert main(["convert", "check", str(tmp_path / "merged"), str(tmp_path / "whole")]) == 0, capsys.readouterr()
    assert main(["convert", "export", ours, str(tmp_path / "x")]) == USER_ERROR
    assert "holds adapters only" in capsys.readouterr().err

    if family != "gpt2":
        back = str(tmp_path / "back")
        assert main(["adapter", "import", str(tmp_path / "peft"), back, "--base", str(base), "--fused"]) == 0
        first, second = AdapterCheckpoint.open(Path(ours)), AdapterCheckpoint.open(Path(back))
        assert first.tensors.keys() == second.tensors.keys()
        assert all(torch.equal(first.whole(name), second.whole(name)) for name in first.tensors)
        trained(tmp_path / "on", base, scheme, "--load", back, "--finetune")


def test_what_is_left_over_is_named(tmp_path, capsys) -> None:
    base, peft_folder = saved(tmp_path / "hf", "llama"), tmp_path / "peft"
    theirs_at(peft_folder, base, _FUSED["llama"])
    file, config = peft_folder / "adapter_model.safetensors", peft_folder / "adapter_config.json"
    good, said = load_file(file), json.loads(config.read_text())

    def refused(tensors: dict[str, Any], settings: dict[str, Any], *words: str) -> str:
        save_file(tensors, file)
        config.write_text(json.dumps(settings))
        line = ["adapter", "import", str(peft_folder), str(tmp_path / "ours"), "--base", str(base), *words]
        assert main(line) == USER_ERROR
        assert not (tmp_path / "ours").exists()
        return capsys.readouterr().err

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert "linear_q.linear_in.weight" in refused({k: v for k, v in good.items() if k != first}, said)
    renamed = {k.replace("layers.1.self_attn.o_proj", "layers.7.self_attn.o_proj"): v for k, v in good.items()}
    assert "no linear for the adapters of model.layers.7.self_attn.o_proj" in refused(renamed, said)
    assert "holds what is no part of an adapter: extra" in refused({**good, "extra": torch.zeros(1)}, said)
    assert "linear_q.linear_in.weight" in refused({**good, first: torch.zeros(3, 32)}, said)
    assert "use_rslora = True" in refused(good, {**said, "use_rslora": True})
    assert "rank_pattern" in refused(good, {**said, "rank_pattern": {"q_proj": 8}})
    assert "are not one" in refused(good, said, "--fused")


def test_experts_are_merged_but_have_no_place_in_peft(tmp_path, capsys) -> None:
    base, ours = saved(tmp_path / "hf", "mixtral"), str(tmp_path / "ours")
    trained(tmp_path / "run", base, "lora", "--save", ours, "--save-interval", "4")
    model = ours_at(Path(ours), base)
    assert main(["adapter", "export", ours, str(tmp_path / "peft")]) == USER_ERROR
    assert "PEFT has no place for the adapters of decoder.layers.0.mlp.experts.linear_fc1" in capsys.readouterr().err
    assert main(["adapter", "merge", ours, str(tmp_path / "merged"), "--hf"]) == 0
    assert _difference(model, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) < 1e-5
    moved = base.rename(tmp_path / "elsewhere")
    assert main(["adapter", "merge", ours, str(tmp_path / "again")]) == USER_ERROR
    assert "are gone; name where they are with --base" in capsys.readouterr().err
    assert main(["adapter", "merge", ours, str(tmp_path / "again"), "--base", str(moved)]) == 0
    other = saved(tmp_path / "other", "mixtral", seed=6)
    assert main(["adapter", "merge", ours, str(tmp_path / "wrong"), "--base", str(other)]) == USER_ERROR
    assert "has others (fingerprint" in capsys.readouterr().err
