"""Gradients end to end in buckets: added up over micro-batches, then over the processes that have the same weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.models.expert_weights import runs_of_experts
from lockstep.parallel.mesh import Axis
from lockstep.parallel.mixed import put


@dataclass(frozen=True)
class Reduction:
    """How the gradients of a model are added up.

    Attributes:
        axis: the processes that have the same weights.
        bucket_size: elements after which a bucket is full; neither parameters nor the experts of a linear are cut.
        multiple: each process's part of a bucket is filled up to a multiple of so many elements.
        overlap: start a bucket as soon as its gradients are there, while backward passes go on.
        late: tells by the name of a parameter whether something must be added to its gradients after the last backward
            pass and before the reduction.
        axis_of: the axis of a parameter by its name, where not all have ``axis``.
    """

    axis: Axis = field(default_factory=Axis)
    bucket_size: int = 40_000_000
    multiple: int = 1
    overlap: bool = False
    late: Callable[[str], bool] = lambda name: False
    axis_of: Callable[[str], Axis] | None = None


def bucket_size(config: ConfigContainer, elements: int, processes: int) -> int:
    """Return the elements of a bucket, for a model of so many elements on so many processes with the same weights.

    Unless it is set, it is that of Megatron-LM: 40 million, and 1 million for each process where these are more.
    """
    if config.ddp.num_buckets is not None:
        return max(1, elements // config.ddp.num_buckets)
    return config.ddp.bucket_size or max(40_000_000, 1_000_000 * processes)


class Bucket:
    """Some parameters, end to end and filled up with zeros to equal parts, one for each process of an axis.

    ``grads`` is laid out so. Each process has one row of such a tensor, its part.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        dtype: torch.dtype,
        reduction: Reduction,
        late: bool = False,
        axis: Axis | None = None,
    ) -> None:
        self.params = list(params)
        self.axis = axis or reduction.axis
        self.late = late
        self._sizes = [p.numel() for p in self.params]
        unit = self.axis.size * reduction.multiple
        self.length = -(-sum(self._sizes) // unit) * unit
        self.grads = torch.zeros(self.length, dtype=dtype, device=self.params[0].device)
        self._work: dist.Work | None = None
        self.missing = 0
        self.started = False

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return a tensor of the bucket's layout as tensors of the shapes of its parameters."""
        pieces = flat[: sum(self._sizes)].split(self._sizes)
        return [piece.view_as(p) for piece, p in zip(pieces, self.params, strict=True)]

    def part(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a tensor of the bucket's layout."""
        return flat.view(self.axis.size, -1)[self.axis.rank]

    def pieces(self) -> Iterator[tuple[nn.Parameter, tuple[int, int], slice]]:
        """Yield the parameters of which this process's part has something: which elements, and where they are in it."""
        length = self.length // self.axis.size
        start = -self.axis.rank * length
        for param, size in zip(self.params, self._sizes, strict=True):
            begin, end = max(0, start), min(length, start + size)
            if begin < end:
                yield param, (begin - start, end - start), slice(begin, end)
            start += size

    def reduce(self, sharded: bool) -> None:
        """Start to add up the gradients over the axis; ``sharded``: only this process's part gets the sum."""
        self.started = True
        self._work = (
            self.axis.begin_split_sum(self.grads, self.part(self.grads)) if sharded else self.axis.begin_sum(self.grads)
        )

    def wait(self) -> None:
        """Wait until the sums are there; a GPU waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None


class GradientBuckets:
    """The gradients of the parameters of a model, added up in ``dtype``.

    Hooks take them after each backward pass. A bucket has parameters of one axis. Buckets follow the parameters
    backwards, by the last one of each, late ones last, and are reduced in this order on every process; the experts of a
    linear stay together, by number. With overlap, a
    bucket is started when its last gradient is there; the rest at the end. This changes when sums are taken, and not
    which.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], dtype: torch.dtype, reduction: Reduction, sharded: bool
    ) -> None:
        self._overlap = reduction.overlap and reduction.axis.size > 1  # the axis of most, and the longest
        self._sharded = sharded
        self.buckets: list[Bucket] = []
        units = list(_units_backwards(named))
        place = {param: number for number, (_, param) in enumerate(pair for unit in units for pair in unit)}
        for late in (False, True):
            runs: list[tuple[Axis, list[nn.Parameter]]] = []
            of_axis: dict[int, tuple[Axis, list[list[nn.Parameter]]]] = {}
            for unit in units:
                name = unit[0][0]
                if reduction.late(name) is late:
                    axis = reduction.axis if reduction.axis_of is None else reduction.axis_of(name)
                    of_axis.setdefault(id(axis), (axis, []))[1].append([param for _, param in unit])
            for axis, of_it in of_axis.values():
                runs += [(axis, run) for run in _runs(of_it, reduction.bucket_size)]
            runs.sort(key=lambda pair: place[pair[1][-1]])
            self.buckets += [Bucket(run, dtype, reduction, late, axis) for axis, run in runs]
        self._of = {p: bucket for bucket in self.buckets for p in bucket.params}
        views = {p: v for b in self.buckets for p, v in zip(b.params, b.views(b.grads), strict=True)}
        self._views = {p: views[p] for _, p in named}
        self._arrived: dict[torch.Tensor, int] = {}
        self._expected: int | None = None
        for param in self._views:
            param.register_post_accumulate_grad_hook(self._accumulate)

    def start_step(self, micro_batches: int | None) -> None:
        """Forget the gradients of the step before; each parameter will get as many as there are micro-batches."""
        self._arrived = dict.fromkeys(self._views, 0)
        self._expected = micro_batches if self._overlap else None
        for bucket in self.buckets:
            bucket.missing, bucket.started = len(bucket.params), False
        for param in self._views:
            param.grad = None

    def _accumulate(self, param: torch.Tensor) -> None:
        """Add the gradient of one micro-batch and drop it."""
        assert param.grad is not None, "PyTorch calls the hook after it has set the gradient"
        count = self._arrived.get(param, 0)
        assert isinstance(param, nn.Parameter), "hooks are registered on parameters only"
        assert self._expected is None or count < self._expected, "a parameter has more gradients than micro-batches"
        # The first micro-batch overwrites what the last step left, which spares zeroing.
        put(self._views[param], param.grad, add=bool(count))
        param.grad = None
        self._arrived[param] = count + 1
        if count + 1 == self._expected:
            self._of[param].missing -= 1
            self._start_whole()

    def stop_overlap(self) -> None:
        """Start no bucket before all gradients of a step are there."""
        self._overlap = False

    @contextmanager
    def noting(self, noted: set[torch.Tensor]) -> Iterator[None]:
        """Within it put the parameters whose gradients arrive into ``noted``."""
        before = dict(self._arrived)
        yield
        noted.update(param for param, count in self._arrived.items() if count > before.get(param, 0))

    def arrived(self, params: Iterable[torch.Tensor]) -> None:
        """Count a gradient of each of these parameters as arrived, where no hook was called for it."""
        assert self._expected is None, "overlap starts buckets by their own gradients"
        for param in params:
            self._arrived[param] = self._arrived.get(param, 0) + 1

    def _start_whole(self) -> None:
        """Start the buckets that have all gradients, up to the first that has not: all processes keep one order."""
        for bucket in self.buckets:
            if bucket.missing or bucket.late:
                return
            if not bucket.started:
                bucket.reduce(self._sharded)

    def collected(self) -> list[torch.Tensor]:
        """Return what each parameter has; zero where no micro-batch reached it. Only late ones may be changed."""
        for param, view in self._views.items():
            if not self._arrived.get(param):
                view.zero_()
        return list(self._views.values())

    def finish(self) -> list[torch.Tensor]:
        """Reduce what is not under way and wait for all; return the gradients, of which only parts count if sharded."""
        for bucket in self.buckets:
            if not bucket.started:
                bucket.reduce(self._sharded)
        for bucket in self.buckets:
            bucket.wait()
        return list(self._views.values())


Named = tuple[str, nn.Parameter]


def _units_backwards(named: Sequence[Named]) -> Iterator[list[Named]]:
    """Yield what is not cut, backwards: a parameter, or the weights of all experts of a linear, by number.

    These are used as one tensor where they lie so, and get their gradients together.
    """
    params = dict(named)
    run_of = {name: run for run in runs_of_experts(params) for name in run}
    for name, param in reversed(named):
        run = run_of.get(name)
        if run is None:
            yield [(name, param)]
        elif name == run[-1]:
            yield [(each, params[each]) for each in run]


def _runs(units: Iterable[list[nn.Parameter]], size: int) -> Iterator[list[nn.Parameter]]:
    """Cut parameters into runs of at least so many elements each, but for the last, between units only."""
    run: list[nn.Parameter] = []
    for unit in units:
        run += unit
        if sum(p.numel() for p in run) >= size:
            yield run
            run = []
    if run:
        yield run
