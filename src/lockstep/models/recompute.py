"""Activation recomputation: what a forward pass did not keep, its backward pass computes again.

The second computation draws the dropout masks of the first and leaves the random streams where it found them, so that
losses, gradients and all later masks are bit for bit those of a run that keeps everything.

Shape legend: b batch, s sequence, h hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lockstep.config.model import ModelConfig
from lockstep.models.dropout import DropoutStreams


def recomputed_chunks(config: ModelConfig, layers: range) -> Iterator[tuple[range, bool]]:
    """Yield the layers of a stage in chunks, each with whether it keeps its input only.

    `uniform`: chunks of `recompute_num_layers`, the last one perhaps shorter. `block`: the first
    `recompute_num_layers` layers, one at a time; the others keep everything.
    """
    full = config.recompute_granularity == "full"
    number = config.recompute_num_layers or len(layers)
    if full and config.recompute_method == "uniform":
        for start in range(0, len(layers), number):
            yield layers[start : start + number], True
        return
    for index in range(len(layers)):
        yield layers[index : index + 1], full and index < number


def recomputes(config: ModelConfig, module: str) -> bool:
    """Tell whether a module of every layer is recomputed: `core_attn`, `layernorm` or `mlp`."""
    return config.recompute_granularity == "selective" and module in (config.recompute_modules or ())


def recomputed(function: Callable[..., Any], *args: Any, streams: DropoutStreams | None = None) -> Any:
    """Return `function(*args)`, keeping nothing but the arguments for its backward pass.

    `streams` are the random streams that the function draws from; what is compiled draws from none. Not for the fused
    loss, whose backward pass works once only.
    """
    if torch.compiler.is_compiling():
        return _recomputed_by_compiler(function, args)
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, streams)
    )


def _recomputed_by_compiler(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Mark what the function computes of its tensors as to be computed again; the compiler takes only tensors so."""
    places = [number for number, value in enumerate(args) if isinstance(value, Tensor)]

    def of_tensors(*tensors: Tensor) -> Any:
        given = list(args)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return function(*given)

    return checkpoint(of_tensors, *(args[n] for n in places), use_reentrant=False, preserve_rng_state=False)


def _contexts(streams: DropoutStreams | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what surrounds the forward pass, which begins at once, and what surrounds its repetition."""
    return nullcontext(), nullcontext() if streams is None else _Rewound(streams)


class _Rewound:
    """Within it the streams are where they were when it was made; after it they are where they were before."""

    def __init__(self, streams: DropoutStreams):
        self._streams = streams
        self._first = streams.state_dict()

    def __enter__(self) -> None:
        self._present = self._streams.state_dict()
        self._streams.load_state_dict(self._first)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The repetition is cut short by an exception once it has all it needs.
        self._streams.load_state_dict(self._present)


@contextmanager
def rebuilt_for_backward(x: Tensor, rebuild: Callable[[], Tensor]) -> Iterator[None]:
    """Within it no operation keeps x [b, s, h] or a view of it for its backward pass: `rebuild()` gives x again."""
    storage = x.untyped_storage()._cdata  # the identity of the storage; its address is 0 on the meta device

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        if saved.untyped_storage()._cdata != storage or saved.dtype != x.dtype:
            return saved
        return partial(_viewed, rebuild, saved.size(), saved.stride(), int(saved.storage_offset()))

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with saved_tensors_hooks(pack, unpack):
        yield


def _viewed(rebuild: Callable[[], Tensor], size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    with torch.no_grad():
        return rebuild().as_strided(size, stride, offset)
