"""Keys of fine-tuning data: Bridge's nested ones of every version mean the fields of the tree."""

from pathlib import Path
from typing import Any

import pytest

from lockstep.config import ConfigContainer, all_fields
from lockstep.config.finetuning import BRIDGE_KEYS, FORMER_BRIDGE_KEYS
from lockstep.errors import ConfigError
from lockstep.recipes.overrides import apply_overrides, apply_yaml


def overridden(*words: str) -> ConfigContainer:
    config = ConfigContainer()
    apply_overrides(config, words)
    return config


def test_every_spelling_names_a_field() -> None:
    assert set((BRIDGE_KEYS | FORMER_BRIDGE_KEYS).values()) <= set(all_fields())


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("dataset.prompt_column=q", "prompt_column", "q"),
        ("dataset.preprocessing.prompt_column=q", "prompt_column", "q"),
        ("dataset.preprocessing={prompt_column:q,add_bos:true}", "prompt_column", "q"),
        ("dataset.hf_dataset.path_or_dataset=d", "hf_dataset_path", "d"),
        ("dataset.offline_packing_specs.pad_seq_to_mult=8", "pad_seq_to_mult", 8),
        ("dataset.packed_sequence_specs.pad_seq_to_mult=8", "pad_seq_to_mult", 8),
        ("dataset.packed_sequence_specs.packed_sequence_size=64", "enable_offline_packing", True),
        ("dataset.packed_sequence_specs.packed_sequence_size=64", "packed_sequence_size", 64),
        ("dataset.packed_sequence_specs.packed_sequence_size=-1", "packed_sequence_size", None),
        ("dataset.packed_sequence_specs={packed_sequence_size:64}", "enable_offline_packing", True),
        ("dataset.offline_packing_specs=null", "enable_offline_packing", False),
        ("dataset.dataset_kwargs.label_key=a", "completion_column", "a"),
        ("dataset.dataset_kwargs={pad_to_max_length:false}", "pad_to_max_length", False),
        ("dataset.dataset_kwargs.answer_only_loss=false", "loss_mode", "all"),
        ("dataset.dataset_kwargs.answer_only_loss=true", "loss_mode", "completion"),
        ("dataset.seed=7", "random_seed", 7),
    ],
)
def test_spellings_of_bridge_set_the_field(word: str, field: str, value: Any) -> None:
    assert getattr(overridden(word).dataset, field) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset.preprocessing.promt_column=q"], r"Did you mean dataset.preprocessing.prompt_column"),
        (["dataset.preprocessing={promt_column:q}"], r"Did you mean dataset.preprocessing.prompt_column"),
        (["dataset.preprocessing=q"], "dataset.preprocessing is a group of keys; set one of them, such as"),
        (["dataset.preprocessing.add_eos=1"], "dataset.preprocessing.add_eos: expected bool, got 1"),
        (["dataset.dataset_kwargs.answer_only_loss=1"], "unknown key dataset.dataset_kwargs.answer_only_loss"),
        (["dataset.prompt_column=a", "dataset.preprocessing.prompt_column=b"], "are one setting"),
    ],
)
def test_a_mistake_in_a_nested_key_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overridden(*words)


def test_a_file_may_nest_them(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(
        "dataset:\n  sft: true\n  preprocessing:\n    prompt_column: q\n  dataset_kwargs: {add_bos: true}\n"
    )
    config = ConfigContainer()
    apply_yaml(config, file)
    assert (config.dataset.sft, config.dataset.prompt_column, config.dataset.add_bos) == (True, "q", True)
