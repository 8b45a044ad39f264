"""Multi-latent attention: queries, and keys with values, come through narrow latents.

A head's query and key have two parts: one without position, and one that is rotated; the rotated part of the key is
the same for all heads. Parameters have the names Megatron-core gives them in its local implementation.

Shape legend: b batch, s sequence (keys), q queries, h hidden, n heads, c query latent, l key/value latent, r rotated
channels, k other channels of query and key, v channels of a value, m = b * n.
"""

import torch
from torch import Tensor, nn

from lockstep.config.model import ModelConfig
from lockstep.models.attention import Attention, AttentionContext
from lockstep.models.layers import Linear, required
from lockstep.models.norms import Norm
from lockstep.models.positions import latent_score_scale, rotate
from lockstep.models.recompute import recomputed, recomputes


class MultiLatentAttention(Attention):
    """Projections into latents and out of them, rotary positions, scores, and the output projection without its bias.

    Without a rank for them, queries come from the residual stream at once.
    """

    def __init__(self, config: ModelConfig, number: int, *, dtype: torch.dtype, device: torch.device):
        super().__init__(config, number)
        hidden, latent = required(config.hidden_size), config.kv_lora_rank
        self.latent_sizes = (latent, config.qk_pos_emb_head_dim)
        self.query_sizes = (config.qk_head_dim, config.qk_pos_emb_head_dim)
        self.key_value_sizes = (config.qk_head_dim, config.v_head_dim)
        self.scale = latent_score_scale(config)
        self.recompute_up = recomputes(config, "mla_up_proj")
        self.recompute_core = self.recompute_core and not self.recompute_up  # which goes from the latents to the result

        def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)

        def norm(size: int) -> Norm | None:
            return Norm(config, size, dtype=dtype, device=device) if config.qk_layernorm else None

        self.linear_proj = linear(self.heads * config.v_head_dim, hidden, config.add_bias_linear)
        query_width, rank = self.heads * sum(self.query_sizes), config.q_lora_rank
        self.linear_q_down_proj: Linear | None = None
        if rank is None:
            self.linear_q_proj = linear(hidden, query_width)
        else:
            self.linear_q_down_proj = linear(hidden, rank)
            self.linear_q_up_proj = linear(rank, query_width)
        self.linear_kv_down_proj = linear(hidden, sum(self.latent_sizes))
        self.linear_kv_up_proj = linear(latent, self.heads * sum(self.key_value_sizes))
        self.q_layernorm = norm(rank) if rank is not None else None
        self.kv_layernorm = norm(latent)
        self.shared_key: nn.Module = nn.Identity()  # where heads are split: what takes the shared key to all of them

    def forward(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """Return the output [b, q, h] for x [b, q, h], and its bias [h], not yet added."""
        query_latent = x
        if self.linear_q_down_proj is not None:
            query_latent = _normalised(self.q_layernorm, self.linear_q_down_proj(x))
        latent, key = self.linear_kv_down_proj(x).split(self.latent_sizes, dim=-1)
        latent = _normalised(self.kv_layernorm, latent)
        if self.recompute_up and self.training:
            result = recomputed(self._from_latents, query_latent, latent, key, context, streams=context.streams)
        else:
            result = self._from_latents(query_latent, latent, key, context)
        return self.linear_proj.product(result), self.linear_proj.bias

    def _from_latents(self, query_latent: Tensor, latent: Tensor, key: Tensor, context: AttentionContext) -> Tensor:
        """Return what the heads attend to, [b, q, n * v], for latents [b, q, c] and [b, q, l] and a key [b, q, r]."""
        return self.attended(*self._query_key_value(query_latent, latent, key, context), context)

    def _query_key_value(
        self, query_latent: Tensor, latent: Tensor, key: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [b, q, n, k + r], key [b, s, n, k + r] and value [b, s, n, v]; rows lie head by head."""
        from_query_latent = self.linear_q_proj if self.linear_q_down_proj is None else self.linear_q_up_proj
        query = from_query_latent(query_latent).unflatten(2, (self.heads, -1))
        still, turning = query.split(self.query_sizes, dim=-1)
        assert context.cos_sin is not None, "multi-latent attention has rotary positions"
        query = torch.cat((still, _rotated(turning, *context.cos_sin)), dim=-1)
        turned = context.sequence.joined(_rotated(self.shared_key(key)[:, :, None], *context.cos_sin))
        up = context.sequence.joined(self.linear_kv_up_proj(latent)).unflatten(2, (self.heads, -1))
        still, value = up.split(self.key_value_sizes, dim=-1)
        return query, torch.cat((still, turned.expand(-1, -1, self.heads, -1)), dim=-1), value


def _normalised(norm: Norm | None, latent: Tensor) -> Tensor:
    if norm is None:
        return latent
    normalised: Tensor = norm(latent)
    return normalised


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of x [b, s, n, r] against each other; even ones come first in the result."""
    return rotate(torch.cat((x[..., ::2], x[..., 1::2]), dim=-1), cos, sin, interleaved=False)
