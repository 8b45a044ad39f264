"""Mixture of experts: every token goes through the few MLPs that its router chooses.

Parameters have the names of Megatron-core's sequential experts: `experts.local_experts.<number>.linear_fc1.weight`.

Shape legend: b batch, s sequence, t tokens (b * s), h hidden, e experts, k experts of a token, r rows: one for each
token and each of its experts (t * k), in the order of the experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lockstep.config.model import ModelConfig
from lockstep.models.expert_weights import as_one
from lockstep.models.layers import Linear, required
from lockstep.models.mlp import MLP, Nonlinearity
from lockstep.models.ops import linear, matmul_mode, widened
from lockstep.models.recompute import rebuilt_for_backward, recomputed, recomputes
from lockstep.models.router import Assignment, Router, RouterLosses

_GROUPED_ALIGNMENT = 8  # bfloat16 numbers in the 16 bytes that the rows of a grouped product must begin at


Compiler = Callable[[Any], Any]
"""Takes a function that exchanges nothing between processes, and returns it compiled."""


@dataclass(frozen=True)
class Rows:
    """What the experts get: tokens [r, h] with their weights [r], sorted by expert.

    Rows up to `ends[i]` (int32 [e]) belong to the experts up to i. Rows after the last end are dropped: what stands
    there, in outputs and gradients too, may be anything. `source` is the token of each row, `place` [t * k] the row of
    each token's k experts, `kept` [t * k] tells which of these are not dropped, None where all are kept; `shape` is
    that of the input.
    """

    tokens: Tensor
    weights: Tensor
    ends: Tensor
    source: Tensor
    place: Tensor
    kept: Tensor | None
    topk: int
    shape: torch.Size

    @property
    def dropped(self) -> Tensor | None:
        """Which rows [r] are dropped; None where none are."""
        if self.kept is None:
            return None
        return torch.arange(len(self.source), device=self.source.device) >= self.ends[-1]


class Dispatcher:
    """Hands every token to its experts and adds up what they return; all experts are here."""

    def __init__(self) -> None:
        self.sum_of_copies = sum_of_copies

    def compile(self, compiled: Compiler) -> None:
        """Have the sums over the copies of a token compiled."""
        self.sum_of_copies = compiled(sum_of_copies)

    def seen(self, x: Tensor) -> Tensor:
        """Return the tokens [b, s, h] that the router must see for x."""
        return x

    def gathered(self, x: Tensor) -> Tensor:
        """Return the tokens [t, h] of all processes among which this one has experts, for those of this process."""
        return x

    def split_sum(self, x: Tensor) -> Tensor:
        """Return the sum over these processes of x, for the tokens of this one."""
        return x

    def dispatch(self, x: Tensor, assignment: Assignment) -> Rows:
        """Sort the tokens x [b, s, h], which are gathered, by expert, those of one expert in their own order."""
        experts = assignment.experts
        topk, number = experts.shape[1], assignment.number
        wanted = experts if assignment.kept is None else experts.masked_fill(~assignment.kept, number)
        in_order, order = wanted.flatten().sort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        # Found without asking the host: the number of rows before the first one of a later expert.
        ends = torch.searchsorted(in_order, torch.arange(number, device=order.device), right=True)
        kept = None if assignment.kept is None else place < ends[-1]
        source = order // topk
        tokens = _Spread.apply(x.flatten(0, 1), source, place, kept, topk, self)
        weights = permuted(assignment.weights.flatten(), order, place, kept)
        return Rows(tokens, weights, ends.int(), source, place, kept, topk, x.shape)

    def combine(self, output: Tensor, rows: Rows) -> Tensor:
        """Return the sum [b, s, h] over the experts of each token of their output [r, h]."""
        return _Summed.apply(output, rows.source, rows.place, rows.kept, rows.topk, self).view(rows.shape)


def permuted(x: Tensor, order: Tensor, back: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return the rows of x at `order`; `back` is the inverse, `kept` tells which rows of x count there."""
    return _Spread.apply(x, order, back, kept, 1, _ALONE)


class _Spread(torch.autograd.Function):
    """Rows of x at `source`; the gradient of a row of x adds up its k copies in float32 and is rounded once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, source: Tensor, place: Tensor, kept: Tensor | None, topk: int, dispatcher: Dispatcher
    ) -> Tensor:
        ctx.save_for_backward(place, kept)
        ctx.topk, ctx.dispatcher = topk, dispatcher
        return dispatcher.gathered(x).index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        place, kept = ctx.saved_tensors
        return _rounded_once(grads[0], place, kept, ctx.topk, ctx.dispatcher), None, None, None, None, None


class _Summed(torch.autograd.Function):
    """The reverse: the sum over the k rows of each token, added up in float32 and rounded once."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, source: Tensor, place: Tensor, kept: Tensor | None, topk: int, dispatcher: Dispatcher
    ) -> Tensor:
        ctx.save_for_backward(source)
        ctx.dispatcher = dispatcher
        return _rounded_once(rows, place, kept, topk, dispatcher)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (source,) = ctx.saved_tensors
        grad = ctx.dispatcher.gathered(grads[0].flatten(0, -2))
        return grad.index_select(0, source), None, None, None, None, None


def _rounded_once(rows: Tensor, place: Tensor, kept: Tensor | None, topk: int, dispatcher: Dispatcher) -> Tensor:
    return dispatcher.split_sum(dispatcher.sum_of_copies(rows, place, kept, topk)).to(rows.dtype)


def sum_of_copies(rows: Tensor, place: Tensor, kept: Tensor | None, topk: int) -> Tensor:
    """Return the sum over the k rows at `place` [t * k] of each token, those that are kept, at least in float32."""
    found = rows.index_select(0, place if kept is None else place.where(kept, 0))
    if kept is not None:
        found = found.where(kept.view(-1, *[1] * (found.dim() - 1)), 0.0)
    return found if topk == 1 else found.unflatten(0, (-1, topk)).sum(dim=1, dtype=_sum_dtype(rows.dtype))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_ALONE = Dispatcher()


class Expert(nn.Module):
    """The weights of one expert."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        hidden, inner = required(config.hidden_size), required(config.moe_ffn_hidden_size)
        width = 2 * inner if config.gated_linear_unit else inner
        self.linear_fc1 = Linear(hidden, width, bias=config.add_bias_linear, dtype=dtype, device=device)
        self.linear_fc2 = Linear(inner, hidden, bias=config.add_bias_linear, dtype=dtype, device=device)


class Experts(nn.Module):
    """The experts of a layer: linear_fc1, activation times the weight of the token, linear_fc2.

    GPUs that have it multiply all experts in one grouped product, which does not wait for their loads; elsewhere, and
    where they have biases, one expert follows the other.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.nonlinearity: Callable[[Tensor, Tensor | None, Tensor | None], Tensor] = Nonlinearity(config)
        self.weighs_input = config.moe_apply_probs_on_input
        self.recompute_activation = recomputes(config, "moe_act")
        # What adapters of all experts together add to the product of each linear.
        self.linear_fc1: nn.Module | None = None
        self.linear_fc2: nn.Module | None = None
        number = required(config.num_moe_experts)
        self.local_experts = nn.ModuleDict(
            {str(each): Expert(config, dtype=dtype, device=device) for each in range(number)}
        )

    def forward(self, tokens: Tensor, weights: Tensor, rows: Rows) -> Tensor:
        """Return the output [r, h] of each row.

        Tokens and weights are those of the rows, given apart so that hooks see what has gradients.
        """
        if self.weighs_input:
            tokens = (tokens * weights[:, None]).to(tokens.dtype)
            weights = torch.ones_like(weights)
        experts: list[Any] = list(self.local_experts.values())
        linears = [experts[0].linear_fc1, experts[0].linear_fc2]
        own_adapters = any(each.adapter is not None for each in linears)
        if len(tokens) and not own_adapters and takes_grouped_products(tokens, linears):
            return self._grouped(experts, tokens, weights, rows)
        ends = [0, *rows.ends.tolist()]
        outputs = [
            self._through(expert, tokens[first:end], weights[first:end])
            for expert, first, end in zip(experts, ends, ends[1:], strict=False)
        ]
        return torch.cat([*outputs, tokens.new_zeros(len(tokens) - ends[-1], tokens.shape[1])])

    def _through(self, expert: Expert, tokens: Tensor, weights: Tensor) -> Tensor:
        fc1, fc2 = expert.linear_fc1, expert.linear_fc2
        inner = _plus(fc1.product(tokens), self.linear_fc1, tokens)
        output = self._activated(inner, fc1.bias, weights, lambda x: _plus(fc2.product(x), self.linear_fc2, x))
        return output if fc2.bias is None else output + (fc2.bias * weights[:, None]).to(output.dtype)

    def _grouped(self, experts: list[Expert], tokens: Tensor, weights: Tensor, rows: Rows) -> Tensor:
        """Multiply all experts at once; a grouped product leaves rows after the last end unwritten, and reads none."""
        first, second = (
            as_one([getattr(expert, name).weight for expert in experts]).transpose(1, 2)
            for name in ("linear_fc1", "linear_fc2")
        )

        def product(x: Tensor, weight: Tensor, adapter: nn.Module | None) -> Tensor:
            found = F.grouped_mm(x, weight, offs=rows.ends)
            if adapter is None:
                return found
            # The adapter multiplies all rows.
            return found + _without(adapter(_without(x, rows.dropped)), rows.dropped)

        inner = product(tokens, first, self.linear_fc1)
        return self._activated(inner, None, weights, lambda x: product(x, second, self.linear_fc2))

    def _activated(self, inner: Tensor, bias: Tensor | None, weights: Tensor, then: Any) -> Tensor:
        """Return `then` of the activation, which is computed again for the backward pass where asked for."""
        if not (self.recompute_activation and self.training):
            return then(self.nonlinearity(inner, bias, weights))
        active = recomputed(self.nonlinearity, inner, bias, weights)
        with rebuilt_for_backward(active, lambda: self.nonlinearity(inner, bias, weights)):
            return then(active)


def _plus(product: Tensor, adapter: nn.Module | None, x: Tensor) -> Tensor:
    return product if adapter is None else product + adapter(x)


def _without(x: Tensor, dropped: Tensor | None) -> Tensor:
    return x if dropped is None else x.masked_fill(dropped[:, None], 0.0)


def takes_grouped_products(tokens: Tensor, linears: list[Linear]) -> bool:
    """Tell whether the experts with these linears can multiply tokens [r, h] in grouped products on their device.

    The meta device stands for a GPU that can.
    """
    kind = tokens.device.type
    if kind not in ("cuda", "meta") or tokens.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    if kind == "cuda" and torch.cuda.get_device_capability(tokens.device) < (9, 0):
        return False
    if kind == "cuda" and matmul_mode(tokens.device, tokens.dtype) != "native":
        return False
    aligned = all(size % _GROUPED_ALIGNMENT == 0 for each in linears for size in each.weight.shape)
    return aligned and all(each.bias is None for each in linears)


class SharedExperts(MLP):
    """The experts that every token goes through, as one MLP, perhaps weighed by a gate."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device):
        inner = required(config.moe_shared_expert_intermediate_size)
        super().__init__(config, inner=inner, dtype=dtype, device=device)
        self.gate_weight: nn.Parameter | None = None
        if config.moe_shared_expert_gate:
            shape = (1, required(config.hidden_size))
            self.gate_weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output [b, s, h] for x [b, s, h]; there is no bias."""
        output, bias = super().forward(x)
        if self.gate_weight is not None:
            gate = linear(x, self.gate_weight)
            output = output * torch.sigmoid(widened(gate)).to(gate.dtype)
        return output, bias


class MixtureOfExperts(nn.Module):
    """Router and experts in the place of the MLP of layer number `layer`."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.dispatcher: Dispatcher = Dispatcher()
        self.recompute_shared = recomputes(config, "shared_experts")
        self.router = Router(config, layer, dtype=dtype, device=device)
        self.experts = Experts(config, dtype=dtype, device=device)
        self.shared_experts: SharedExperts | None = None
        if config.moe_shared_expert_intermediate_size is not None:
            self.shared_experts = SharedExperts(config, dtype=dtype, device=device)

    def forward(self, x: Tensor, losses: RouterLosses | None = None) -> tuple[Tensor, None]:
        """Return the output [b, s, h] for x [b, s, h], and no bias; `losses` takes what the router adds to the loss."""
        assignment = self.router(self.dispatcher.seen(x), losses)
        rows = self.dispatcher.dispatch(x, assignment)
        output = self.dispatcher.combine(self.experts(rows.tokens, rows.weights, rows), rows)
        return output if self.shared_experts is None else output + self._shared(self.shared_experts, x), None

    def compile(self, compiled: Compiler) -> None:
        """Have compiled what lies between router, exchanges and grouped products."""
        self.dispatcher.compile(compiled)
        nonlinearity: Any = self.experts.nonlinearity
        self.experts.nonlinearity = compiled(nonlinearity.__call__)
        if self.shared_experts is not None:
            self.shared_experts.forward = compiled(self.shared_experts.forward)  # type: ignore[method-assign]

    def _shared(self, shared_experts: SharedExperts, x: Tensor) -> Tensor:
        if self.recompute_shared and self.training:
            return recomputed(shared_experts, x)[0]
        return shared_experts(x)[0]
