"""A section of the config tree: a dataclass that knows its fields, checks every assignment and remembers its source."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lockstep.config.fields import FieldInfo, coerce, describe, section_fields
from lockstep.errors import ConfigError, nearest

OriginKind = Literal["default", "recipe", "hf", "file", "command line", "python", "checkpoint", "derived"]


@dataclass(frozen=True)
class Origin:
    """Where a value came from: the kind of source and its detail (flag, key, recipe name or rule)."""

    kind: OriginKind = "default"
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


DEFAULT = Origin()


@dataclass(frozen=True)
class Ref:
    """A value that follows another field, written ``${optimizer.lr}``; the resolve step replaces it."""

    path: str

    def __str__(self) -> str:
        return "${" + self.path + "}"


class Section:
    """Base of all sections. Assigning an unknown field or a value of another type raises ``ConfigError``."""

    section_name: ClassVar[str]
    _origins: dict[str, Origin]

    def __post_init__(self) -> None:
        given = {
            info.name: Origin("python") for info in self.fields().values() if getattr(self, info.name) != info.default
        }
        object.__setattr__(self, "_origins", given)

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """Return the declared fields by name."""
        return section_fields(cls.section_name, cls)  # type: ignore[arg-type]  # classes hash; mypy sees the instance's

    def __setattr__(self, name: str, value: Any) -> None:
        self.assign(name, value, Origin("python"))

    def assign(self, name: str, value: Any, origin: Origin) -> None:
        """Set a field and record where the value came from.

        Raises:
            ConfigError: no such field, or the value has another type; names the dotted path and what it expects.
        """
        info = self.fields().get(name)
        if info is None:
            known = [field.path for field in self.fields().values()]
            path = f"{self.section_name}.{name}"
            raise ConfigError(f"unknown key {path}.{nearest(path, known)}")
        if not isinstance(value, Ref):
            try:
                value = coerce(value, info)
            except ValueError as error:
                spelled = describe(info.type) if not info.spec.choices else str(error)
                raise ConfigError(f"{info.path}: expected {spelled}, got {value!r}") from None
        object.__setattr__(self, name, value)
        if "_origins" in self.__dict__:
            self._origins[name] = origin

    def origin(self, name: str) -> Origin:
        """Return where the field's present value came from."""
        return self._origins.get(name, DEFAULT)

    def items(self) -> list[tuple[FieldInfo, Any, Origin]]:
        """Return every field with its value and origin, in declared order."""
        return [(info, getattr(self, name), self.origin(name)) for name, info in self.fields().items()]

    def as_dict(self) -> dict[str, Any]:
        """Return the values by field name, fit for JSON."""
        return {
            f.name: str(v) if isinstance(v := getattr(self, f.name), Ref) else v
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
        }
