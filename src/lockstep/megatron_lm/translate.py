"""The config tree spelled as Megatron-LM flags."""

from typing import Any

from lockstep.config import ConfigContainer, FieldInfo
from lockstep.config.derive import has_data, interpolate
from lockstep.config.fields import members
from lockstep.errors import ConfigError

_ACTIVATIONS = {
    (True, "silu"): ["--swiglu"],
    (True, "quick_gelu"): ["--quick-geglu"],
    (False, "squared_relu"): ["--squared-relu"],
    (False, "openai_gelu"): ["--openai-gelu"],
    (False, "gelu"): [],
}


def flags_from_config(config: ConfigContainer) -> list[str]:
    """Return the flags that give ``config``'s values through the flag door; fields at their default need none.

    Raises:
        ConfigError: a value that no Megatron-LM flag can express; lists all of them.
    """
    spelled, missing = spell_flags(config)
    if missing:
        raise ConfigError(list(missing.values()))
    return [word for words in spelled.values() for word in words]


def spell_flags(config: ConfigContainer) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the flags of every value that is not at its default, and one sentence for each that has none; by path."""
    config = config.copy()
    interpolate(config)
    spelled: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for info, value, _ in config.items():
        if value == info.default or info.path in _SPECIAL:
            continue
        words = words_of(info, value)
        if words is None:
            missing[info.path] = f"{info.path} = {value} has no Megatron-LM flag"
        elif words:
            spelled[info.path] = words
    if config.dataset.mock is None and not has_data(config):
        spelled["dataset.mock"] = ["--mock-data"]
    activation = _activation(config)
    if activation is None:
        gated, name = config.model.gated_linear_unit, config.model.activation_func
        missing["model.activation_func"] = (
            f"model.gated_linear_unit = {gated} with model.activation_func = {name} has no Megatron-LM flag"
        )
    elif activation:
        spelled["model.activation_func"] = activation
    if groups := _query_groups(config):
        spelled["model.num_query_groups"] = groups
    return spelled, missing


def words_of(info: FieldInfo, value: Any) -> list[str] | None:
    """Return the flag that gives a field a value, and its words; None where there is none."""
    if info.path == "ddp.grad_reduce_in_fp32":
        return ["--accumulate-allreduce-grads-in-fp32"] if value else ["--grad-reduce-in-bf16"]
    if info.path == "dataset.mock" and value is False:
        return []
    if not info.spec.flags or value is None:
        return None
    flag = info.spec.flags[0]
    if isinstance(value, bool):
        return [flag] if value is not info.spec.negated else None
    if info.path == "model.window_size":
        return [flag, ",".join(map(str, value))]
    if isinstance(value, list) and str not in members(info.type):
        return [flag, *map(str, value)]
    return [flag, str(value).replace(" ", "") if isinstance(value, list) else str(value)]


_SPECIAL = {"model.gated_linear_unit", "model.activation_func", "model.num_query_groups"}


def _activation(config: ConfigContainer) -> list[str] | None:
    return _ACTIVATIONS.get((config.model.gated_linear_unit, config.model.activation_func))


def _query_groups(config: ConfigContainer) -> list[str]:
    groups = config.model.num_query_groups
    if groups is None or groups == config.model.num_attention_heads:
        return []
    return ["--group-query-attention", "--num-query-groups", str(groups)]
