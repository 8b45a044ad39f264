"""The conversions as Python calls."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lockstep.errors import UserError
from lockstep.hf.bridge import AutoBridge
from lockstep.hf.check import check_model, same_bits
from lockstep.models import GPTModel
from tests.hf.tiny import saved


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "deepseek_v2"])
def test_a_model_there_and_back(family, tmp_path) -> None:
    source = saved(tmp_path / "hf", family)
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.load()
    assert not model.training
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert bridge.save_hf(model, tmp_path / "back") == sorted(file.name for file in source.iterdir())
    assert same(tensors(source), tensors(tmp_path / "back"))


def test_settings_say_where_they_come_from(tmp_path) -> None:
    config = AutoBridge.from_hf_pretrained(saved(tmp_path / "hf", "qwen3_moe")).to_config(128)
    assert (config.model.kv_channels, str(config.origin("model.kv_channels"))) == (16, "hf (head_dim)")
    assert config.model.moe_layer_freq == [0, 1]
    assert config.model.vocab_size == 128


def test_dtypes(tmp_path) -> None:
    """A model has the dtype that is asked for; what is written has the model's, or the one asked for."""
    source = saved(tmp_path / "hf", "llama")
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.load(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    bridge.save_hf(model, tmp_path / "low")
    assert json.loads((tmp_path / "low" / "config.json").read_text())["dtype"] == "bfloat16"
    assert same({name: value.bfloat16() for name, value in tensors(source).items()}, tensors(tmp_path / "low"))
    bridge.save_hf(model, tmp_path / "wide", dtype=torch.float32, shard_bytes=40_000)
    assert len(list((tmp_path / "wide").glob("*.safetensors"))) > 1


def test_checkpoints(tmp_path) -> None:
    source = saved(tmp_path / "hf", "mixtral")
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.import_checkpoint(tmp_path / "ours")
    assert all(finding.same for finding in check_model(source, tmp_path / "ours", logits=False))
    bridge.save_hf(tmp_path / "ours", tmp_path / "back")
    assert same(tensors(source), tensors(tmp_path / "back"))


def test_what_is_refused(tmp_path) -> None:
    llama = AutoBridge.from_hf_pretrained(saved(tmp_path / "llama", "llama"))
    gpt2 = AutoBridge.from_hf_pretrained(saved(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(UserError, match=r"normalization is LayerNorm, in config\.json RMSNorm"):
        llama.save_hf(gpt2.load(), tmp_path / "out")
    with pytest.raises(UserError, match="is there already"):
        llama.save_hf(llama.load(), tmp_path / "gpt2")
    part = llama.load()
    part.output_layer = None
    assert isinstance(part, GPTModel)
    with pytest.raises(UserError, match="a part of a model cannot be written"):
        llama.save_hf(part, tmp_path / "out")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        AutoBridge.from_hf_pretrained(tmp_path / "none")
    assert not (tmp_path / "out").exists()
