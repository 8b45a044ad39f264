"""Output projection and cross entropy in one step, without float32 logits of all tokens.

The result is that of separate operations: logits rounded to the dtype of the hidden states, cross entropy in float32,
gradient of the logits rounded to the same dtype, then the two gradient products, each rounded once. Tiles of logits
that fit the cache are finished before the next ones are computed; this is most of the time of a small model's step.

Shape legend: t tokens (b * s), h hidden, v vocabulary.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lockstep.models.ops import matmul_mode, runs_triton, widened

_TILE_TOKENS = 2048
_CPU_TILE_NUMBERS = 1 << 20  # 4 MiB of float32 logits at a time
_GPU_TILE_NUMBERS = 1 << 28

# Takes the log-sum of exponentials over the given rows of the vocabulary and the logit of each label, zero where the
# label is not among them, [t] each; returns both for the whole vocabulary.
Merge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tile_numbers: int | None = None,
    first_row: int = 0,
    merge: Merge | None = None,
) -> Tensor:
    """Return the float32 loss of each token (float64 for a float64 model).

    hidden [..., h] and weight [v, h] have one dtype; labels [...] are int64 below v. The loss has the shape of
    labels. `tile_numbers` bounds how many float32 logits are held at a time; it changes rounding of sums only.
    Backward may be called once.

    Where the weight has only the vocabulary's rows from `first_row` on, `merge` completes what was found for them, and
    the gradient of hidden is that through these rows.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    limit = tile_numbers or (_CPU_TILE_NUMBERS if rows.device.type == "cpu" else _GPU_TILE_NUMBERS)
    if _native(rows):
        passes = _KernelPasses() if runs_triton(rows.device) else _TiledPasses(limit)
        return _NativeLoss.apply(rows, weight, labels.reshape(-1) - first_row, passes, merge).view(labels.shape)
    low_precision = rows.dtype in (torch.bfloat16, torch.float16)
    keep = low_precision and torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    return _TiledLoss.apply(rows, weight, labels.reshape(-1) - first_row, limit, keep, merge).view(labels.shape)


def _native(rows: Tensor) -> bool:
    low_precision = rows.dtype in (torch.bfloat16, torch.float16)
    return low_precision and matmul_mode(rows.device, rows.dtype) == "native"


class _TiledLoss(torch.autograd.Function):
    """float32 products over tiles of tokens times vocabulary rows.

    Low-precision logits are kept for the backward pass at two bytes each; float32 ones are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tile_numbers: int, keep: bool, merge: Merge | None
    ) -> Tensor:
        tiles = _Tiles(hidden, weight, tile_numbers)
        tile_log_sums, target = [], tiles.hidden32.new_zeros(labels.shape)
        for columns in tiles.columns:
            log_sums = torch.empty_like(target)
            for rows in tiles.rows:
                logits = tiles.computed(rows, columns, keep=keep)
                inside, position = _clamped(labels[rows] - columns.start, columns.stop - columns.start)
                target[rows] = logits.gather(1, position[:, None])[:, 0].where(inside, target[rows])
                log_sums[rows] = _log_sum_exp_(logits)
            tile_log_sums.append(log_sums)
        log_sum = torch.logsumexp(torch.stack(tile_log_sums), dim=0)
        if merge is not None:
            log_sum, target = merge(log_sum, target)
        ctx.save_for_backward(labels, log_sum)
        ctx.tiles = tiles
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        labels, log_sum = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        scale = widened(grads[0])[:, None]
        grad_hidden = torch.zeros_like(tiles.hidden32)
        grad_weight = products = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty(tiles.weight32.shape, dtype=tiles.dtype, device=labels.device)
            products = tiles.weight32.new_empty(tiles.columns[0].stop, tiles.weight32.shape[1])
        for columns in tiles.columns:
            product = None if products is None else products[: columns.stop - columns.start]
            for rows in tiles.rows:
                gradient = tiles.kept_or_computed(rows, columns).sub_(log_sum[rows, None]).exp_()
                inside, position = _clamped(labels[rows] - columns.start, columns.stop - columns.start)
                gradient[tiles.numbers[: len(gradient)], position] -= inside.to(gradient.dtype)
                gradient = tiles.rounded_(gradient.mul_(scale[rows]))
                grad_hidden[rows].addmm_(gradient, tiles.weight32[columns])
                if product is not None:
                    beta = 0.0 if rows.start == 0 else 1.0
                    torch.addmm(product, gradient.t(), tiles.hidden32[rows], beta=beta, out=product)
            if grad_weight is not None and product is not None:
                grad_weight[columns] = product
        return grad_hidden.to(tiles.dtype), grad_weight, None, None, None, None


class _Tiles:
    """The logits, cut into tiles of tokens (rows) times vocabulary (columns) that share one buffer."""

    def __init__(self, hidden: Tensor, weight: Tensor, tile_numbers: int):
        tokens, vocab = hidden.shape[0], weight.shape[0]
        height = max(1, min(tokens, _TILE_TOKENS, tile_numbers))
        width = max(1, min(vocab, tile_numbers // height))
        self.rows = [slice(start, min(start + height, tokens)) for start in range(0, tokens, height)]
        self.columns = [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]
        self.numbers = torch.arange(height, device=hidden.device)
        self.dtype = hidden.dtype
        self.hidden32, self.weight32 = widened(hidden), widened(weight)
        self.buffer = self.hidden32.new_empty(height * width)
        self.low_buffer = torch.empty(height * width, dtype=hidden.dtype, device=hidden.device)
        self.kept: dict[tuple[int, int], Tensor] = {}

    def computed(self, rows: slice, columns: slice, *, keep: bool) -> Tensor:
        """Return a tile of rounded logits as float32 [rows, columns], in the shared buffer."""
        tile = self._buffer_of(rows, columns)
        torch.mm(self.hidden32[rows], self.weight32[columns].t(), out=tile)
        if keep:
            low = self.kept[rows.start, columns.start] = tile.to(self.dtype)
            return tile.copy_(low)
        return self.rounded_(tile)

    def kept_or_computed(self, rows: slice, columns: slice) -> Tensor:
        """Return the same tile again, releasing what was kept of it."""
        low = self.kept.pop((rows.start, columns.start), None)
        if low is None:
            return self.computed(rows, columns, keep=False)
        return self._buffer_of(rows, columns).copy_(low)

    def rounded_(self, tile: Tensor) -> Tensor:
        """Round a float32 tile in place to the values the dtype of the hidden states has."""
        if self.dtype == self.buffer.dtype:
            return tile
        low = self.low_buffer[: tile.numel()].view(tile.shape)
        return tile.copy_(low.copy_(tile))

    def _buffer_of(self, rows: slice, columns: slice) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return self.buffer[: shape[0] * shape[1]].view(shape)


def _log_sum_exp_(logits: Tensor) -> Tensor:
    """Return log(sum(exp(logits))) of each row; overwrites the logits."""
    highest = logits.amax(dim=1)
    return logits.sub_(highest[:, None]).exp_().sum(dim=1).log_().add_(highest)


def _clamped(labels: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Return which labels are from 0 to below `vocab`, and all labels moved there; a GPU is not waited for."""
    return (labels >= 0) & (labels < vocab), labels.clamp(0, vocab - 1)


class _Passes(Protocol):
    """The float32 arithmetic on low-precision logits [t, v]."""

    def log_sums(self, logits: Tensor) -> Tensor:
        """Return log(sum(exp(logits))) of each row."""

    def put_gradients(self, logits: Tensor, log_sum: Tensor, labels: Tensor, grad: Tensor) -> None:
        """Put the gradient of the logits in their place, for the gradient [t] of the losses."""


class _TiledPasses:
    """Some tokens at a time, through float32 copies of their logits."""

    def __init__(self, tile_numbers: int):
        self._tile_numbers = tile_numbers

    def log_sums(self, logits: Tensor) -> Tensor:
        return torch.cat([_log_sum_exp_(block.float()) for block in logits.split(self._height(logits))])

    def put_gradients(self, logits: Tensor, log_sum: Tensor, labels: Tensor, grad: Tensor) -> None:
        height = self._height(logits)
        index = torch.arange(min(height, labels.shape[0]), device=labels.device)
        for start in range(0, labels.shape[0], height):
            span = slice(start, start + height)
            gradient = logits[span].float().sub_(log_sum[span, None]).exp_()
            inside, position = _clamped(labels[span], logits.shape[1])
            gradient[index[: len(gradient)], position] -= inside.float()
            logits[span] = gradient.mul_(grad[span, None])

    def _height(self, logits: Tensor) -> int:
        return max(1, self._tile_numbers // logits.shape[1])


class _KernelPasses:
    """All tokens at once, in one Triton kernel each way."""

    def log_sums(self, logits: Tensor) -> Tensor:
        from lockstep.models import loss_kernels

        return loss_kernels.log_sums(logits)

    def put_gradients(self, logits: Tensor, log_sum: Tensor, labels: Tensor, grad: Tensor) -> None:
        from lockstep.models import loss_kernels

        loss_kernels.put_gradients(logits, log_sum, labels, grad)


class _NativeLoss(torch.autograd.Function):
    """Low-precision products of whole tensors, and passes over the logits, whose place their gradient takes."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, passes: _Passes, merge: Merge | None
    ) -> Tensor:
        logits = hidden @ weight.t()
        log_sum = passes.log_sums(logits)
        inside, position = _clamped(labels, weight.shape[0])
        target = logits.gather(1, position[:, None])[:, 0].float().masked_fill(~inside, 0.0)
        if merge is not None:
            log_sum, target = merge(log_sum, target)
        ctx.save_for_backward(hidden, weight, labels, log_sum)
        ctx.logits, ctx.passes = logits, passes
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, labels, log_sum = ctx.saved_tensors
        logits: Tensor = ctx.logits
        ctx.logits = None
        ctx.passes.put_gradients(logits, log_sum, labels, grads[0].contiguous())
        grad_weight = logits.t() @ hidden if ctx.needs_input_grad[1] else None
        return logits @ weight, grad_weight, None, None, None
