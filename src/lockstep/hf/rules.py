"""How one parameter of Lockstep and its tensors of Hugging Face become each other.

Shape legend: n query heads, g key/value groups, d head dim, h hidden, v vocabulary, f inner width of the MLP.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lockstep.config.model import ModelConfig
from lockstep.errors import UserError
from lockstep.models import GPTModel
from lockstep.models.layers import required


@dataclass(frozen=True)
class Sizes:
    """The sizes that transformations need; ``padded`` are Lockstep's rows of the vocabulary, ``vocabulary`` theirs."""

    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    padded: int

    @classmethod
    def of(cls, model: ModelConfig, vocabulary: int) -> "Sizes":
        """Return the sizes of a resolved config beside a Hugging Face vocabulary."""
        heads, groups = required(model.num_attention_heads), required(model.num_query_groups)
        return cls(heads, groups, required(model.kv_channels), vocabulary, required(model.vocab_size))


class Form(Protocol):
    """A transformation without loss; ``split`` takes tensors of the meta device too."""

    def split(self, whole: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        """Return their tensors of our parameter."""
        ...

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        """Return our parameter of their tensors."""
        ...


class Same:
    """One tensor, as it is."""

    def split(self, whole: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        """Return it."""
        return (whole,)

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        """Return it."""
        return parts[0]


class Transposed:
    """A weight [o, h], which GPT-2's Conv1D keeps as [h, o]."""

    def split(self, whole: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        """Return [h, o]."""
        return (whole.t(),)

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        """Return [o, h]."""
        return parts[0].t()


class Vocabulary:
    """A table [v, h] with as many rows as the padded vocabulary; rows of padding are zero, and dropped."""

    def split(self, whole: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        """Return the rows of real tokens."""
        return (whole[: sizes.vocabulary],)

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        """Return the rows with those of padding."""
        (rows,) = parts
        padding = sizes.padded - len(rows)
        return torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])]) if padding else rows


class Grouped:
    """Query, key and value: per group its query heads, its key, its value, d rows each; theirs one after another."""

    def split(self, whole: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        """Return query [n * d, ...], key and value [g * d, ...]."""
        per_group = sizes.heads // sizes.groups
        groups = whole.unflatten(0, (sizes.groups, per_group + 2, sizes.head_dim))
        query, key, value = groups.split([per_group, 1, 1], dim=1)
        return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        """Return the rows [(n + 2 * g) * d, ...]."""
        groups = [part.unflatten(0, (sizes.groups, -1, sizes.head_dim)) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class GroupedInOne:
    """The same in one tensor of theirs, query, key and value one after another, perhaps transposed."""

    transposed: bool

    def split(self, whole: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        """Return their tensor."""
        rows = torch.cat(Grouped().split(whole, sizes))
        return (rows.t() if self.transposed else rows,)

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        """Return our rows."""
        rows = parts[0].t() if self.transposed else parts[0]
        width = sizes.groups * sizes.head_dim
        return Grouped().join(rows.split([sizes.heads * sizes.head_dim, width, width]), sizes)


class Gated:
    """The gate [f, h] and the other half [f, h] of a gated MLP."""

    def split(self, whole: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        """Return gate and rest."""
        gate, rest = whole.chunk(2)
        return gate, rest

    def join(self, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
        """Return both, one after the other."""
        return torch.cat(list(parts))


@dataclass(frozen=True)
class Rule:
    """A parameter's name and its tensors' names; ``{layer}`` and ``{expert}`` stand for numbers, on both sides."""

    ours: str
    theirs: tuple[str, ...]
    form: Form

    def names(self, parameter: str) -> tuple[str, ...] | None:
        """Return their names of a parameter, None where the rule is of others."""
        pattern = (
            re.escape(self.ours).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
        )
        match = re.fullmatch(pattern, parameter)
        return None if match is None else tuple(name.format(**match.groupdict()) for name in self.theirs)


@dataclass(frozen=True)
class Mapped:
    """A parameter of a model: its name and shape, the names and shapes of its tensors, and how they become it."""

    name: str
    shape: tuple[int, ...]
    theirs: dict[str, tuple[int, ...]]
    form: Form
    sizes: Sizes

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Return their tensors of the parameter, by name."""
        return dict(zip(self.theirs, self.form.split(whole, self.sizes), strict=True))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the parameter, given its tensors in the order of their names."""
        return self.form.join(parts, self.sizes)


def mapped(rules: Iterable[Rule], model: ModelConfig, vocabulary: int) -> dict[str, Mapped]:
    """Return every parameter of a model, by name and in order, with its place in a Hugging Face model.

    Raises:
        UserError: a parameter has no place there.
    """
    rules, sizes = list(rules), Sizes.of(model, vocabulary)
    result: dict[str, Mapped] = {}
    homeless = []
    for name, parameter in GPTModel(model, dtype=torch.float32, device=torch.device("meta")).named_parameters():
        for rule in rules:
            theirs = rule.names(name)
            if theirs is not None:
                shapes = [tuple(part.shape) for part in rule.form.split(parameter, sizes)]
                named = dict(zip(theirs, shapes, strict=True))
                result[name] = Mapped(name, tuple(parameter.shape), named, rule.form, sizes)
                break
        else:
            homeless.append(name)
    if homeless:
        raise UserError(f"the family has no place for {listed(homeless)}")
    return result


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return names for a message, the first ones where there are many."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
