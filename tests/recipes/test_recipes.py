"""Every recipe: offline, against the published model, against Megatron Bridge, and three steps on a CPU."""

import json
import math
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lockstep.config import ConfigContainer, all_fields, resolve
from lockstep.config.derive import derive, interpolate
from lockstep.errors import ConfigError
from lockstep.models import GPTModel
from lockstep.peft.apply import add_adapters
from lockstep.recipes.catalog import find_recipe, get_recipe
from lockstep.recipes.door import parse_recipe_args
from lockstep.recipes.registry import RECIPES
from lockstep.recipes.size import count_parameters, count_trained
from lockstep.translation import bridge
from tests.recipes.published import PUBLISHED
from tests.test_guides import block

ROOT = Path(__file__).resolve().parents[2]
VANILLA = {name for name in RECIPES if name.startswith("vanilla_gpt")}
"""Recipes that leave the model to the user."""
SIZED = sorted(set(RECIPES) - VANILLA)
ALSO_SHRUNK = {
    "vanilla_gpt": ["tokenizer.vocab_size=512"],  # it gives no vocabulary to its model
    "deepseek_v2_lite": (
        "model.num_query_groups=4 model.moe_layer_freq=[0,1] model.num_moe_experts=8 model.moe_ffn_hidden_size=32 "
        "model.moe_shared_expert_intermediate_size=64"
    ).split(),
}


def derived(name: str) -> ConfigContainer:
    config = get_recipe(name)
    interpolate(config)
    derive(config, find_recipe(name).gpus)
    return config


@cache
def theirs(stem: str) -> torch.nn.Module:
    """Return transformers' model of a published configuration, on the meta device."""
    values: dict[str, Any] = dict(PUBLISHED[stem].config)
    hf = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16)
    return model


@pytest.mark.parametrize("name", SIZED)
def test_a_recipe_builds_the_published_model(name: str) -> None:
    config, published = derived(name), PUBLISHED[RECIPES[name].stem]
    assert sum(p.numel() for p in theirs(RECIPES[name].stem).parameters()) == published.parameters
    assert count_parameters(config.model) == published.parameters
    ours = GPTModel(config.model, dtype=torch.bfloat16, device=torch.device("meta"))
    assert sum(p.numel() for p in ours.parameters()) == published.parameters
    add_adapters(ours, config.peft)
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert count_trained(config.model, config.peft) == trained


@pytest.mark.parametrize("name", sorted(VANILLA))
def test_a_recipe_without_a_model_says_so(name: str) -> None:
    assert count_parameters(derived(name).model) is None
    with pytest.raises(ConfigError, match=r"model\.num_layers"):
        resolve(get_recipe(name))


@pytest.mark.parametrize("name", SIZED)
def test_what_is_no_parameter_is_as_published(name: str) -> None:
    m, hf = derived(name).model, PUBLISHED[RECIPES[name].stem].config
    rope = hf["rope_parameters"]
    assert (m.rotary_base, m.layernorm_epsilon) == (rope["rope_theta"], hf["rms_norm_eps"])
    assert m.rope_scaling == (rope["rope_type"] == "llama3")
    if m.rope_scaling:
        assert m.rope_scaling_factor == rope["factor"]
    if not m.multi_latent_attention:
        sizes = (hf["num_attention_heads"], hf["num_key_value_heads"], hf["head_dim"])
        assert (m.num_attention_heads, m.num_query_groups, m.kv_channels) == sizes
        assert m.qk_layernorm == (hf["model_type"] == "qwen3")
    else:
        scaling = (rope["factor"], rope["mscale"], rope["mscale_all_dim"])
        assert (m.rotary_scaling_factor, m.mscale, m.mscale_all_dim, m.rope_type) == (*scaling, "yarn")
        assert (m.moe_router_topk, m.moe_router_pre_softmax) == (hf["num_experts_per_tok"], not hf["norm_topk_prob"])


EVERYWHERE = {
    # Bridge's start_weight_decay and end_weight_decay, 0.033, are in force: here that is optimizer.weight_decay.
    "optimizer.weight_decay",
    # Needs a checkpoint to load, which a recipe does not name.
    "scheduler.override_opt_param_scheduler",
}
PRETRAINED = {
    # A tokenizer of as many ids as the model has rows.
    "tokenizer.vocab_size",
}
TUNED = {
    # That of the samples, which a shorter one would have to follow.
    "dataset.packed_sequence_size",
    # That of the pretrained checkpoint; Bridge names one of the hub.
    "tokenizer.tokenizer_model",
}
LLAMA_TUNED = {
    # False is stated there, and replaced by what the preset bf16_mixed says.
    "ddp.grad_reduce_in_fp32",
}
LLAMA3_TUNED = {*LLAMA_TUNED, "model.rope_scaling_factor"}  # rope_scaling is off
QWEN3_TUNED = {
    "model.rope_scaling_factor",
    "model.bias_activation_fusion",  # concerns gelu alone
}
DIFFERENCES: dict[str, set[str]] = {
    "llama32_1b_pretrain_config": set(),
    "llama3_8b_pretrain_config": {"model.rope_scaling_factor"},  # rope_scaling is off
    "qwen3_8b_pretrain_config": {
        "model.rope_scaling_factor",
        "model.bias_activation_fusion",
        "tokenizer.tokenizer_type",  # its tokenizer has to be fetched
        "tokenizer.tokenizer_model",
    },
    "deepseek_v2_lite_pretrain_config": {
        "model.rope_scaling_factor",
        "model.make_vocab_size_divisible_by",  # the vocabulary is given
        "model.kv_channels",  # multi-latent attention has heads of its own widths
        "model.moe_router_num_groups",  # one group, and a factor of 1
        "model.moe_router_group_topk",
        "model.moe_router_topk_scaling_factor",
        "model.moe_layer_freq",  # another spelling of the same layers
    },
    "llama32_1b_sft_config": LLAMA_TUNED,
    "llama32_1b_peft_config": LLAMA_TUNED,
    "llama3_8b_sft_config": LLAMA3_TUNED,
    "llama3_8b_peft_config": LLAMA3_TUNED,
    "qwen3_8b_sft_config": QWEN3_TUNED,
    "qwen3_8b_peft_config": QWEN3_TUNED,
    "qwen3_8b_sft_32k_config": QWEN3_TUNED,
}


@pytest.mark.parametrize("name", sorted(DIFFERENCES))
def test_training_differs_from_bridges_recipe_in_what_is_written_down(name: str) -> None:
    theirs = ConfigContainer()
    for path, value in bridge.recipe_values(name).items():
        section, _, field = path.partition(".")
        setattr(theirs.section(section), field, value)
    ours = derived(name)
    derive(theirs, find_recipe(name).gpus)
    differing = {
        path
        for path, info in all_fields().items()
        if info.spec.help and info.spec.effect == "run" and ours.get(path) != theirs.get(path)
    }
    everywhere = EVERYWHERE | (PRETRAINED if find_recipe(name).task == "pretrain" else TUNED)
    assert differing == DIFFERENCES[name] | everywhere


def test_long_names_are_the_same_recipes() -> None:
    assert find_recipe("llama3_8b_pretrain_2gpu_h100_bf16_config") is RECIPES["llama3_8b_pretrain_config"]
    for name, found in RECIPES.items():
        assert found.name == name
        if found.long_name is None:
            assert found.task != "pretrain"
            assert found.stem in ("deepseek_v2_lite", "vanilla_gpt")  # of which NVIDIA has no such recipe
            continue
        assert found.long_name.startswith(f"{found.stem}_{found.task}_{found.gpus}gpu_h100_bf16_")


def test_long_names_are_nvidias(shared: Path) -> None:
    families = json.loads((shared / "facts/recipes.json").read_text())["other_recipes"].values()
    known = {short: long for family in families for short, long in family["short_aliases"].items()}
    assert {name: found.long_name for name, found in RECIPES.items()} == {name: known.get(name) for name in RECIPES}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--recipe", "qwen3_8b_sft_config", "--mode", "lora"],
            "recipe qwen3_8b_sft_config is one of sft; give --model qwen3_8b --mode lora",
        ),
        (["--model", "qwen3_8b", "--mode", "evaluate"], "--mode evaluate: no such mode; use pretrain, sft, lora, dora"),
        (
            ["--model", "qwen3_8b", "--dataset", "gsm8k"],
            "--dataset gsm8k: nothing is fetched from the Hugging Face hub",
        ),
        (
            ["--model", "qwen3_8b", "--dataset", "local-jsonl"],
            "this is no data for pre-training; use mock or megatron-",
        ),
        (
            ["--model", "qwen3_8b", "--mode", "sft", "--dataset", "megatron-indexed"],
            "this is no data for fine-tuning; use mock or local-jsonl",
        ),
        (["--model", "qwen3_8b", "--dataset", "medpix"], "--dataset medpix: this is data for models that see"),
        (["--model", "qwen3_8b", "--dataset", "mine"], "--dataset mine: there is no data set of this name"),
        (["--model", "qwen3_8"], "Did you mean qwen3_8b_pretrain_config"),
    ],
)
def test_what_is_not_there_is_refused_with_the_reason(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe_args(words)
    assert message in str(caught.value)


def train(words: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Train by the documented command with other words; return the losses."""
    _, script, *shrunk = shlex.split(block("docs/recipes.md", "shrunk").replace("\\\n", " "))
    del shrunk[shrunk.index("--recipe") : shrunk.index("--recipe") + 2]
    monkeypatch.setattr(sys, "argv", [script, *shrunk, *words, "run.device=cpu", f'run.dir="{run}"'])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["lm_loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("stem", sorted({found.stem for found in RECIPES.values()}))
def test_three_steps_on_a_cpu(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-training leaves the checkpoint that the recipes of fine-tuning begin with."""
    also, base = ALSO_SHRUNK.get(stem, []), tmp_path / "base"
    saving = [f'checkpoint.save="{base}"', "checkpoint.save_interval=3"]
    losses = train(["--recipe", f"{stem}_pretrain_config", *also, *saving], tmp_path / "pretrain", monkeypatch)
    assert len(losses) == 3
    assert all(abs(loss - math.log(512)) < 0.2 for loss in losses)
    tuned = [name for name, found in RECIPES.items() if found.stem == stem and found.task != "pretrain"]
    assert len(tuned) >= 2
    for name in tuned:
        words = ["--recipe", name, "--dataset", "mock", *also, f'checkpoint.pretrained_checkpoint="{base}"']
        words += ["tokenizer.tokenizer_type=NullTokenizer", "tokenizer.vocab_size=511"]
        losses = train(words, tmp_path / name, monkeypatch)
        assert len(losses) == 3
        assert all(abs(loss - math.log(512)) < 0.5 for loss in losses)
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["config"]["peft"]["scheme"] == ("lora" if "_peft_" in name else None)
        assert record["config"]["dataset"]["sft"]
