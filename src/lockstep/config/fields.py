"""How a field of the config tree is declared: its default, its Megatron-LM flag, and what Lockstep does with it."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

Effect = Literal["run", "speed", "log", "path"]
"""What a field can change: the training mathematics, speed only, logging only, or a location only."""

_SPEC = "lockstep"


@dataclass(frozen=True)
class Spec:
    """What the tree knows of one field beyond its type and default.

    Attributes:
        flags: Megatron-LM flag and its aliases; empty when Megatron-LM has none.
        negated: the flag takes no value and sets the field to False.
        help: one sentence for the reference pages.
        holds: why every legal value is accepted although no code branches on it.
        refused: why a value other than those in ``only`` is refused.
        only: the accepted values of a refused field; the default when empty.
        choices: legal values that the type does not spell out.
        effect: what the field can change; see ``Effect``.
    """

    flags: tuple[str, ...] = ()
    negated: bool = False
    help: str = ""
    holds: str = ""
    refused: str = ""
    only: tuple[Any, ...] = ()
    choices: tuple[Any, ...] = ()
    effect: Effect = "run"

    @property
    def support(self) -> Literal["implemented", "holds", "refused"]:
        """What Lockstep does with the field."""
        return "refused" if self.refused else "holds" if self.holds else "implemented"


def opt(default: Any, *flags: str, **spec: Any) -> Any:
    """Declare a field of a config section; ``spec`` are the attributes of ``Spec``. Mutable defaults are copied."""
    metadata = {_SPEC: Spec(flags=flags, **spec)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FieldInfo:
    """A field with its place in the tree: ``path`` is dotted (``model.num_layers``), ``type`` its annotation."""

    path: str
    section: str
    name: str
    type: Any
    default: Any
    spec: Spec

    @property
    def accepted(self) -> tuple[Any, ...]:
        """The values a refused field still takes."""
        return self.spec.only or (self.default,)


@cache
def section_fields(section: str, cls: type) -> dict[str, FieldInfo]:
    """Return the declared fields of a section class by name."""
    hints = typing.get_type_hints(cls)
    infos = {}
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        infos[f.name] = FieldInfo(f"{section}.{f.name}", section, f.name, hints[f.name], default, f.metadata[_SPEC])
    return infos


def is_optional(annotation: Any) -> bool:
    """Tell whether the annotation admits None."""
    return type(None) in members(annotation)


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def describe(annotation: Any) -> str:
    """Spell an annotation for an error message: ``int``, ``one of a, b``, ``list of int``."""
    parts = []
    for member in members(annotation):
        origin = typing.get_origin(member)
        if member is type(None):
            parts.append("null")
        elif origin is Literal:
            parts.append("one of " + ", ".join(str(arg) for arg in typing.get_args(member)))
        elif origin is list:
            parts.append("list of " + describe(typing.get_args(member)[0]))
        elif origin is dict:
            parts.append("mapping")
        else:
            parts.append(member.__name__)
    return " or ".join(parts)


def choices_of(info: FieldInfo) -> Iterator[Any]:
    """Yield the legal values a field spells out, if it does."""
    yield from info.spec.choices
    for member in members(info.type):
        if typing.get_origin(member) is Literal:
            yield from typing.get_args(member)


def coerce(value: Any, info: FieldInfo) -> Any:
    """Return ``value`` as the field's type.

    An int is taken for a float and an integral float such as ``1e3`` for an int; nothing else changes type.

    Raises:
        ValueError: the value has another type or is not one of the choices; the message says what is expected.
    """
    converted = _coerce(value, info.type)
    if info.spec.choices and converted is not None and converted not in info.spec.choices:
        raise ValueError("one of " + ", ".join(map(str, info.spec.choices)))
    return converted


def _coerce(value: Any, annotation: Any) -> Any:
    for member in members(annotation):
        origin = typing.get_origin(member)
        if member is type(None):
            if value is None:
                return None
        elif origin is Literal:
            if any(
                value == arg and isinstance(value, bool) == isinstance(arg, bool) for arg in typing.get_args(member)
            ):
                return value
        elif origin is list:
            if isinstance(value, list | tuple):
                item = typing.get_args(member)[0]
                return [_coerce(v, item) for v in value]
        elif origin is dict:
            if isinstance(value, dict):
                return dict(value)
        elif member is bool:
            if isinstance(value, bool):
                return value
        elif member is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if isinstance(value, float) and value.is_integer():
                return int(value)
        elif member is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        elif isinstance(value, member):
            return value
    raise ValueError(describe(annotation))
