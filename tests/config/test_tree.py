import pytest

from lockstep.config import ALIASES, ConfigContainer, Origin, Ref, all_fields, canonical
from lockstep.config.fields import coerce, describe
from lockstep.config.show import format_tree
from lockstep.errors import ConfigError


def test_every_default_has_its_declared_type_and_every_accepted_value_too() -> None:
    for info in all_fields().values():
        assert coerce(info.default, info) == info.default, info.path
        for value in info.accepted:
            assert coerce(value, info) == value, info.path


def test_every_field_says_what_is_done_with_it_and_no_flag_is_named_twice() -> None:
    seen: dict[str, str] = {}
    for info in all_fields().values():
        spec = info.spec
        assert sum(map(bool, (spec.help, spec.holds, spec.refused))) == 1, info.path
        for flag in spec.flags:
            assert seen.setdefault(flag, info.path) == info.path, flag


def test_aliases_lead_to_keys_and_hide_none() -> None:
    for alias, path in ALIASES.items():
        assert path in all_fields(), path
        assert alias not in all_fields(), alias
        assert canonical(alias) == path


def test_unknown_attribute_key_and_section_name_the_nearest() -> None:
    config = ConfigContainer()
    with pytest.raises(ConfigError, match=r"unknown key model\.num_layer\. Did you mean model\.num_layers"):
        config.model.num_layer = 2
    with pytest.raises(ConfigError, match=r"unknown key optimizer\.learning_rate"):
        config.set("optimizer.learning_rate", 1.0, Origin())
    with pytest.raises(ConfigError, match=r"unknown section optimiser\. Did you mean optimizer"):
        config.optimiser = None
    with pytest.raises(ConfigError, match="is a section"):
        config.get("model")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("model.num_layers", "2", "int or null"),
        ("model.num_layers", True, "int or null"),
        ("model.num_layers", 2.5, "int or null"),
        ("optimizer.lr", "fast", "float or null"),
        ("model.rope_scaling", 1, "bool"),
        ("model.normalization", "GroupNorm", "one of LayerNorm, RMSNorm"),
        ("dataset.data_path", [1], "str"),
    ],
)
def test_wrong_type_names_path_and_expectation(path: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        ConfigContainer().set(path, value, Origin())
    assert path in str(caught.value)


def test_integral_float_and_int_change_type_only_where_exact() -> None:
    config = ConfigContainer()
    config.train.train_iters = 1e3  # type: ignore[assignment]
    config.optimizer.lr = 1
    assert config.train.train_iters == 1000
    assert isinstance(config.train.train_iters, int)
    assert isinstance(config.optimizer.lr, float)


def test_origins_follow_assignments_and_copies_are_independent() -> None:
    config = ConfigContainer()
    assert config.origin("model.num_layers").kind == "default"
    config.model.num_layers = 2
    assert config.origin("model.num_layers").kind == "python"
    twin = config.copy()
    twin.set("model.num_layers", 4, Origin("command line", "--num-layers"))
    assert (config.model.num_layers, str(twin.origin("model.num_layers"))) == (2, "command line (--num-layers)")
    twin.dataset.data_path = ["a"]
    assert config.dataset.data_path is None


def test_tree_is_shown_with_origins_and_without_defaults() -> None:
    config = ConfigContainer()
    config.set("model.num_layers", 2, Origin("command line", "--num-layers"))
    config.set("scheduler.lr_warmup_init", Ref("optimizer.lr"), Origin("recipe", "r"))
    shown = format_tree(config)
    assert "model.num_layers = 2  # command line (--num-layers)" in shown
    assert "scheduler.lr_warmup_init = ${optimizer.lr}  # recipe (r)" in shown
    assert "model.hidden_size" not in shown
    assert "model.hidden_size = None  # default" in format_tree(config, defaults=True)


def test_describe_spells_types() -> None:
    fields = all_fields()
    assert describe(fields["model.num_layers"].type) == "int or null"
    assert describe(fields["dataset.data_path"].type) == "list of str or null"
