"""Self-attention, with explicit scores or by a fused kernel.

Shape legend: b batch, s sequence (keys), q queries, h hidden, n query heads, g key/value groups, d head dim, v channels
of a value where these are not d, m = b * n.
There are as many queries as keys unless a layout splits the sequence.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.config.model import ModelConfig
from lockstep.models.dropout import DropoutStreams, dropout, kept_scale
from lockstep.models.kernels import Kernel, fused_attention
from lockstep.models.layers import Linear, required
from lockstep.models.mask import CausalMask
from lockstep.models.norms import Norm
from lockstep.models.ops import matmul_mode, widened
from lockstep.models.positions import rotate
from lockstep.models.recompute import recomputed, recomputes
from lockstep.models.router import RouterLosses
from lockstep.models.sequence import WholeSequence

# What Megatron-LM writes over scores that must not be attended to; its exponential is zero in every dtype.
_MASKED_SCORE = -10000.0
_CPU_CHUNK_SCORES = 1 << 20  # 4 MiB of float32 scores at a time


@dataclass(frozen=True)
class AttentionContext:
    """What every layer needs to know about the batch.

    mask tells which keys a query may see; cos_sin has the queries' rotary cosine and sine; sequence tells which tokens
    these are; router_losses takes what routers add to the loss.
    """

    mask: CausalMask
    cos_sin: tuple[Tensor, Tensor] | None
    streams: DropoutStreams | None
    sequence: WholeSequence = field(default_factory=WholeSequence)
    router_losses: RouterLosses | None = None


class Attention(nn.Module):
    """What all kinds of attention share: how heads attend, and what is recomputed of it."""

    scale: float | None = None  # on the scores, in place of that of the width of a head
    kernel: Kernel = "explicit"  # what attends; whoever builds the model for a device chooses

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        self.heads = required(config.num_attention_heads)
        self.score_divisor = float(number + 1) if config.apply_query_key_layer_scaling else 1.0
        self.dropout_probability = config.attention_dropout
        self.softmax_in_fp32 = config.attention_softmax_in_fp32
        self.recompute_core = recomputes(config, "core_attn")

    def attended(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """Return what the heads attend to, [b, q, n * v], for query [b, q, n, d], key and value [b, s, g, d or v]."""
        if self.recompute_core and self.training:
            merged: Tensor = recomputed(self._core, query, key, value, context, streams=context.streams)
            return merged
        return self._core(query, key, value, context)

    def _core(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        if self.kernel == "explicit":
            return self._explicit(query, key, value, context)
        return fused_attention(self.kernel, query, key, value, context.mask, self.scale).flatten(2)

    def _explicit(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """Return what the heads attend to, [b, q, n * v]; draws the dropout mask."""
        batch, length, heads = query.shape[:3]
        copies = heads // key.shape[2]
        if copies > 1:
            key, value = key.repeat_interleave(copies, dim=2), value.repeat_interleave(copies, dim=2)
        query, key, value = self._as_matrices(query), self._as_matrices(key), self._as_matrices(value)
        dropped = None
        if self.training and context.streams is not None and self.dropout_probability > 0:
            shape = (query.shape[0], query.shape[1], key.shape[1])
            dropped = context.streams.dropped("attention", shape, self.dropout_probability)
        result = core_attention(
            query,
            key,
            value,
            context.mask.hidden,
            scale=self.scale,
            divisor=self.score_divisor,
            dropped=dropped,
            dropout_probability=self.dropout_probability,
            softmax_in_fp32=self.softmax_in_fp32,
        )
        return result.view(batch, heads, length, -1).transpose(1, 2).flatten(2)

    @staticmethod
    def _as_matrices(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)


class SelfAttention(Attention):
    """Projections, rotary positions, scores, and the output projection without its bias."""

    def __init__(self, config: ModelConfig, number: int, *, dtype: torch.dtype, device: torch.device):
        super().__init__(config, number)
        hidden = required(config.hidden_size)
        self.groups, self.head_dim = required(config.num_query_groups), required(config.kv_channels)
        self.interleaved = config.rotary_interleaved
        width = self.heads * self.head_dim
        qkv_width = width + 2 * self.groups * self.head_dim
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        self.linear_proj = Linear(width, hidden, bias=config.add_bias_linear, dtype=dtype, device=device)
        self.linear_qkv = Linear(hidden, qkv_width, bias=qkv_bias, dtype=dtype, device=device)
        self.q_layernorm: Norm | None = None
        self.k_layernorm: Norm | None = None
        if config.qk_layernorm:
            self.q_layernorm = Norm(config, self.head_dim, dtype=dtype, device=device)
            self.k_layernorm = Norm(config, self.head_dim, dtype=dtype, device=device)

    def forward(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """Return the output [b, q, h] for x [b, q, h], and its bias [h], not yet added."""
        result = self.attended(*self._query_key_value(x, context), context)
        return self.linear_proj.product(result), self.linear_proj.bias

    def _query_key_value(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [b, q, n, d], key and value [b, s, g, d].

        The rows of the projection are grouped: per group its query heads, then its key, then its value.
        """
        per_group = self.heads // self.groups
        mixed = self.linear_qkv(x).unflatten(2, (self.groups, per_group + 2, self.head_dim))
        query = mixed[:, :, :, :per_group].flatten(2, 3)
        key, value = mixed[:, :, :, per_group], mixed[:, :, :, per_group + 1]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if context.cos_sin is not None:
            query = rotate(query, *context.cos_sin, interleaved=self.interleaved)
            key = rotate(key, *context.cos_sin, interleaved=self.interleaved)
        return query, context.sequence.joined(key), context.sequence.joined(value)


def core_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_positions: Tensor,
    *,
    scale: float | None = None,
    divisor: float = 1.0,
    dropped: Tensor | None,
    dropout_probability: float,
    softmax_in_fp32: bool,
) -> Tensor:
    """Return softmax(scale query key^T) value, [m, q, v], for query [m, q, d], key [m, s, d] and value [m, s, v].

    The scale is 1 / sqrt(d) unless it is given.
    Scores, probabilities, probabilities after dropout and the result are each rounded to the dtype of the query; scores
    where they are `divisor` times smaller, which keeps them in the range of float16.
    hidden_positions [1 or b, q, s] and dropped [m, q, s] are boolean.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    hidden_positions = _per_matrix(hidden_positions, query.shape[0])
    low_precision = query.dtype in (torch.bfloat16, torch.float16)
    if low_precision and matmul_mode(query.device, query.dtype) != "native":
        return _RoundedAttention.apply(
            query,
            key,
            value,
            hidden_positions,
            dropped,
            scale,
            divisor,
            kept_scale(dropout_probability),
            softmax_in_fp32,
        )
    scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0.0, alpha=scale / divisor)
    if softmax_in_fp32:
        scores = widened(scores)
    if divisor != 1.0:
        scores = scores * divisor
    probabilities = torch.softmax(scores.masked_fill(hidden_positions, _MASKED_SCORE), dim=-1).to(query.dtype)
    return torch.bmm(dropout(probabilities, dropped, dropout_probability), value)


def _per_matrix(hidden_positions: Tensor, matrices: int) -> Tensor:
    """Expand a mask of each sample to one of each head of it; a mask of all samples stays."""
    samples = hidden_positions.shape[0]
    return hidden_positions if samples == 1 else hidden_positions.repeat_interleave(matrices // samples, dim=0)


class _RoundedAttention(torch.autograd.Function):
    """The same operations in float32 on a few heads at a time, rounding where the separate operations would."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_positions: Tensor,
        dropped: Tensor | None,
        scale: float,
        divisor: float,
        kept: float,
        softmax_in_fp32: bool,
    ) -> Tensor:
        result = query.new_empty(*query.shape[:2], value.shape[2])
        probability_dtype = torch.float32 if softmax_in_fp32 else query.dtype
        probabilities = torch.empty(*query.shape[:2], key.shape[1], dtype=probability_dtype, device=query.device)
        for part in _chunks(probabilities):
            scores = torch.bmm(query[part].float(), key[part].float().transpose(1, 2)).mul_(scale / divisor)
            scores = _rounded_(scores, query.dtype).mul_(divisor)
            scores.masked_fill_(_part_of(hidden_positions, part), _MASKED_SCORE)
            shares = torch.softmax(scores, dim=-1, out=scores)
            probabilities[part] = shares
            shares = _rounded_(shares, query.dtype)
            if dropped is not None:
                shares = _dropped_(shares, dropped[part], kept, query.dtype)
            result[part] = torch.bmm(shares, value[part].float())
        ctx.save_for_backward(query, key, value, dropped, probabilities)
        ctx.scale, ctx.divisor, ctx.kept = scale / divisor, divisor, kept
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, dropped, probabilities = ctx.saved_tensors
        dtype = query.dtype
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for part in _chunks(probabilities):
            grad_result = grads[0][part].float()
            grad_shares = _rounded_(torch.bmm(grad_result, value[part].float().transpose(1, 2)), dtype)
            shares = probabilities[part].float()
            used = _rounded_(shares.clone(), dtype) if probabilities.dtype != dtype else shares
            if dropped is not None:
                used = _dropped_(used.clone(), dropped[part], ctx.kept, dtype)
                grad_shares = _dropped_(grad_shares, dropped[part], ctx.kept, dtype)
            grad_value[part] = torch.bmm(used.transpose(1, 2), grad_result)
            grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, torch.float32)
            grad_scores = _rounded_(grad_scores.mul_(ctx.divisor), dtype)
            grad_query[part] = torch.bmm(grad_scores, key[part].float())
            grad_key[part] = torch.bmm(grad_scores.transpose(1, 2), query[part].float())
        return grad_query.mul_(ctx.scale), grad_key.mul_(ctx.scale), grad_value, None, None, None, None, None, None


def _part_of(hidden_positions: Tensor, part: slice) -> Tensor:
    return hidden_positions if hidden_positions.shape[0] == 1 else hidden_positions[part]


def _chunks(scores: Tensor) -> list[slice]:
    """Cut scores [m, q, s] into runs of matrices that fit the cache."""
    matrices, queries, keys = scores.shape
    size = max(1, _CPU_CHUNK_SCORES // (queries * keys))
    return [slice(start, start + size) for start in range(0, matrices, size)]


def _rounded_(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a float32 tensor in place to the values `dtype` has."""
    return x.copy_(x.to(dtype))


def _dropped_(x: Tensor, dropped: Tensor, kept: float, dtype: torch.dtype) -> Tensor:
    return _rounded_(x.mul_(kept), dtype).masked_fill_(dropped, 0.0)
