"""Any flags: over the tree's own fields, both spellings come to one tree."""

import typing
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lockstep.config import FieldInfo, all_fields
from lockstep.config.fields import choices_of, members
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import is_switch, item_type, parse_flags
from lockstep.megatron_lm.translate import flags_from_config
from lockstep.recipes.door import parse_recipe_args
from lockstep.translation import bridge
from lockstep.translation.differing import matters
from lockstep.translation.emit import words as words_of
from lockstep.translation.flags import Reading, read_flags
from lockstep.translation.reverse import read_overrides, split_override
from lockstep.translation.translate import to_bridge, to_lockstep
from lockstep.translation.words import plain
from tests.translation.common import RECIPE, SIZES, effective

_TEXT = st.text("abcXYZ019 _-./:=,'\"()[]{}$\\é", min_size=1, max_size=12).filter(
    lambda text: not text.startswith("-") and not text.isspace()
)
_SIZED = {SIZES[i] for i in range(0, len(SIZES), 2)} | {"--mock-data"}
_ALONE = {"--num-query-groups", "--data-path", "--train-data-path", "--valid-data-path", "--test-data-path"}


def _scalar(kinds: tuple[Any, ...]) -> st.SearchStrategy[str]:
    if int in kinds:
        return st.integers(0, 10**6).map(str)
    if float in kinds:
        return st.floats(0, 1e6, allow_nan=False).map(repr)
    return _TEXT


def _values(info: FieldInfo) -> st.SearchStrategy[list[str]]:
    if is_switch(info):
        return st.just([])
    if info.path == "model.window_size":
        return st.just(["4,8"])
    item = item_type(info)
    choices = [str(choice) for choice in [*choices_of(info), *typing.get_args(item)]]
    one = st.sampled_from(choices) if choices else _scalar((item,) if item is not None else members(info.type))
    if info.path == "train.rampup_batch_size":
        return st.lists(one, min_size=3, max_size=3)
    return st.lists(one, min_size=1, max_size=3 if item is not None else 1)


_FIELDS = [
    info
    for info in all_fields().values()
    if info.spec.flags and info.spec.flags[0] not in _SIZED | _ALONE and not info.path.endswith("data_args_path")
]
_OPTION = st.sampled_from(_FIELDS).flatmap(lambda info: _values(info).map(lambda v: (info.spec.flags[0], *v)))
_OPTIONS = st.lists(_OPTION, max_size=12, unique_by=lambda option: option[0])


def _read(options: list[tuple[str, ...]]) -> tuple[list[str], Reading] | None:
    words = SIZES + [word for option in options for word in option]
    try:
        reading = read_flags(plain(words))
    except ConfigError as error:
        unexpected = [problem for problem in error.problems if "exclude" not in problem]
        if unexpected:
            raise
        return None
    return None if reading.deferred else (words, reading)


@settings(max_examples=150, deadline=None)
@given(_OPTIONS)
def test_both_doors_and_the_reader_come_to_one_tree(options: list[tuple[str, ...]]) -> None:
    if (given_words := _read(options)) is None:
        return
    words, reading = given_words
    expected = effective(reading.config)
    overrides = words_of(to_lockstep(reading, RECIPE))
    config = parse_recipe_args(["--recipe", RECIPE, *overrides])
    assert effective(config) == expected
    assert effective(parse_flags(flags_from_config(config))) == expected
    if not any(word.startswith("[") for word in words):
        assert effective(parse_flags(words)) == expected


@example([("--fp8-quantizer-factory", "$X'")], "0.2")
@settings(max_examples=60, deadline=None)
@given(_OPTIONS, st.sampled_from(bridge.VERSIONS))
def test_bridges_overrides_say_the_same(options: list[tuple[str, ...]], version: str) -> None:
    if (given_words := _read(options)) is None:
        return
    _, reading = given_words
    translation = to_bridge(reading, RECIPE, version, 16)
    back = read_overrides([split_override(word) for word in words_of(translation)], RECIPE, True)
    here, there, said = effective(reading.config), effective(back.config), reading.given()
    for path, info in all_fields().items():
        if bridge.keys(path) and (path in said or info.spec.effect == "run") and matters(path, reading.config):
            assert here[path] == there[path], path


@pytest.mark.parametrize(
    "value", ["", "a b", "it's", 'say "x"', "${OUT}/x y", "null", "1.5", "a,b", "x=y", "\\", "[a]"]
)
def test_awkward_texts_survive(value: str) -> None:
    reading = read_flags(plain([*SIZES, "--wandb-project", value]))
    overrides = words_of(to_lockstep(reading, RECIPE))
    assert parse_recipe_args(["--recipe", RECIPE, *overrides]).logger.wandb_project == value
