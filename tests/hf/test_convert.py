"""Tiny random transformers models through import, check, export and back; and what must not pass."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lockstep.cli import main
from lockstep.guard import USER_ERROR
from lockstep.hf import check, convert, families
from lockstep.hf.rules import Grouped
from lockstep.training import checkpoint_storage
from tests.hf.tiny import MAKERS, saved


def rows(out: str) -> dict[str, str]:
    """Return the verdict of every line of the table."""
    return {cells[0]: cells[1] for line in out.splitlines() if len(cells := re.split(r"  +", line)) == 3}


CARRIED = ["tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "merges.txt"]


@pytest.mark.parametrize("family", list(MAKERS))
def test_there_and_back(family, tmp_path, capsys) -> None:
    """Logits, and every bit, through both conversions; the second time without the config.json it came from."""
    source = saved(tmp_path / "hf", family, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    for name in CARRIED:
        (source / name).write_bytes(f"{name} as it is".encode())
    (source / "modeling.py").write_text("raise SystemExit")
    assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == 0
    assert main(["convert", "check", str(source), str(tmp_path / "ours")]) == 0
    assert main(["convert", "export", str(tmp_path / "ours"), str(tmp_path / "back"), "--max-shard-size", "40KB"]) == 0
    for name in CARRIED:
        assert (tmp_path / "back" / name).read_bytes() == f"{name} as it is".encode()
    generation = "generation_config.json"
    assert (tmp_path / "back" / generation).read_bytes() == (source / generation).read_bytes()
    assert not (tmp_path / "back" / "modeling.py").exists()
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    sizes = {f.name: sum(t.nbytes for t in load_file(f).values()) for f in (tmp_path / "back").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(sizes)
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert max(sizes.values()) <= 40_000
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(check.same_bits(before[name], after[name]) for name in before)
    forget_origin(tmp_path / "ours")
    assert main(["convert", "export", str(tmp_path / "ours"), str(tmp_path / "anew")]) == 0
    capsys.readouterr()
    assert main(["convert", "check", str(tmp_path / "anew"), str(tmp_path / "ours")]) == 0
    assert rows(capsys.readouterr().out) == {
        "settings": "same",
        "folder -> checkpoint": "same",
        "checkpoint -> folder": "same",
        "logits in float32": "same",
        "next token in float32": "same",
        "next token in bfloat16": "same",
    }


def forget_origin(root: Path) -> None:
    """Make an imported checkpoint one of training, which has no files of the Hugging Face model."""
    folder = root / "iter_0000000"
    shutil.rmtree(folder / "hf")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: fact for name, fact in manifest["files"].items() if not name.startswith("hf/")}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_dtype_and_padding(tmp_path) -> None:
    source = saved(tmp_path / "hf", "llama", torch.bfloat16)
    divisor = ["--make-vocab-size-divisible-by", "64"]
    assert main(["convert", "import", str(source), str(tmp_path / "ours"), *divisor]) == 0
    index = checkpoint_storage.read_index(tmp_path / "ours" / "iter_0000000")
    assert {stored.dtype for stored in index.values()} == {"bfloat16"}
    assert index["model.output_layer.weight"].shape == (128, 32)
    assert main(["convert", "check", str(source), str(tmp_path / "ours")]) == 0
    assert main(["convert", "export", str(tmp_path / "ours"), str(tmp_path / "back"), "--dtype", "float32"]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"
    model = json.loads((tmp_path / "ours" / "iter_0000000" / "config.json").read_text())["config"]["model"]
    assert model["max_position_embeddings"] == 16384
    assert "seq_length" not in model
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert all(torch.equal(after[name], value.float()) for name, value in before.items())


def test_import_reads_one_file_of_the_checkpoint_at_a_time(tmp_path, monkeypatch) -> None:
    """A model larger than memory converts: what is read is written before the next is read."""
    source, alive, most = saved(tmp_path / "hf", "qwen3"), 0, 0
    write, read = checkpoint_storage.save_file, convert.Weights.whole

    def counted(self: Any, name: str) -> torch.Tensor:
        nonlocal alive, most
        value = read(self, name)
        alive += value.nbytes
        most = max(most, alive)
        return value

    def written(*args: Any) -> None:
        nonlocal alive
        alive = 0
        write(*args)

    monkeypatch.setattr(convert.Weights, "whole", counted)
    monkeypatch.setattr(checkpoint_storage, "save_file", written)
    monkeypatch.setattr(checkpoint_storage, "FILE_BYTES", 30_000)
    convert.import_model(source, tmp_path / "ours")
    assert most <= 30_000
    assert len(list((tmp_path / "ours" / "iter_0000000").glob("tensors-*.safetensors"))) > 2


def edited(source: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a folder; None drops one."""
    file = source / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, file, {"format": "pt"})


LAST = "model.layers.1.mlp.down_proj.weight"


def renamed(source: Path) -> None:
    tensor = load_file(source / "model.safetensors")[LAST]
    edited(source, **{LAST: None, LAST.replace("down", "dwon"): tensor})


def reshaped(source: Path) -> None:
    edited(source, **{LAST: torch.zeros(32, 47)})


def without_shard(source: Path) -> None:
    (source / "model.safetensors").unlink()
    saved(source, "llama", max_shard_size="40KB")
    (source / "model-00002-of-00003.safetensors").unlink()


def with_foreign_index(source: Path) -> None:
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {LAST: "../model.safetensors"}}))


def with_wrong_index(source: Path) -> None:
    names = [name for name in load_file(source / "model.safetensors") if name != LAST]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def cut_off(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def with_config(**changes: Any) -> Any:
    def change(source: Path) -> None:
        config = json.loads((source / "config.json").read_text()) | changes
        (source / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (renamed, f"missing: {LAST}; without a place in LlamaForCausalLM: {LAST.replace('down', 'dwon')}"),
        (reshaped, f"{LAST} is [32, 47] instead of [32, 48]"),
        (without_shard, "lacks the shard model-00002-of-00003.safetensors with "),
        (with_foreign_index, "names '../model.safetensors', which is no file of this folder"),
        (with_wrong_index, f"model.safetensors.index.json disagree on {LAST}"),
        (pickled, "pickled weights, which can run code"),
        (cut_off, "model.safetensors is damaged"),
        (with_config(model_type="deepseek_v3"), "models of type deepseek_v3 cannot be converted yet"),
        (with_config(attention_bias=True), "attention_bias = True is not supported"),
        (with_config(rope_parameters={"rope_type": "yarn"}), "rope_parameters of type yarn is not supported"),
        (with_config(num_key_value_heads=3), "not divisible by"),
        (with_config(tie_word_embeddings=True), "ties lm_head.weight to model.embed_tokens.weight, but their numbers"),
        (with_config(rms_norm_eps="much"), "rms_norm_eps: model.layernorm_epsilon: expected float"),
    ],
)
def test_what_is_not_the_model_is_refused(damage, message, tmp_path, capsys) -> None:
    source = saved(tmp_path / "hf", "llama")
    damage(source)
    assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == USER_ERROR
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("ours/iter_*"))


@pytest.mark.parametrize("family", list(MAKERS))
def test_every_family_is_strict(family, tmp_path, capsys) -> None:
    """A dropped, a renamed and a widened tensor of each family, whichever comes last: named, and nothing is written."""
    source = saved(tmp_path / "hf", family)
    tensors = load_file(source / "model.safetensors")
    name = max(name for name in tensors if "norm" not in name and "lm_head" not in name)
    value = tensors[name]
    others = {other: each for other, each in tensors.items() if other != name}
    for damaged, message in (
        (others, f"missing: {name}"),
        ({**others, f"{name}s": value}, f"missing: {name}; without a place in "),
        ({**others, name: torch.cat([value, value])}, f"{name} is {list(torch.cat([value, value]).shape)} instead of "),
    ):
        save_file(damaged, source / "model.safetensors", {"format": "pt"})
        assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == USER_ERROR
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("ours/iter_*"))


def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take keys for queries in the declaration."""
    order = [
        dataclasses.replace(rule, theirs=(rule.theirs[1], rule.theirs[0], rule.theirs[2]))
        if isinstance(rule.form, Grouped)
        else rule
        for rule in families.LLAMA.rules
    ]
    monkeypatch.setitem(families.FAMILIES, "llama", dataclasses.replace(families.LLAMA, rules=tuple(order)))


def test_swapped_queries_and_keys_show(tmp_path, capsys, monkeypatch) -> None:
    """By the bits, where one conversion has it; by the logits, where the declaration itself has it."""
    source, query = saved(tmp_path / "hf", "llama"), "model.layers.0.self_attn.q_proj.weight"
    grouped = saved(tmp_path / "grouped", "llama32")
    with monkeypatch.context() as patch:
        swapped(patch)
        assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == 0
        assert main(["convert", "check", str(source), str(tmp_path / "ours")]) == 1
        out = capsys.readouterr().out
        assert rows(out)["checkpoint -> folder"] == "same"
        assert rows(out)["logits in float32"] == "DIFFERENT"
        assert "the models part in the attention of layer 0: either the places of model.layers.0.self_attn." in out
        assert main(["convert", "import", str(grouped), str(tmp_path / "no")]) == USER_ERROR
        assert f"{query} is [32, 32] instead of [16, 32]" in capsys.readouterr().err
    assert main(["convert", "check", str(source), str(tmp_path / "ours"), "--no-logits"]) == 1
    out = capsys.readouterr().out
    assert "2 of 15 parameters differ: decoder.layers.0.self_attention.linear_qkv.weight" in out
    assert f"4 of 21 tensors differ: {query}" in out


def test_another_computation_shows(tmp_path, capsys) -> None:
    source = saved(tmp_path / "hf", "llama32")
    assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == 0
    rope = json.loads((source / "config.json").read_text())["rope_parameters"] | {"factor": 8.0}
    with_config(rope_parameters=rope)(source)
    assert main(["convert", "check", str(source), str(tmp_path / "ours")]) == 1
    assert "rope_scaling_factor is 32.0, in config.json 8.0" in capsys.readouterr().out


def test_export_refuses_what_no_family_computes(tmp_path, capsys) -> None:
    source = saved(tmp_path / "hf", "llama")
    assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == 0
    forget_origin(tmp_path / "ours")
    folder = tmp_path / "ours" / "iter_0000000"
    config = json.loads((folder / "config.json").read_text())
    config["config"]["model"]["rotary_interleaved"] = True
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["config.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["convert", "export", str(tmp_path / "ours"), str(tmp_path / "back")]) == USER_ERROR
    assert "cannot say all of this model: rotary_interleaved is True" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_settings_that_changed_since_lead(tmp_path) -> None:
    """A run that went on with other rotary positions exports those, with the rest of the config.json it came from."""
    source = saved(tmp_path / "hf", "llama32")
    with_config(rope_parameters={"rope_type": "default", "rope_theta": 2e6})(source)
    assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == 0
    reference = saved(tmp_path / "reference", "llama32")
    with_config(bos_token_id=7)(reference)
    words = ["convert", "export", str(tmp_path / "ours"), str(tmp_path / "back"), "--hf-model", str(reference)]
    assert main(words) == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"], config["bos_token_id"]) == (2e6, None, 7)
    assert main(["convert", "check", str(tmp_path / "back"), str(tmp_path / "ours")]) == 0


def test_nothing_is_written_over(tmp_path, capsys) -> None:
    source = saved(tmp_path / "hf", "gpt2")
    assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == 0
    assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == USER_ERROR
    assert "already holds checkpoints" in capsys.readouterr().err
    assert main(["convert", "export", str(tmp_path / "ours"), str(source)]) == USER_ERROR
    assert "is there already" in capsys.readouterr().err


def test_the_spelling_of_the_published_deepseek_v2(tmp_path) -> None:
    """Rotary positions in two keys and whole numbers, and keys that transformers' own class does not have."""
    source = saved(tmp_path / "hf", "deepseek_v2")
    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    yarn = {"type": "yarn", **{key: value for key, value in rope.items() if not key.startswith("rope_")}, "factor": 40}
    router = {"scoring_func": "softmax", "seq_aux": True, "aux_loss_alpha": 0.001, "n_group": 1, "topk_group": 1}
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"}, "moe_layer_freq": 1}
    with_config(rope_parameters=None, rope_scaling=yarn, rope_theta=10000, **router, **code)(source)
    assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == 0
    assert main(["convert", "check", str(source), str(tmp_path / "ours")]) == 0


def test_old_gpt2_files(tmp_path) -> None:
    """Names without their prefix, and masks among the weights, as the first files of GPT-2 have them."""
    source = saved(tmp_path / "hf", "gpt2")
    file = source / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, file, {"format": "pt"})
    assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == 0
    assert main(["convert", "check", str(source), str(tmp_path / "ours")]) == 0
