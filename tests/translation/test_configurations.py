"""Megatron-LM's own configurations: every option in a class, and round trips to equal resolved trees."""

from pathlib import Path

import pytest

from lockstep.config import all_fields
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags
from lockstep.megatron_lm.translate import flags_from_config
from lockstep.recipes.door import parse_recipe_args
from lockstep.translation import bridge
from lockstep.translation.classify import CLASSES
from lockstep.translation.differing import matters
from lockstep.translation.emit import words
from lockstep.translation.nemo import RECIPE as NEMO_RECIPE
from lockstep.translation.reverse import read_overrides, split_override
from lockstep.translation.translate import to_bridge, to_lockstep
from tests.translation.common import RECIPE, configurations, effective, read


@pytest.mark.parametrize("target", ["lockstep", "megatron-bridge"])
def test_every_option_is_in_one_class(shared: Path, target: str) -> None:
    complete = 0
    for name, args in configurations(shared).items():
        reading = read(args, defined=False)
        if target == "lockstep":
            translation = to_lockstep(reading, RECIPE)
        else:
            translation = to_bridge(reading, RECIPE, bridge.NEWEST, 16)
        flags = [arg for arg in args if arg.startswith("--")]
        judged = [v.option.written.flag for v in translation.verdicts if v.option.written.flag != NEMO_RECIPE]
        if flags:
            assert judged == flags, name
        assert all(v.kind in CLASSES and (v.reason or v.kind == "mapped") for v in translation.verdicts), name
        complete += not translation.of_class("blocking")
    assert complete >= 102


@pytest.mark.slow
def test_flags_to_overrides_and_back_give_equal_trees(shared: Path) -> None:
    strict = 0
    for name, args in configurations(shared).items():
        reading = read(args)
        expected = effective(reading.config)
        overrides = words(to_lockstep(reading, RECIPE))
        config = parse_recipe_args(["--recipe", RECIPE, *overrides])
        assert effective(config) == expected, name
        flags = flags_from_config(config)
        assert effective(parse_flags(flags)) == expected, name
        assert effective(read(flags).config) == expected, name
        try:
            strictly = parse_flags([w for o in reading.options for w in (o.written.flag, *o.written.values)])
        except ConfigError:
            continue
        strict += 1
        assert effective(strictly) == expected, name
    assert strict > 80


@pytest.mark.slow
def test_bridges_overrides_give_the_same_run(shared: Path) -> None:
    for name, args in configurations(shared).items():
        reading = read(args)
        translation = to_bridge(reading, RECIPE, bridge.NEWEST, 16)
        back = read_overrides([split_override(word) for word in words(translation)], RECIPE, True)
        assert not any(option.elsewhere for option in back.options), name
        here, there, given = effective(reading.config), effective(back.config), reading.given()
        for path, info in all_fields().items():
            if bridge.keys(path) and (path in given or info.spec.effect == "run") and matters(path, reading.config):
                assert here[path] == there[path], (name, path)
