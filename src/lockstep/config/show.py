"""The resolved tree as text, with the origin of every value."""

from lockstep.config.container import ConfigContainer
from lockstep.config.fields import Spec


def format_tree(config: ConfigContainer, *, defaults: bool = False) -> str:
    """Return one line a value, ``path = value  # origin``, section by section.

    Values at their default are left out unless ``defaults`` is set.
    """
    lines: list[str] = []
    section = ""
    for info, value, origin in config.items():
        if origin.kind == "default" and not defaults:
            continue
        if info.section != section:
            section = info.section
            lines.append("" if lines else "# Resolved configuration: path = value  # where the value comes from")
        lines.append(f"{info.path} = {value}  # {origin}{_support(info.spec)}")
    return "\n".join(line for line in lines)


def _support(spec: Spec) -> str:
    return f"; accepted: {spec.holds}" if spec.holds else ""
