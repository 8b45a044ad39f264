"""Flags, tree and overrides spell the same run: property-based over what the doors can train."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.config import all_fields, resolve
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags
from lockstep.megatron_lm.translate import flags_from_config
from lockstep.recipes.door import parse_recipe_args
from lockstep.recipes.translate import overrides_from_config
from tests.commands import FLAGS, RECIPE

_OPTIONS = [
    ["--swiglu"],
    ["--squared-relu"],
    ["--bf16"],
    ["--fp16"],
    ["--disable-bias-linear"],
    ["--untie-embeddings-and-output-weights"],
    ["--normalization", "RMSNorm"],
    ["--position-embedding-type", "rope", "--rotary-percent", "0.5"],
    ["--group-query-attention", "--num-query-groups", "2"],
    ["--group-query-attention"],
    ["--hidden-dropout", "0.0"],
    ["--adam-beta2", "0.95"],
    ["--lr-decay-style", "cosine", "--lr-warmup-iters", "1"],
    ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "2"],
    ["--clip-grad", "0.5"],
    ["--seed", "7"],
    ["--no-bias-gelu-fusion"],
    ["--calculate-per-token-loss"],
    ["--use-distributed-optimizer"],
    ["--run-dir", "some dir/with spaces, 'quotes' and \\"],
    ["--eval-interval", "2", "--eval-iters", "1"],
    ["--init-method-std", "0.01"],
    ["--exit-interval", "2"],
]
_SIZES = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --lr 1e-3 "
    "--global-batch-size 4 --train-iters 4 --tokenizer-type NullTokenizer --vocab-size 64 --mock-data"
).split()


def values(config: object) -> dict[str, object]:
    from lockstep.config import ConfigContainer

    assert isinstance(config, ConfigContainer)
    return {path: config.get(path) for path in all_fields()}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(_OPTIONS), max_size=8, unique_by=lambda option: option[0]))
def test_flags_and_overrides_resolve_to_one_tree(options: list[list[str]]) -> None:
    words = _SIZES + [word for option in options for word in option]
    try:
        given_config = parse_flags(words)
        expected = values(resolve(given_config))
    except ConfigError:
        return  # contradicting options; refusing them is tested elsewhere
    overrides = ["--recipe", "vanilla_gpt_pretrain_config", *overrides_from_config(given_config)]
    assert values(resolve(parse_recipe_args(overrides))) == expected
    assert values(resolve(parse_flags(flags_from_config(parse_recipe_args(overrides))))) == expected


@pytest.mark.parametrize("door", ["flags", "recipe"])
def test_the_reference_commands_survive_a_round_trip(door: str) -> None:
    config = parse_flags(FLAGS) if door == "flags" else parse_recipe_args(RECIPE)
    expected = values(resolve(config))
    assert values(resolve(parse_flags(flags_from_config(config)))) == expected
    overrides = ["--recipe", "vanilla_gpt_pretrain_config", *overrides_from_config(config)]
    assert values(resolve(parse_recipe_args(overrides))) == expected


def test_what_no_flag_can_say_is_an_error() -> None:
    config = parse_recipe_args([*RECIPE, "dataset.random_seed=7"])
    with pytest.raises(ConfigError, match=r"dataset\.random_seed = 7 has no Megatron-LM flag"):
        flags_from_config(config)
