"""What a translation is written as: words for a shell, a command, a YAML file or a recipe."""

import json
import re
import shlex
from typing import Any

from lockstep.config import ALIASES, all_fields
from lockstep.config.fields import members
from lockstep.recipes.translate import quoted, spell
from lockstep.translation.translate import Translation
from lockstep.translation.words import has_reference, is_reference

_ENVIRONMENT = re.compile(r"\$\{?([A-Za-z_]\w*)(?::?-([^}]*))?\}?")
FORMATS = ("overrides", "recipe", "yaml", "command")


def shell_word(word: str) -> str:
    """Return a word as a shell reads it; a reference such as ``${DATA_PATH}`` stays one that the shell expands."""
    if not has_reference(word):
        return shlex.quote(word)
    return '"' + re.sub(r'([\\"`])', r"\\\1", word) + '"'


def override(key: str, value: Any, deferred: bool = False) -> str:
    """Return ``key=value`` in Hydra's grammar."""
    return f"{key}={value}" if deferred else f"{key}={_spell(value)}"


def _spell(value: Any) -> str:
    if isinstance(value, str) and has_reference(value):
        return quoted(value, "'")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and is_reference(value[0]):
        return _spell(value[0])  # the variable may hold several words, and a text is split where a list is due
    if isinstance(value, list):
        return "[" + ",".join(_spell(item) for item in value) + "]"
    return spell(value)


def words(translation: Translation) -> list[str]:
    """Return the words of the other side's command line: overrides, or flags with their values."""
    if translation.target == "megatron-lm":
        return [word for flag in translation.assignments.values() for word in flag]
    return [override(key, value, key in translation.deferred) for key, value in translation.assignments.items()]


def emit(translation: Translation, form: str, *, name: str = "", processes: int = 1) -> str:
    """Return a translation in one of ``FORMATS``.

    Args:
        translation: what to write.
        form: the format.
        name: name of the recipe to write.
        processes: how many processes the command starts.
    """
    if form == "overrides":
        return "".join(f"{line}\n" for line in _lines(translation))
    if form == "command":
        return _command(translation, processes)
    if form == "yaml":
        return _yaml(translation)
    return _recipe(translation, name)


def _lines(translation: Translation) -> list[str]:
    if translation.target == "megatron-lm":
        return [" ".join(map(shell_word, flag)) for flag in translation.assignments.values()]
    return [shell_word(word) for word in words(translation)]


def _command(translation: Translation, processes: int) -> str:
    script = "3rdparty/Megatron-LM/pretrain_gpt.py"
    if translation.target != "megatron-lm":
        script = f"scripts/training/run_recipe.py --recipe {translation.recipe}"
    first = f"python -m torch.distributed.run --nproc_per_node={processes} {script}"
    return " \\\n    ".join([first, *_lines(translation)]) + "\n"


def _yaml(translation: Translation) -> str:
    import yaml

    if translation.target == "megatron-lm":
        arguments = {flag[0]: _argument(flag[1:]) for flag in _flags(translation)}
        return str(yaml.safe_dump({"MODEL_ARGS": arguments}, sort_keys=False))
    tree: dict[str, Any] = {}
    for key, value in translation.assignments.items():
        section, _, leaf = key.partition(".")
        if leaf:
            tree.setdefault(section, {})[leaf] = _environment(value)
        else:
            tree[key] = value
    return f"# Overrides of the recipe {translation.recipe}.\n{yaml.safe_dump(tree, sort_keys=False)}"


def _flags(translation: Translation) -> list[list[str]]:
    """Return each flag with its values; what stands for two flags is taken apart."""
    result: list[list[str]] = []
    for spelled in translation.assignments.values():
        for word in spelled:
            if word.startswith("--"):
                result.append([word])
            else:
                result[-1].append(word)
    return result


def _argument(values: list[str]) -> Any:
    if not values:
        return True
    return values[0] if len(values) == 1 else f"[{' '.join(map(shlex.quote, values))}]"


def _environment(value: Any) -> Any:
    """Return a value whose shell references are references to the environment in OmegaConf's spelling."""
    if isinstance(value, list):
        return [_environment(item) for item in value]
    if not isinstance(value, str):
        return value
    return _ENVIRONMENT.sub(_oc_env, value)


def _oc_env(match: re.Match[str]) -> str:
    default = "" if match[2] is None else f",{match[2]}"
    return "${oc.env:" + match[1] + default + "}"


def _recipe(translation: Translation, name: str) -> str:
    of_lockstep = translation.target == "lockstep"
    return _lockstep_recipe(translation, name) if of_lockstep else _bridge_recipe(translation, name)


def _reasons(translation: Translation) -> dict[str, str]:
    return {key: d.reason for d in translation.differing for key in d.written}


def _python(value: Any) -> str:
    """Return a value as Python writes it; shell references read the environment."""
    if isinstance(value, list):
        return "[" + ", ".join(_python(item) for item in value) + "]"
    if not isinstance(value, str) or not has_reference(value):
        return json.dumps(value) if isinstance(value, str) else repr(value)
    pieces, end = [], 0
    for match in _ENVIRONMENT.finditer(value):
        pieces.append(value[end : match.start()].replace("{", "{{").replace("}", "}}"))
        default = "" if match[2] is None else f", {match[2]!r}"
        pieces.append("{environ.get(" + f"{match[1]!r}{default})}}" if default else "{environ[" + f"{match[1]!r}]}}")
        end = match.end()
    text = "".join([*pieces, value[end:].replace("{", "{{").replace("}", "}}")]).replace('"', '\\"')
    return f'f"{text}"'


def _lockstep_recipe(translation: Translation, name: str) -> str:
    reasons = _reasons(translation)
    lines = []
    for key, value in translation.assignments.items():
        text = _value(key, value, translation)
        comment = f"  # not set by the flags: {reasons[key]}" if key in reasons else ""
        lines.append(f'    "{key}": {text},{comment}\n')
    base = f'get_recipe("{translation.recipe}")'
    return f'''"""A recipe translated from Megatron-LM flags."""

from os import environ

from lockstep.config import ConfigContainer, Origin
from lockstep.recipes.catalog import get_recipe
from lockstep.recipes.registry import recipe

DIFFERENCES = {{
{"".join(lines)}}}


@recipe
def {name}() -> ConfigContainer:
    """Return {translation.recipe} with the values of the flags."""
    config = {base}
    for path, value in DIFFERENCES.items():
        config.set(path, value, Origin("recipe", "{name}"))
    return config
'''


def _kinds(path: str) -> tuple[Any, ...]:
    return members(all_fields()[path].type) if path in all_fields() else ()


_PRELUDES: tuple[tuple[str, str, str], ...] = (
    (
        "model.hybrid_",
        "from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider",
        "config.model = HybridModelProvider()",
    ),
    (
        "model.multi_latent_attention",
        "from megatron.bridge.models.mla_provider import MLAModelProvider",
        "config.model = MLAModelProvider()",
    ),
    (
        "mixed_precision.",
        "from megatron.bridge.training.mixed_precision import get_mixed_precision_config",
        "config.mixed_precision = get_mixed_precision_config(config.mixed_precision)",
    ),
    (
        "ft.",
        "from megatron.bridge.training.config import FaultToleranceConfig",
        "config.ft = FaultToleranceConfig()",
    ),
    (
        "straggler.",
        "from megatron.bridge.training.config import StragglerDetectionConfig",
        "config.straggler = StragglerDetectionConfig()",
    ),
    (
        "inprocess_restart.",
        "from megatron.bridge.training.config import InProcessRestartConfig",
        "config.inprocess_restart = InProcessRestartConfig()",
    ),
)
"""What a recipe of Bridge has to create before it can set keys that begin so: prefix, import, statement."""


def _bridge_recipe(translation: Translation, name: str) -> str:
    reasons = _reasons(translation)
    used = [p for p in _PRELUDES if any(key.startswith(p[0]) for key in translation.assignments)]
    preset = translation.assignments.get("mixed_precision")
    lines = [f"    config.mixed_precision = {_python(preset)}\n"] if preset else []
    lines += [f"    {statement}\n" for _, _, statement in used]
    for key, value in translation.assignments.items():
        if key != "mixed_precision" or value is None:
            comment = f"  # not set by the flags: {reasons[key]}" if key in reasons else ""
            lines.append(f"    config.{key} = {_value(key, value, translation)}{comment}\n")
    imports = "".join(f"{line}\n" for _, line, _ in used)
    return f'''"""A Megatron Bridge recipe translated from Megatron-LM flags."""

from os import environ

{imports}from megatron.bridge.recipes.gpt import {translation.recipe}
from megatron.bridge.training.config import ConfigContainer


def {name}() -> ConfigContainer:
    """Return {translation.recipe} with the values of the flags."""
    config = {translation.recipe}()
{"".join(lines)}    return config
'''


def _value(key: str, value: Any, translation: Translation) -> str:
    """Return a value as Python writes it; what only the job's shell knows becomes a number where it has to be one."""
    text = _python(value)
    if key not in translation.deferred:
        return text
    kinds = _kinds(ALIASES.get(key, key))
    kind = "int" if int in kinds else "float" if float in kinds else ""
    return f"{kind}({text})" if kind else text
