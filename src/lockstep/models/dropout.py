"""Dropout from named random streams.

Every kind of dropout draws from a generator of its own, which nothing else touches: masks do not change when other
code draws random numbers, and the states resume a run exactly.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lockstep.models.ops import widened

STREAM_NAMES = ("embedding", "hidden", "attention")

_MASK_BITS = 16


class DropoutStreams:
    """One random stream for each name of `STREAM_NAMES`, on one device.

    `numbers` tells streams of one name apart where several models draw; 0 where it has none.
    """

    def __init__(self, seed: int, device: torch.device, numbers: Mapping[str, int] | None = None):
        self.device = device
        numbers = numbers or {}
        self._generators = {
            name: torch.Generator(device).manual_seed(stream_seed(seed, name, numbers.get(name, 0)))
            for name in STREAM_NAMES
        }

    def dropped(self, name: str, shape: tuple[int, ...], probability: float) -> Tensor:
        """Draw a boolean tensor that is True where an element is dropped.

        On a CPU the probability is rounded to a multiple of 2**-16, so that one 64-bit draw decides four elements.
        """
        generator = self._generators[name]
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=torch.bool, device=self.device).bernoulli_(probability, generator=generator)
        numel = int(torch.Size(shape).numel())
        words = torch.empty(-(-numel // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        threshold = round(probability * 2**_MASK_BITS) - 2 ** (_MASK_BITS - 1)
        if threshold == 2 ** (_MASK_BITS - 1):
            return torch.ones(shape, dtype=torch.bool)
        return words.view(torch.int16)[:numel].lt(threshold).view(shape)

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """What the streams draw from."""
        return tuple(self._generators.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of each stream as a uint8 tensor."""
        return {name: generator.get_state() for name, generator in self._generators.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken; ValueError if the streams differ in name."""
        if set(state) != set(self._generators):
            raise ValueError(f"dropout streams {sorted(state)} given, {sorted(self._generators)} expected")
        for name, generator in self._generators.items():
            generator.set_state(state[name])


def stream_seed(seed: int, name: str, number: int = 0) -> int:
    """Return the seed of a stream: the first 63 bits of SHA-256 of `<seed>:<name>`, big-endian.

    The text ends in `:<number>` where that is not 0.
    """
    text = f"{seed}:{name}:{number}" if number else f"{seed}:{name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def dropout(x: Tensor, dropped: Tensor | None, probability: float) -> Tensor:
    """Return x scaled by 1 / (1 - probability), zero where dropped; x itself where nothing can be dropped."""
    return x if dropped is None else (x * kept_scale(probability)).masked_fill(dropped, 0.0)


def kept_scale(probability: float) -> float:
    """Return the factor that keeps the expected value."""
    return 0.0 if probability >= 1.0 else 1.0 / (1.0 - probability)


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, dropped: Tensor | None, p: float) -> Tensor:
    """Return residual + dropout(x + bias), computed in float32 and rounded once; x, residual [..., h], bias [h]."""
    if torch.compiler.is_compiling() and dropped is None:
        total = widened(x) if bias is None else widened(x) + widened(bias)
        return (total + residual).to(residual.dtype)
    return _BiasDropoutAdd.apply(x, bias, residual, dropped, kept_scale(p))


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, dropped: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(dropped)
        ctx.scale, ctx.has_bias = scale, bias is not None
        total = widened(x) if bias is None else widened(x) + widened(bias)
        if dropped is not None:
            total = (total * scale).masked_fill_(dropped, 0.0)
        return (total + residual).to(residual.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        (dropped,) = ctx.saved_tensors
        grad = grads[0]
        grad_x = widened(grad)
        if dropped is not None:
            grad_x = (grad_x * ctx.scale).masked_fill_(dropped, 0.0)
        grad_bias = grad_x.flatten(0, -2).sum(dim=0).to(grad.dtype) if ctx.has_bias else None
        return grad_x.to(grad.dtype), grad_bias, grad, None, None
