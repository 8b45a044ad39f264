"""What the repository knows of Bridge agrees with what was read from Bridge."""

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.config import all_fields
from lockstep.config.finetuning import BRIDGE_KEYS
from lockstep.megatron_lm.composites import Composite
from lockstep.megatron_lm.parser import flag_table
from lockstep.translation import bridge


@pytest.fixture(scope="module")
def recipes(shared: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((shared / "facts/recipes.json").read_text())
    return facts


_OTHER_KEY = {
    # The presets of mixed precision, the section comm_overlap and the precision of losses are spelled otherwise, or a
    # key that a recipe of Bridge leaves out is replaced by its twin.
    "--max-position-embeddings",
    "--tp-comm-overlap",
    "--overlap-moe-expert-parallel-comm",
    "--delay-wgrad-compute",
    "--defer-embedding-wgrad-compute",
    "--wgrad-deferral-limit",
    "--loss-scale",
    "--overlap-param-gather-with-optimizer-step",
    "--sft",
}


def test_keys_are_those_of_the_facts(shared: Path) -> None:
    facts = json.loads((shared / "facts/flags.json").read_text())["flags"]
    table = flag_table()
    for fact in facts:
        entry = table[fact["flag"]]
        if isinstance(entry, Composite) or fact["flag"] in _OTHER_KEY:
            continue
        theirs = {key["key"] for key in fact["bridge"] if "deprecated" not in key["value"]}
        ours = set(bridge.keys(entry.path))
        if fact["status"] == "mapped":
            assert ours == theirs, fact["flag"]
        elif fact["status"] == "unmapped":
            assert ours == set(), fact["flag"]


def test_inverted_flags_are_those_of_the_facts(shared: Path) -> None:
    facts = json.loads((shared / "facts/flags.json").read_text())["flags"]
    table = flag_table()
    for fact in facts:
        entry = table[fact["flag"]]
        if isinstance(entry, Composite) or not fact["bridge"] or "create-attention-mask" in fact["flag"]:
            continue
        assert entry.spec.negated == all(key["value"] == "inverted" for key in fact["bridge"]), fact["flag"]


# The length of the model follows the data set's.
_SAME = {"dataset.sequence_length": "model.seq_length", "dataset.seq_length": "model.seq_length"}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_NOT_KEPT = (
    "checkpoint.save",
    "logger.tensorboard_dir",
    "train.manual_gc_eval",
    "model.cuda_graph_modules",
    "model.moe_layer_freq",
)
"""Values that name a folder, or that mean the same in another spelling."""


def test_recipes_have_the_values_of_the_facts(recipes: dict[str, Any]) -> None:
    assert set(bridge.recipe_names()) == set(recipes["recipes"])
    for name, recipe in recipes["recipes"].items():
        ours = bridge.recipe_values(name)
        assert bridge.recipe_model(name) == recipe["model_class"]
        for key, value in recipe["values"].items():
            path = _SAME.get(key, BRIDGE_KEYS.get(key, key))
            synchronised = path == "model.seq_length" and key != "dataset.seq_length"
            if path not in all_fields() or path in _NOT_KEPT or value is None or synchronised:
                continue
            value = _DTYPES.get(value, value) if isinstance(value, str) else value
            if path == "ddp.use_distributed_optimizer":
                value = value or recipe["values"].get("optimizer.use_distributed_optimizer")
            if path == "ddp.grad_reduce_in_fp32":
                value = recipe["values"].get("mixed_precision.grad_reduce_in_fp32", value)
            assert ours[path] == value or ours[path] == [value], (name, path)
        assert ours["dataset.sft"] == (recipe["values"]["dataset.__class__"] == "GPTSFTDatasetConfig"), name
        preset = recipe["values"].get("mixed_precision")
        assert preset is None or ours["mixed_precision.bf16"] == preset.startswith("bf16"), name


def test_former_keys_are_those_of_the_facts(recipes: dict[str, Any]) -> None:
    facts = {(alias["old"], alias["new"]): alias["versions"] for alias in recipes["key_aliases"]}
    for new, old, since in bridge.FORMER:
        if new in BRIDGE_KEYS:  # renamed together with the group that they lie in
            assert since == "0.6"
            continue
        assert (old, new) in facts
        assert since in facts[old, new] or facts[old, new] == "as above"


def test_values_of_bridge_fit_the_tree() -> None:
    from lockstep.config.fields import coerce

    for name in bridge.recipe_names():
        for path, value in bridge.recipe_values(name).items():
            assert coerce(value, all_fields()[path]) == value, (name, path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("([0]*3+[1]*2)", [0, 0, 0, 1, 1]),
        ("[0,1,1]", [0, 1, 1]),
        ("[0]*2+[1]", [0, 0, 1]),
        ("2", None),
        ("[0]*99999999", None),
        ("__import__('os')", None),
        ("M-M*", None),
    ],
)
def test_lists_of_layers(text: str, expected: list[int] | None) -> None:
    assert bridge.layer_list(text) == expected
