"""Exchanges between the processes of an axis, each with its counterpart in the backward pass.

Shape legend: b batch, s sequence, h hidden; s is dimension 1 everywhere.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from lockstep.parallel.mesh import Axis

_SEQUENCE = 1


def copied(x: Tensor, axis: Axis) -> Tensor:
    """Return x, which is equal on all processes; backward adds up the gradients that they find for it."""
    return _Copied.apply(x, axis)


def added(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of x over the processes; backward hands the gradient, equal on all, to each."""
    return _Added.apply(x, axis)


def joined(x: Tensor, axis: Axis) -> Tensor:
    """Return the parts [b, s / size, ...] end to end, [b, s, ...]; backward adds up and splits."""
    return _Joined.apply(x, axis)


def whole(x: Tensor, axis: Axis) -> Tensor:
    """Return the whole sequence [b, s, h] from the parts, for work that all processes repeat; backward splits."""
    return _Whole.apply(x, axis)


def added_and_split(x: Tensor, axis: Axis) -> Tensor:
    """Return this process's part of the sequence of the sum of x over the processes; backward joins."""
    return _AddedAndSplit.apply(x, axis)


def sent(x: Tensor, axis: Axis, rows: list[int], received: list[int]) -> Tensor:
    """Send the first ``rows[0]`` rows of x to the first process and so on, and return what comes; backward returns."""
    return _Sent.apply(x, axis, rows, received)


def stacked(x: Tensor, axis: Axis) -> Tensor:
    """Return x of all processes [size, ...]; backward adds up the gradients that they find for it."""
    return _Stacked.apply(x, axis)


def split_sum(x: Tensor, axis: Axis) -> Tensor:
    """Return this process's row of the sum of x [size, ...] over the processes; backward stacks."""
    return _SplitSum.apply(x, axis)


def _join(x: Tensor, axis: Axis) -> Tensor:
    parts = axis.stacked(x)  # [size, b, s / size, h]
    return parts.movedim(0, _SEQUENCE).flatten(_SEQUENCE, _SEQUENCE + 1)


def _add_and_split(x: Tensor, axis: Axis) -> Tensor:
    return axis.split_sum(x.unflatten(_SEQUENCE, (axis.size, -1)).movedim(_SEQUENCE, 0))


class _Copied(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.sum_(grads[0].contiguous().clone()), None


class _Added(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return axis.sum_(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Joined(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _join(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _add_and_split(grads[0], ctx.axis), None


class _Whole(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _join(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.axis.size, dim=_SEQUENCE)[ctx.axis.rank].contiguous(), None


class _AddedAndSplit(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _add_and_split(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _join(grads[0], ctx.axis), None


class _Sent(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, rows: list[int], received: list[int]) -> Tensor:
        ctx.axis, ctx.rows, ctx.received = axis, rows, received
        return axis.exchanged(x, rows, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.exchanged(grads[0], ctx.received, ctx.rows), None, None, None


class _Stacked(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return axis.stacked(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.split_sum(grads[0]), None


class _SplitSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return axis.split_sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.stacked(grads[0]), None
