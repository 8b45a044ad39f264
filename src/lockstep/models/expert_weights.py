"""The weights of a layer's experts as one tensor, which grouped products take: without a copy where they lie so.

Every expert has parameters of its own. Those of one linear are a run; where a run lies end to end in one storage, its
tensor is a view of that.

Shape legend: e experts, o outputs, h inputs of a linear.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_OF_AN_EXPERT = re.compile(r"(.*\.experts\.local_experts)\.(\d+)\.(linear_fc[12]\.weight)")
_ALIGNMENT = 16  # bytes at whose multiples the operands of a grouped product must begin


def runs_of_experts(names: Iterable[str]) -> list[list[str]]:
    """Return, of these parameters, the weights of the experts of each linear of each layer, by number."""
    runs: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if found := _OF_AN_EXPERT.fullmatch(name):
            runs.setdefault((found[1], found[3]), {})[int(found[2])] = name
    return [[run[number] for number in sorted(run)] for run in runs.values()]


class Rooms:
    """Memory for the parameters with some names, in which each run of experts' weights lies end to end."""

    def __init__(self, names: Iterable[str]) -> None:
        self._place = {name: (run[0], i, len(run)) for run in runs_of_experts(names) for i, name in enumerate(run)}
        self._rooms: dict[str, Tensor] = {}

    def placed(self, name: str, value: Tensor) -> Tensor:
        """Return the value [o, h] in its place among those of its run; the value itself where it is in none."""
        if name not in self._place:
            return value
        first, index, number = self._place[name]
        if first not in self._rooms:
            self._rooms[first] = value.new_empty(number, *value.shape)
        return self._rooms[first][index].copy_(value)


def as_one(weights: Sequence[Tensor]) -> Tensor:
    """Return the weights [o, h] of all experts of a linear as [e, o, h], laid out as by ``torch.stack``."""
    joined: Tensor = _View.apply(*weights) if lie_end_to_end(weights) else torch.stack(list(weights))
    return joined


def lie_end_to_end(weights: Sequence[Tensor]) -> bool:
    """Tell whether plain tensors of one shape follow each other in one storage, from where a product may begin."""
    first = weights[0]
    if type(first) not in (nn.Parameter, Tensor):
        return False
    # The identity of the storage: its address is 0 on the meta device.
    storage, start, size, shape = first.untyped_storage()._cdata, first.storage_offset(), first.numel(), first.shape
    if start * first.element_size() % _ALIGNMENT:
        return False
    return all(
        type(weight) is type(first)
        and weight.untyped_storage()._cdata == storage
        and weight.storage_offset() == start + number * size
        and weight.shape == shape
        and weight.dtype == first.dtype
        and weight.is_contiguous()
        for number, weight in enumerate(weights)
    )


class _View(torch.autograd.Function):
    """Tensors end to end as one view of their storage; each gets its slice of the gradient, as it is."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        first = weights[0]
        shape = (len(weights), *first.shape)
        return first.detach().as_strided(shape, (first.numel(), *first.stride()), first.storage_offset())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slices = grads[0].unbind(0)
        return tuple(one if needed else None for one, needed in zip(slices, ctx.needs_input_grad, strict=True))
