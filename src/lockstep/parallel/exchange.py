"""Exchanges between the processes of an axis, each with its counterpart in the backward pass.

Shape legend: b batch, s sequence, h hidden; s is dimension 1 everywhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function

from lockstep.parallel.mesh import Axis

_SEQUENCE = 1


def copied(x: Tensor, axis: Axis) -> Tensor:
    """Return x, which is equal on all processes; backward adds up the gradients that they find for it."""
    return _exchanged(x, _same, partial(_sum, axis))


def added(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of x over the processes; backward hands the gradient, equal on all, to each."""
    return _exchanged(x, partial(_sum, axis), _same)


def joined(x: Tensor, axis: Axis) -> Tensor:
    """Return the parts [b, s / size, ...] end to end, [b, s, ...]; backward adds up and splits."""
    return _exchanged(x, partial(_join, axis), partial(_add_and_split, axis))


def whole(x: Tensor, axis: Axis) -> Tensor:
    """Return the whole sequence [b, s, h] from the parts, for work that all processes repeat; backward splits."""
    return _exchanged(x, partial(_join, axis), partial(_own_part, axis))


def part(x: Tensor, axis: Axis) -> Tensor:
    """Return this process's part of the sequence of x, which is equal on all processes; backward joins."""
    return _exchanged(x, partial(_own_part, axis), partial(_join, axis))


def added_and_split(x: Tensor, axis: Axis) -> Tensor:
    """Return this process's part of the sequence of the sum of x over the processes; backward joins."""
    return _exchanged(x, partial(_add_and_split, axis), partial(_join, axis))


def sent(x: Tensor, axis: Axis, rows: list[int], received: list[int]) -> Tensor:
    """Send the first ``rows[0]`` rows of x to the first process and so on, and return what comes; backward returns."""
    return _exchanged(
        x,
        partial(axis.exchanged, sent=rows, received=received),
        partial(axis.exchanged, sent=received, received=rows),
    )


def stacked(x: Tensor, axis: Axis) -> Tensor:
    """Return x of all processes [size, ...]; backward adds up the gradients that they find for it."""
    return _exchanged(x, axis.stacked, axis.split_sum)


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _sum(axis: Axis, x: Tensor) -> Tensor:
    total = axis.sum_(x.contiguous().clone())
    # In torch 2.11 a compiled Function that returns the very tensor which a collective wrote to has no gradient.
    return total.view_as(total)


def _join(axis: Axis, x: Tensor) -> Tensor:
    parts = axis.stacked(x)  # [size, b, s / size, h]
    return parts.movedim(0, _SEQUENCE).flatten(_SEQUENCE, _SEQUENCE + 1)


def _add_and_split(axis: Axis, x: Tensor) -> Tensor:
    return axis.split_sum(x.unflatten(_SEQUENCE, (axis.size, -1)).movedim(_SEQUENCE, 0))


def _own_part(axis: Axis, x: Tensor) -> Tensor:
    return x.chunk(axis.size, dim=_SEQUENCE)[axis.rank].contiguous()


def _exchanged(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    return _Exchange.apply(x, there, back)


class _Exchange(Function):
    """What goes ``there`` in the forward pass, and ``back`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grads[0]), None, None
