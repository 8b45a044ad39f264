"""Expert parallelism: every process of an axis has some of the experts of a layer, and tokens of its own.

Shape legend: b batch, s sequence, t tokens (b * s), h hidden, e experts of all processes, l those of this one, r rows
of its own tokens, n rows that its experts get.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lockstep.models.moe import Dispatcher, Experts, Rows, permuted
from lockstep.models.router import Assignment
from lockstep.parallel.exchange import sent, stacked
from lockstep.parallel.mesh import Axis


def keep_experts(experts: Experts, axis: Axis) -> None:
    """Drop the experts of other processes; those that stay keep their numbers, and so their names."""
    number = len(experts.local_experts)
    mine = range(number)[axis.rank * number // axis.size : (axis.rank + 1) * number // axis.size]
    experts.local_experts = nn.ModuleDict({str(each): experts.local_experts[str(each)] for each in mine})


@dataclass(frozen=True)
class _Arrived(Rows):
    """Rows of all processes for the experts of this one.

    `home` are the rows of this process's own tokens, of which it sends `sent` to each process, and gets `received`;
    row `order[i]` of what arrives, by process and then by expert, is row i here, and the other way round `back`.
    """

    home: Rows
    sent: list[int]
    received: list[int]
    order: Tensor
    back: Tensor


class TravellingDispatcher(Dispatcher):
    """Sends every token to the processes that have its experts, and gets their outputs back: all-to-all."""

    def __init__(self, axis: Axis):
        super().__init__()
        self._axis = axis

    def dispatch(self, x: Tensor, assignment: Assignment) -> Rows:
        """Return the rows [n, h] of all processes for the experts here, by expert, then by process."""
        home = super().dispatch(x, assignment)
        loads = home.ends.diff(prepend=home.ends.new_zeros(1))
        table = self._axis.stacked(loads).unflatten(1, (self._axis.size, -1))  # [from, to, l]
        rows, received = self._numbers(table, len(home.source))
        mine = table[:, self._axis.rank]  # [from, l]
        numbers = torch.arange(mine.shape[1], device=x.device).repeat(self._axis.size)
        order = numbers.repeat_interleave(mine.flatten(), output_size=sum(received)).argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))

        def moved(values: Tensor) -> Tensor:
            return permuted(sent(values[: sum(rows)], self._axis, rows, received), order, back)

        return _Arrived(
            tokens=moved(home.tokens),
            weights=moved(home.weights),
            ends=mine.sum(dim=0).cumsum(dim=0).int(),
            source=order,
            place=back,
            kept=None,
            topk=1,
            shape=home.shape,
            home=home,
            sent=rows,
            received=received,
            order=order,
            back=back,
        )

    def combine(self, output: Tensor, rows: Rows) -> Tensor:
        """Return the sum [b, s, h] over the experts of each token of this process, given the outputs [n, h] of all."""
        assert isinstance(rows, _Arrived), "rows of this dispatcher"
        output = sent(permuted(output, rows.back, rows.order), self._axis, rows.received, rows.sent)
        dropped = len(rows.home.source) - len(output)
        if dropped:
            output = torch.cat([output, output.new_zeros(dropped, output.shape[1])])
        return super().combine(output, rows.home)

    def _numbers(self, table: Tensor, rows: int) -> tuple[list[int], list[int]]:
        """Return how many rows go to and come from each process; on the meta device as many to each."""
        if table.device.type == "meta":
            even = [rows // self._axis.size] * self._axis.size
            return even, even
        numbers: list[list[int]] = table.sum(dim=-1).tolist()
        return numbers[self._axis.rank], [row[self._axis.rank] for row in numbers]


class GatheringDispatcher(Dispatcher):
    """Every process gets the tokens of all, and adds up what its experts return: all-gather and reduce-scatter.

    All sizes are those of the input: the host waits for nothing.
    """

    def __init__(self, axis: Axis):
        super().__init__()
        self._axis = axis

    def gathered(self, x: Tensor) -> Tensor:
        """Return the tokens [size * t, h] of all processes for those [t, h] of this one."""
        return self._axis.stacked(x).flatten(0, 1)

    def split_sum(self, x: Tensor) -> Tensor:
        """Return the sum [t, h] over the processes of x [size * t, h]."""
        return self._axis.split_sum(x.unflatten(0, (self._axis.size, -1)))

    def dispatch(self, x: Tensor, assignment: Assignment) -> Rows:
        """Sort the tokens of all processes by expert; those of experts elsewhere come last, as dropped ones do."""
        experts = self._axis.stacked(assignment.experts).flatten(0, 1)
        number = assignment.number // self._axis.size
        experts = experts - self._axis.rank * number
        kept = (experts >= 0) & (experts < number)
        if assignment.kept is not None:
            kept &= self._axis.stacked(assignment.kept.to(torch.uint8)).flatten(0, 1).bool()
        weights = stacked(assignment.weights, self._axis).flatten(0, 1)
        here = dataclasses.replace(assignment, number=number, experts=experts, weights=weights, kept=kept)
        return super().dispatch(x, here)
