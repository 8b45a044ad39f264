"""What an adapter adds to the product of a linear: LoRA, and DoRA with its magnitudes.

Shape legend: b batch, s sequence, i inputs, o outputs, r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lockstep.models.dropout import DropoutStreams, dropout
from lockstep.models.layers import Linear
from lockstep.models.ops import linear, widened


@dataclass(frozen=True)
class Rows:
    """Whose output a row of a linear is: in each of ``groups`` equal groups the rows of all ``names``, in order.

    ``sizes`` are the rows of each name in all groups together.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int = 1

    def joined(self, parts: Mapping[str, Tensor], dim: int, missing: float = 0.0) -> Tensor:
        """Put what belongs to each name together along ``dim``; ``missing`` for names that ``parts`` lacks."""
        if len(self.names) == 1:
            return parts[self.names[0]]
        like = next(iter(parts.values()))
        dim %= like.dim()
        pieces = []
        for name, size in zip(self.names, self.sizes, strict=True):
            shape = (*like.shape[:dim], size, *like.shape[dim + 1 :])
            part = parts[name] if name in parts else like.new_full(shape, missing)
            pieces.append(part.unflatten(dim, (self.groups, -1)))
        return torch.cat(pieces, dim=dim + 1).flatten(dim, dim + 1)

    def split(self, whole: Tensor, dim: int = 0) -> dict[str, Tensor]:
        """Return what belongs to each name, the reverse."""
        if len(self.names) == 1:
            return {self.names[0]: whole}
        in_group = [size // self.groups for size in self.sizes]
        pieces = whole.unflatten(dim, (self.groups, -1)).split(in_group, dim=dim + 1)
        return {name: piece.flatten(dim, dim + 1) for name, piece in zip(self.names, pieces, strict=True)}

    def part(self, shares: int) -> "Rows":
        """Return the rows of one of so many equal parts."""
        groups = self.groups // shares if self.groups > 1 else 1
        return replace(self, sizes=tuple(size // shares for size in self.sizes), groups=groups)


class Whole:
    """How an adapter works where its linear is whole; layouts that split it have kinds of their own."""

    def spread(self, x: Tensor) -> Tensor:
        """Take what is small, or an input, to where the outputs are computed."""
        return x

    def total(self, squares: Tensor) -> Tensor:
        """Return sums [o] over all inputs, given those over the inputs here."""
        return squares

    def dropped_inputs(self, streams: DropoutStreams, shape: tuple[int, ...], probability: float) -> Tensor:
        """Draw which elements of an input [b, s, i] are dropped."""
        return streams.dropped("hidden", shape, probability)

    def dropped_outputs(self, streams: DropoutStreams, shape: tuple[int, ...], probability: float) -> Tensor:
        """Draw which elements of an output [b, s, o] are dropped."""
        return streams.dropped("hidden", shape, probability)


class LowRank(nn.Module):
    """Two matrices: ``linear_in`` [r, i], then ``linear_out`` [o, r]; with DoRA the lengths [o] of the rows."""

    magnitude: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, settings: "Settings", *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.linear_in = Linear(inputs, settings.rank, bias=False, dtype=dtype, device=device)
        self.linear_out = Linear(settings.rank, outputs, bias=False, dtype=dtype, device=device)
        self.magnitude = None
        if settings.dora:
            self.magnitude = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device))


@dataclass(frozen=True)
class Settings:
    """What all adapters of a model share."""

    rank: int
    scale: float
    dropout: float
    drops_inputs: bool
    dora: bool


class Adapter(nn.Module):
    """Adds ``scale`` times the product of two small matrices for each of ``names`` to the product of a linear.

    With DoRA every row of the sum of both weights is scaled to the length that it is given. Children are the matrices
    by name. ``streams`` are needed to train with dropout.
    """

    def __init__(
        self,
        inputs: int,
        rows: Rows,
        names: Sequence[str],
        settings: Settings,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.rows = rows
        self.settings = settings
        self.part = Whole()
        self.streams: DropoutStreams | None = None
        self.names = tuple(names)
        for name, size in zip(rows.names, rows.sizes, strict=True):
            if name in self.names:
                self.add_module(name, LowRank(inputs, size, settings, dtype=dtype, device=device))

    def pairs(self) -> dict[str, LowRank]:
        """Return the two matrices of each name."""
        return {name: pair for name, pair in self.named_children() if isinstance(pair, LowRank)}

    def forward(self, x: Tensor, product: Tensor, weight: Tensor) -> Tensor:
        """Return the product [..., o] of x [..., i] and the weight [o, i] with what the adapter does to it."""
        seen = self._input(x)
        added = self.added(seen)
        if not self.settings.dora:
            return product + added
        scale = self._scale(weight)
        of_seen = product if seen is x else linear(self.part.spread(seen), weight)
        return product + (scale - 1) * of_seen + scale * added

    def added(self, x: Tensor) -> Tensor:
        """Return what the matrices add [..., o] for x [..., i], scaled."""
        parts = {
            name: linear(self.part.spread(linear(x, pair.linear_in.weight)), pair.linear_out.weight)
            for name, pair in self.pairs().items()
        }
        added = self.rows.joined(parts, dim=-1) * self.settings.scale
        p, streams = self.settings.dropout, self._drawing(inputs=False)
        if streams is None:
            return added
        return dropout(added, self.part.dropped_outputs(streams, tuple(added.shape), p), p)

    def _input(self, x: Tensor) -> Tensor:
        p, streams = self.settings.dropout, self._drawing(inputs=True)
        return x if streams is None else dropout(x, self.part.dropped_inputs(streams, tuple(x.shape), p), p)

    def _drawing(self, inputs: bool) -> DropoutStreams | None:
        """Return the streams to draw from if elements of inputs, or of outputs, are dropped now."""
        if not self.training or self.settings.dropout == 0 or self.settings.drops_inputs is not inputs:
            return None
        if self.streams is None:
            raise ValueError("an adapter with dropout needs random streams to train")
        return self.streams

    def _scale(self, weight: Tensor) -> Tensor:
        """Return what scales every row [o] of the sum of weight and adapter, whose present length is a constant."""
        lengths = self.rows.split(self._lengths(weight))
        scales = {n: pair.magnitude / lengths[n] for n, pair in self.pairs().items() if pair.magnitude is not None}
        return self.rows.joined(scales, dim=0, missing=1.0)

    @torch.no_grad()
    def _lengths(self, weight: Tensor) -> Tensor:
        """Return the length [o] of every row of the sum of weight and adapter."""
        pairs = {name: (pair.linear_in.weight, pair.linear_out.weight) for name, pair in self.pairs().items()}
        total = widened(weight) + delta(pairs, self.rows, self.settings.scale)
        return self.part.total(total.square().sum(dim=1)).sqrt().to(weight.dtype)


def delta(pairs: Mapping[str, tuple[Tensor, Tensor]], rows: Rows, scale: float) -> Tensor:
    """Return what adapters add to a weight, [o, i] in at least float32, given both matrices of each name."""
    products = {name: widened(out) @ widened(inner) for name, (inner, out) in pairs.items()}
    return rows.joined(products, dim=0) * scale
