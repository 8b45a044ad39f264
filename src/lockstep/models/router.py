"""The router of a mixture of experts: which experts a token goes to, and the losses that keep their load even.

Shape legend: b batch, s sequence, t tokens (b * s), h hidden, e experts, k experts of a token.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lockstep.config.experts import balancing_losses, evens_by_scaling
from lockstep.config.model import ModelConfig
from lockstep.models.layers import required
from lockstep.models.ops import matmul_mode, widened
from lockstep.models.sequence import WholeSequence
from lockstep.models.sinkhorn import evened

_NO_DIVISION_BY_ZERO = 1e-20
_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class RouterLosses:
    """What the routers of a model note in the forward pass of one micro-batch: losses by name, and loads by layer.

    A loss of value L enters the backward pass as coefficient * L * `weight`, with nothing added to the loss of the
    model. A layer that runs again, as in recomputation, notes the same again in the same place.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.losses: dict[tuple[str, int], Tensor] = {}
        self.loads: dict[int, Tensor] = {}

    def attached(self, x: Tensor, name: str, layer: int, loss: Tensor, coefficient: float) -> Tensor:
        """Return x, whose backward pass goes through a loss (scalar, coefficient included) too; note the plain loss."""
        self.losses[name, layer] = loss.detach() / coefficient
        return _Attached.apply(x, loss, self.weight)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.dtype = weight, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full((), ctx.weight, dtype=ctx.dtype, device=grads[0].device), None


@dataclass(frozen=True)
class Assignment:
    """The experts, of `number`, of each token, and their weights, [t, k] each.

    `kept` is False where an expert drops the token.
    """

    number: int
    experts: Tensor
    weights: Tensor
    kept: Tensor | None = None


class Router(nn.Module):
    """Scores every expert for every token and chooses the best.

    Scores are computed in float32 (float64 for a float64 model); products and weights are in `moe_router_dtype`, or in
    the dtype of the model. Losses are those of whole sequences, of which a router that sees a part finds its part.
    """

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        experts, hidden = required(config.num_moe_experts), required(config.hidden_size)
        self.config, self.layer = config, layer
        self.sequence = WholeSequence()
        self.experts, self.topk = experts, config.moe_router_topk
        self.coefficients = balancing_losses(config)
        self.evened = evens_by_scaling(config)
        self.dtype = _ROUTER_DTYPES[config.moe_router_dtype] if config.moe_router_dtype else dtype
        self.weight = nn.Parameter(torch.empty(experts, hidden, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(experts, dtype=dtype, device=device)) if config.add_bias_linear else None
        biased = config.moe_router_enable_expert_bias
        self.register_buffer(
            "expert_bias", torch.zeros(experts, dtype=torch.float32, device=device) if biased else None
        )

    def forward(self, x: Tensor, losses: RouterLosses | None) -> Assignment:
        """Return the experts of the tokens x [b, s, h], which are counted sample by sample."""
        logits = _RouterProduct.apply(x.flatten(0, 1), self.weight, self.bias, self.dtype)  # [t, e]
        if self.config.moe_router_force_load_balancing:
            logits = _Replaced.apply(logits, self._random_like(logits))
        if losses is not None and self.config.moe_z_loss_coeff:
            coefficient = self.config.moe_z_loss_coeff
            loss = torch.logsumexp(logits, dim=-1).square().mean() / self.sequence.parts * coefficient
            logits = losses.attached(logits, "z_loss", self.layer, loss, coefficient)
        experts, weights = self._chosen_evenly(logits) if self.evened else self._chosen(logits)
        kept = self._within_capacity(experts, weights, x.shape[0])
        if kept is not None:
            weights = weights.masked_fill(~kept, 0.0)
        if losses is not None:
            weights = self._balanced(weights, logits, x.shape[0], losses)
            if self.expert_bias is not None:
                losses.loads[self.layer] = _load(experts, self.experts, kept)
        return Assignment(self.experts, experts, weights, kept)

    @torch.no_grad()
    def move_bias(self, load: Tensor) -> None:
        """Move the bias of each expert towards an even load, given the tokens [e] that they had in a step."""
        assert self.expert_bias is not None, "the router has a bias"
        step = torch.sign(load.mean() - load) * self.config.moe_router_bias_update_rate
        self.expert_bias.add_(step)

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts [t, k] of each token and their weights, rounded to the dtype of the logits."""
        config = self.config
        if config.moe_router_score_function == "softmax":
            if config.moe_router_pre_softmax:
                weights, experts = self._best(self._scores(logits))
            else:
                best, experts = self._best(logits)
                weights = torch.softmax(best, dim=-1, dtype=self._score_dtype)
        else:
            scores = self._scores(logits)
            ranked = scores if self.expert_bias is None else scores + self.expert_bias.to(scores.dtype)
            _, experts = self._best(ranked)
            weights = scores.gather(1, experts)
            if self.topk > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + _NO_DIVISION_BY_ZERO)
        if config.moe_router_topk_scaling_factor:
            weights = weights * config.moe_router_topk_scaling_factor
        return experts, weights.to(logits.dtype)

    def _chosen_evenly(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return experts [t, k] whose loads are about even while training, and the weights that they have anyhow.

        Without training every token takes the experts that it weighs most.
        """
        scores = torch.sigmoid(logits) if self.topk == 1 else self._scores(logits).to(logits.dtype)
        ranked = evened(logits.detach().to(self._score_dtype), self.sequence) if self.training else scores
        experts = ranked.topk(self.topk, dim=-1).indices
        return experts, scores.gather(1, experts)

    @property
    def _score_dtype(self) -> torch.dtype:
        return widened(self.weight).dtype

    def _scores(self, logits: Tensor) -> Tensor:
        kind = self.config.moe_router_score_function
        if kind == "softmax":
            return torch.softmax(logits, dim=-1, dtype=self._score_dtype)
        wide = logits.to(self._score_dtype)
        return torch.sigmoid(wide) if kind == "sigmoid" else F.softplus(wide).sqrt()

    def _best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the k best scores of each token and their experts; where there are groups, of its best groups."""
        groups, chosen = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        if groups is not None and chosen is not None:
            within = scores.unflatten(1, (groups, -1))  # [t, groups, e / groups]
            of_group = within.topk(self.topk // chosen, dim=-1).values.sum(dim=-1)
            best = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, of_group.topk(chosen, dim=-1).indices, True)
            scores = within.masked_fill(~best[..., None], -math.inf).flatten(1)
        values, experts = scores.topk(self.topk, dim=-1)
        return values, experts

    def _within_capacity(self, experts: Tensor, weights: Tensor, samples: int) -> Tensor | None:
        """Return which assignments [t, k] the experts keep, of those of whole sequences; None where they keep all."""
        factor, tokens = self.config.moe_expert_capacity_factor, experts.shape[0] * self.sequence.parts
        if factor is None or factor < 0:
            return None
        capacity = math.ceil(tokens * self.topk / self.experts * factor)
        if capacity >= tokens:
            return None
        experts, weights = (
            self.sequence.joined(values.unflatten(0, (samples, -1))).flatten(0, 1)
            for values in (experts, weights.detach())
        )
        kept = self._first(experts, weights, samples, capacity).unflatten(0, (samples, -1))
        return kept[:, self.sequence.positions(kept.shape[1], kept.device)].flatten(0, 1)

    def _first(self, experts: Tensor, weights: Tensor, samples: int, capacity: int) -> Tensor:
        """Return which assignments [t, k] of all tokens are among the first of their experts."""
        tokens = experts.shape[0]
        if self.config.moe_token_drop_policy == "probs":
            by_expert = torch.zeros(tokens, self.experts, dtype=weights.dtype, device=weights.device)
            by_expert.scatter_(1, experts, weights)
            first = by_expert.topk(capacity, dim=0).indices
            return torch.zeros_like(by_expert, dtype=torch.bool).scatter_(0, first, True).gather(1, experts)
        # Tokens count position by position, as Megatron-LM's sequence-first layout has them.
        asked = F.one_hot(experts, self.experts).sum(dim=1).unflatten(0, (samples, -1)).transpose(0, 1).flatten(0, 1)
        before = asked.cumsum(dim=0).unflatten(0, (-1, samples)).transpose(0, 1).flatten(0, 1)
        return before.gather(1, experts) <= capacity

    def _balanced(self, weights: Tensor, logits: Tensor, samples: int, losses: RouterLosses) -> Tensor:
        """Attach the losses for an even load to the weights; they look at all scores, before any drop or bias."""
        if not self.coefficients:
            return weights
        scores = self._scores(logits)
        if self.config.moe_router_score_function != "softmax":
            scores = scores / (scores.sum(dim=-1, keepdim=True) + _NO_DIVISION_BY_ZERO)
        best = scores.topk(self.topk, dim=-1).indices
        names = {"aux_loss": ("load_balancing_loss", 1), "seq_aux_loss": ("seq_load_balancing_loss", samples)}
        for kind, coefficient in self.coefficients.items():
            name, parts = names[kind]
            loss = self._load_loss(scores, best, parts) * coefficient
            weights = losses.attached(weights, name, self.layer, loss, coefficient)
        return weights

    def _load_loss(self, scores: Tensor, best: Tensor, parts: int) -> Tensor:
        """Return the mean over equal parts of the tokens of e / (k T^2) * sum over experts of scores times loads."""
        tokens = scores.shape[0] // parts * self.sequence.parts
        loads = F.one_hot(best, self.experts).sum(dim=1).unflatten(0, (parts, -1)).sum(dim=1)  # [parts, e]
        loads = self.sequence.total(loads)
        total = (scores.unflatten(0, (parts, -1)).sum(dim=1) * loads).sum()
        return total * (self.experts / (self.topk * tokens * tokens)) / parts

    def _random_like(self, logits: Tensor) -> Tensor:
        generator = torch.Generator(logits.device).manual_seed(self.layer)
        return torch.empty_like(logits).normal_(generator=generator)


def _load(experts: Tensor, number: int, kept: Tensor | None) -> Tensor:
    """Return how many tokens each expert has [e], float32."""
    chosen = F.one_hot(experts, number)
    if kept is not None:
        chosen = chosen * kept[..., None]
    return chosen.sum(dim=(0, 1)).float()


class _Replaced(torch.autograd.Function):
    """Other values in the forward pass, the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _RouterProduct(torch.autograd.Function):
    """x [t, h] times weight [e, h] transposed, plus bias [e], in `dtype`; keeps x and weight in their own.

    Low-precision products have the rounding rule of `lockstep.models.ops`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        native = matmul_mode(x.device, dtype) == "native"
        ctx.save_for_backward(x, weight)
        ctx.inner, ctx.biased = dtype if native else torch.float32, bias is not None
        a, b = x.to(ctx.inner), weight.to(ctx.inner).t()
        product = torch.mm(a, b) if bias is None else torch.addmm(bias.to(ctx.inner), a, b)
        return product.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(ctx.inner)
        grad_x = torch.mm(grad, weight.to(ctx.inner)).to(x.dtype)
        grad_weight = torch.mm(grad.t(), x.to(ctx.inner)).to(weight.dtype)
        grad_bias = grad.sum(dim=0).to(weight.dtype) if ctx.biased else None
        return grad_x, grad_weight, grad_bias, None
