"""The tables of the page on moving a run, generated from the tree: each stands between two markers."""

import re
from collections.abc import Callable

from lockstep.config import all_fields
from lockstep.megatron_lm.composites import COMPOSITES
from lockstep.recipes.catalog import get_recipe
from lockstep.recipes.translate import DEFAULT_RECIPE
from lockstep.translation import bridge
from lockstep.translation.classify import shown
from lockstep.translation.differing import REASONS, reason
from lockstep.translation.elsewhere import FAMILIES
from lockstep.translation.spellings import SPELLINGS

_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str) -> str:
    """Return a page with the text between its markers generated anew.

    Raises:
        KeyError: a marker names no table.
    """
    return _BLOCK.sub(lambda match: f"{match[1]}\n{_TABLES[match[2]]()}\n{match[3]}", page)


def _code(value: object) -> str:
    return f"`{shown(value)}`".replace("|", "\\|")


def _keys(path: str) -> str:
    return ", ".join(f"`{key}`" for key in bridge.keys(path)) or "none"


def _mapping() -> str:
    text, section = "", ""
    for info in all_fields().values():
        if not info.spec.flags:
            continue
        if info.section != section:
            section = info.section
            text += f"\n### {section}\n\n| Megatron-LM | Lockstep | Megatron Bridge |\n|---|---|---|\n"
        flags = ", ".join(f"`{flag}`" for flag in info.spec.flags)
        value = "=false" if info.spec.negated else ""
        text += f"| {flags} | `{info.path}{value}` | {_keys(info.path)} |\n"
    return text.lstrip("\n")


def _shorthands() -> str:
    rows = {c.flag: ", ".join(f"`{path}={shown(value)}`" for path, value in c.sets.items()) for c in COMPOSITES}
    for flag, spelling in SPELLINGS.items():
        sets = ", ".join(f"`{path}={shown(value)}`" for path, value in spelling.sets.items())
        rows[flag] = f"`{spelling.path}`" if spelling.path else sets or spelling.inert or rows.get(flag, "")
    rows["--group-query-attention"] = "`model.num_query_groups`, 1 unless `--num-query-groups` says otherwise"
    rows["--num-layers-per-virtual-pipeline-stage"] = "`model.virtual_pipeline_model_parallel_size`, computed"
    text = "| Megatron-LM | stands for |\n|---|---|\n"
    for flag, stands in sorted(rows.items()):
        text += f"| `{flag}` | {stands or 'a choice of kernel'} |\n"
    return text


def _elsewhere() -> str:
    text = "| flags | class | why |\n|---|---|---|\n"
    for family in FAMILIES:
        names = [re.split("[:=/]", entry)[0] for entry in family.flags.split()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        spelled = ", ".join(f"`{name}`" for name in names[:3])
        text += f"| {family.name}: {spelled}{more} | {family.verdict} | {family.reason} |\n"
    return text


def _differing() -> str:
    theirs, ours, recipe = bridge.recipe_values(DEFAULT_RECIPE), all_fields(), get_recipe(DEFAULT_RECIPE)
    text = f"| key | Megatron-LM | Bridge's `{DEFAULT_RECIPE}` | Lockstep's | why it matters |\n|---|---|---|---|---|\n"
    for path, info in ours.items():
        different = theirs[path] != info.default and bool(bridge.keys(path))
        if info.spec.effect == "run" and path in REASONS and (different or recipe.get(path) != info.default):
            values = (info.default, theirs[path], recipe.get(path))
            text += f"| `{path}` | {' | '.join(map(_code, values))} | {reason(path, 'run')} |\n"
    return text


def _versions() -> str:
    text = "| since | key | before |\n|---|---|---|\n"
    for new, old, since in bridge.FORMER:
        text += f"| {since} | `{new}` | `{old}` |\n"
    return text


_TABLES: dict[str, Callable[[], str]] = {
    "mapping": _mapping,
    "shorthands": _shorthands,
    "elsewhere": _elsewhere,
    "differing": _differing,
    "versions": _versions,
}
