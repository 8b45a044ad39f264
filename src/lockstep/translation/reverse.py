"""Recipes with overrides, of Lockstep or Megatron Bridge, as Megatron-LM's flags."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.config import ALIASES, ConfigContainer, FieldInfo, Origin, all_fields
from lockstep.config.derive import has_data, interpolate
from lockstep.config.fields import coerce
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import item_type
from lockstep.megatron_lm.translate import spell_flags
from lockstep.recipes.catalog import get_recipe
from lockstep.recipes.overrides import expand, parse_override
from lockstep.translation import bridge
from lockstep.translation.classify import Side, classify
from lockstep.translation.differing import effect_reason, matters, reason
from lockstep.translation.elsewhere import Elsewhere, Family
from lockstep.translation.flags import Option
from lockstep.translation.translate import Difference, Translation
from lockstep.translation.words import Written, has_reference

_BRIDGE_ONLY = Family("Bridge", "blocking", "a key of Bridge without a flag, as far as is known here", "")


@dataclass
class Overridden:
    """A recipe's tree with overrides, the overrides one by one, and what only the job's shell knows."""

    config: ConfigContainer
    options: list[Option] = field(default_factory=list)
    deferred: dict[str, str] = field(default_factory=dict)


def split_override(word: str) -> tuple[str, Any]:
    """Return key and value of one ``key=value`` word; a value that is a shell variable stays its text.

    Raises:
        ConfigError: it is not in Hydra's grammar.
    """
    key, equals, text = word.partition("=")
    bare = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    if (
        equals
        and has_reference(text)
        and not text.startswith("[")
        and bare
        and not set(bare) & set("'\"\\")
        and "." not in text.partition("}")[0]
    ):
        return key.lstrip("+"), bare
    return parse_override(word)[0]


def read_overrides(assignments: Sequence[tuple[str, Any]], recipe: str, of_bridge: bool) -> Overridden:
    """Return a recipe's tree with the keys and values of ``assignments`` set in their order.

    Raises:
        ConfigError: no such recipe, unknown keys, values of another type; lists all problems.
    """
    result = Overridden(_bridge_tree(recipe) if of_bridge else get_recipe(recipe))
    problems: list[str] = []
    spelled: dict[str, tuple[str, Any]] = {}
    for key, value in assignments:
        written = Written(key, (_text(value),))
        try:
            sets = dict(_bridge_sets(key, value, result.config) if of_bridge else _sets(key, value))
        except ConfigError as error:
            if of_bridge and "unknown key" in str(error) and key.partition(".")[0] in _BRIDGE_SECTIONS:
                entry = Elsewhere(key, "1", None, _BRIDGE_ONLY)
                result.options.append(Option(written, elsewhere=entry))
            else:
                problems += error.problems
            continue
        for path, item in sets.items():
            earlier_key, earlier = spelled.setdefault(path, (key, item))
            if earlier != item:
                problems.append(f"{earlier_key}={earlier} and {key}={item} are one setting; give both the same value")
            if isinstance(item, str) and has_reference(item) and not _takes_text(all_fields()[path]):
                result.deferred[path] = item
            else:
                result.config.set(path, item, Origin("command line", key))
        result.options.append(Option(written, sets))
    if problems:
        raise ConfigError(problems)
    return result


_BRIDGE_SECTIONS = ("peft", "nvrx_straggler", "tensor_inspect", "model", "dataset", "logger", "checkpoint", "env_vars")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _takes_text(info: FieldInfo) -> bool:
    try:
        coerce(["${X}"] if item_type(info) is not None else "${X}", info)
    except ValueError:
        return False
    return True


def _sets(key: str, value: Any) -> list[tuple[str, Any]]:
    path = ALIASES.get(key, key)
    if path in all_fields() and isinstance(value, str) and has_reference(value) and not _takes_text(all_fields()[path]):
        return [(path, value)]
    return expand(key, value)


def _bridge_sets(key: str, value: Any, config: ConfigContainer) -> list[tuple[str, Any]]:
    if key == "mixed_precision" and value is None:
        return [("mixed_precision.bf16", False), ("mixed_precision.fp16", False)]
    if key == "mixed_precision" and isinstance(value, str):
        value = {"16_mixed": "fp16_mixed", "bf16": "bf16_mixed", "fp16": "fp16_mixed"}.get(
            value.replace("-", "_"), value
        )
    if key == "dataset.skip_getting_attention_mask_from_dataset":
        return [("dataset.create_attention_mask", not value)]
    if key == "dataset.blend_per_split" and value is not None:
        names = [f"dataset.{name}_data_path" for name in ("train", "valid", "test")]
        return [(path, _unblend(blend)) for path, blend in zip(names, value, strict=True) if blend]
    if key in bridge.PATTERNS and isinstance(value, list):
        return [(key, "[" + ",".join(map(str, value)) + "]")]
    paths = bridge.paths_of(key)
    return _sets(paths[0] if paths and key not in all_fields() and key != "mixed_precision" else key, value)


def _unblend(blend: Sequence[Any]) -> list[str]:
    prefixes, weights = blend
    if weights is None:
        return [str(prefix) for prefix in prefixes]
    return [str(word) for pair in zip(weights, prefixes, strict=True) for word in pair]


def _bridge_tree(recipe: str) -> ConfigContainer:
    config = ConfigContainer()
    for path, value in bridge.recipe_values(recipe).items():
        if value != all_fields()[path].default:
            config.set(path, value, Origin("recipe", recipe))
    return config


def to_flags(read: Overridden, recipe: str, system: str, waived: Iterable[str] = ()) -> Translation:
    """Return Megatron-LM's flags for a recipe with overrides.

    ``system`` names whose recipe it is. Values of the recipe that Megatron-LM has otherwise are written as differing
    defaults; those that no flag can say block, when they change the run.
    """
    config = read.config.copy()
    interpolate(config)
    notes = _fold(config)
    spelled, missing = spell_flags(config)
    if "dataset.mock" in spelled:
        config.set("dataset.mock", True, config.dataset.origin("mock"))
    for path, text in read.deferred.items():
        if all_fields()[path].spec.flags:
            spelled[path] = [all_fields()[path].spec.flags[0], text]
    set_paths = {path for option in read.options for path in option.sets}
    kept = {path: words for path, words in spelled.items() if path in set_paths or _is_kept(path, config, system)}
    defaults = {path: info.default for path, info in all_fields().items()}

    def keys(path: str, value: Any) -> tuple[str, ...]:
        if path in missing:
            return ()
        flags = all_fields()[path].spec.flags
        return (" ".join(kept[path]),) if path in kept else flags[:1] or _CARRIED.get(path, ())

    verdicts = classify(read.options, Side("Megatron-LM", defaults, keys, {}), waived)
    differing = [
        Difference(
            path,
            config.get(path),
            defaults[path],
            {" ".join(words): None},
            reason(path, all_fields()[path].spec.effect),
        )
        for path, words in kept.items()
        if path not in set_paths
    ]
    unsaid = [path for path in missing if path not in set_paths]
    for path in unsaid:
        effect = all_fields()[path].spec.effect
        entry = Family("recipe", "blocking" if effect == "run" else "waived", effect_reason(effect), "")
        option = Option(Written(path, (_text(config.get(path)),)), elsewhere=Elsewhere(path, "1", None, entry))
        verdicts += classify([option], Side("Megatron-LM", defaults, keys, {}), waived)
    return Translation("megatron-lm", recipe, verdicts, differing, kept, set(), notes)


def _is_kept(path: str, config: ConfigContainer, system: str) -> bool:
    """Tell whether a value that the recipe sets is written: of Bridge's, those alone that change such a run."""
    if system != bridge.NAME or path == "dataset.mock":
        return True
    if path == "dataset.split" and not has_data(config):
        return False
    return all_fields()[path].spec.effect == "run" and matters(path, config)


_CARRIED: dict[str, tuple[str, ...]] = {
    "model.gated_linear_unit": ("--swiglu or --quick-geglu",),
    "model.activation_func": ("--swiglu, --squared-relu and their like",),
}


def _fold(config: ConfigContainer) -> list[str]:
    """Turn what Bridge says in two places into what Megatron-LM says in one; return what was done."""
    notes = []
    scheduler = config.scheduler
    start, end = scheduler.start_weight_decay, scheduler.end_weight_decay
    if scheduler.weight_decay_incr_style == "constant" and start is not None and start == end:
        if start != config.optimizer.weight_decay:
            notes.append(
                f"--weight-decay is {start}: scheduler.start_weight_decay replaces optimizer.weight_decay = "
                f"{config.optimizer.weight_decay} at every step"
            )
        config.set("optimizer.weight_decay", start, scheduler.origin("start_weight_decay"))
        for name in ("start_weight_decay", "end_weight_decay"):
            config.set(f"scheduler.{name}", None, scheduler.origin(name))
    if config.dataset.random_seed == config.rng.seed:
        config.set("dataset.random_seed", None, config.dataset.origin("random_seed"))
    if config.dataset.dataloader_type == "single":
        config.set("dataset.dataloader_type", None, config.dataset.origin("dataloader_type"))
    return notes
