"""A plain decoder to compare with: one process, any precision, no code shared with ``lockstep.models``.

GPT, Llama, Qwen3, and experts behind a softmax router, written as their papers have them. Weights come by the names of
Lockstep's parameters. ``note`` is called with every intermediate result that a run shows under the same name.

Shape legend: b samples, s tokens, h hidden, n query heads, g key/value groups, d head dim, v vocabulary, e experts.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep.errors import UserError

Note = Callable[[str, Tensor], None]

_PLAIN: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "hidden_dropout": (0.0,),
    "attention_dropout": (0.0,),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "seq_len_interpolation_factor": (None,),
    "apply_residual_connection_post_layernorm": (False,),
    "activation_func": ("gelu", "silu"),
    "moe_router_score_function": ("softmax",),
    "moe_router_num_groups": (None,),
    "moe_router_topk_scaling_factor": (None, 0.0),
    "moe_expert_capacity_factor": (None,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_z_loss_coeff": (None, 0.0),
    "moe_router_enable_expert_bias": (False,),
}


class ReferenceDecoder:
    """The decoder of a resolved model section."""

    title = "the reference decoder"

    def __init__(self, model: Mapping[str, Any]) -> None:
        for name, accepted in _PLAIN.items():
            if model.get(name, accepted[0]) not in accepted:
                raise UserError(f"the reference decoder has no model.{name} = {model[name]} (only {accepted[0]})")
        coefficients = model.get("moe_aux_loss_coeff")
        if model.get("num_moe_experts") and any(
            coefficients if isinstance(coefficients, list) else [coefficients or 0]
        ):
            raise UserError("the reference decoder has no auxiliary losses; compare a run with moe_aux_loss_coeff = 0")
        self.m = model
        self.inner = "float32" if model["position_embedding_type"] == "rope" else "float64"
        self.w: dict[str, Tensor] = {}

    def load(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Take weights."""
        self.w = {name: weight.detach().to(dtype).requires_grad_() for name, weight in weights.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return them."""
        return {name: weight.detach() for name, weight in self.w.items()}

    def gradients(self) -> dict[str, Tensor]:
        """Return what backward passes have left, zero where none came, and forget it."""
        found = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in self.w.items()}
        for weight in self.w.values():
            weight.grad = None
        return found

    def logits(self, tokens: Tensor, positions: Tensor, documents: Tensor | None, note: Note) -> Tensor:
        """Return logits [b, s, v] for tokens [b, s]."""
        length = tokens.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None]
        if documents is not None:
            hidden = hidden | (documents[:, :, None] != documents[:, None, :])
        x = self.w["embedding.word_embeddings.weight"][tokens]
        if "embedding.position_embeddings.weight" in self.w:
            x = x + self.w["embedding.position_embeddings.weight"][positions]
        note("embedding", x)
        for number in range(self.m["num_layers"]):
            x = self._layer(f"decoder.layers.{number}", x, hidden, note)
        x = self._norm("decoder.final_layernorm", x, note)
        words = self.w["embedding.word_embeddings.weight"]
        return F.linear(x, self.w.get("output_layer.weight", words))

    def _layer(self, name: str, x: Tensor, hidden: Tensor, note: Note) -> Tensor:
        out, bias = self._attention(
            f"{name}.self_attention", self._norm(f"{name}.input_layernorm", x, note), hidden, note
        )
        x = x + (out if bias is None else out + bias)
        normalised = self._norm(f"{name}.pre_mlp_layernorm", x, note)
        routed = f"{name}.mlp.router.weight" in self.w
        out, bias = (self._experts if routed else self._mlp)(f"{name}.mlp", normalised, note)
        note(f"{name}.mlp", out)
        x = x + (out if bias is None else out + bias)
        note(name, x)
        return x

    def _norm(self, name: str, x: Tensor, note: Note | None = None) -> Tensor:
        weight, bias = self.w[f"{name}.weight"], self.w.get(f"{name}.bias")
        wide = x if x.dtype == torch.float64 else x.float()
        if self.m["normalization"] == "LayerNorm":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.m["layernorm_epsilon"])
        wide = wide * (weight + 1 if self.m["layernorm_zero_centered_gamma"] else weight)
        y = (wide if bias is None else wide + bias).to(x.dtype)
        if note is not None:
            note(name, y)
        return y

    def _attention(self, name: str, x: Tensor, hidden: Tensor, note: Note) -> tuple[Tensor, Tensor | None]:
        heads, groups, width = self.m["num_attention_heads"], self.m["num_query_groups"], self.m["kv_channels"]
        mixed = F.linear(x, self.w[f"{name}.linear_qkv.weight"], self.w.get(f"{name}.linear_qkv.bias"))
        note(f"{name}.linear_qkv", mixed)
        # Rows lie group by group: the query heads of a group, its key, its value.
        mixed = mixed.unflatten(-1, (groups, heads // groups + 2, width))  # [b, s, g, n / g + 2, d]
        query, key, value = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
        if f"{name}.q_layernorm.weight" in self.w:
            query, key = self._norm(f"{name}.q_layernorm", query, note), self._norm(f"{name}.k_layernorm", key, note)
        if self.m["position_embedding_type"] == "rope":
            cosine, sine = self._rotation(x.shape[1], x.dtype)
            note("rotary cosine", cosine)
            note("rotary sine", sine)
            query, key = _turned(query, cosine, sine), _turned(key, cosine, sine)
        key, value = (each.repeat_interleave(heads // groups, dim=2) for each in (key, value))
        scores = torch.einsum("bqnd,bknd->bnqk", query, key) / math.sqrt(width)
        if x.dtype != torch.float64 and self.m["attention_softmax_in_fp32"]:
            scores = scores.float()
        shares = scores.masked_fill(hidden[:, None], -math.inf).softmax(-1).to(x.dtype)
        attended = torch.einsum("bnqk,bknd->bqnd", shares, value).flatten(2)
        out = F.linear(attended, self.w[f"{name}.linear_proj.weight"])
        note(name, out)
        return out, self.w.get(f"{name}.linear_proj.bias")

    def _rotation(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [s, 1, d]; angles are float32 in every precision."""
        width = self.m["kv_channels"]
        turns = self.m["rotary_base"] ** (-torch.arange(0, width, 2).float() / width)
        if self.m["rope_scaling"]:
            # Llama 3.1: wavelengths over 8192 tokens are stretched, those under 2048 are not, between them in part.
            periods = 8192 * turns / (2 * math.pi)
            kept = ((periods - 1) / 3).clamp(0, 1)
            turns = turns * (kept + (1 - kept) / self.m["rope_scaling_factor"])
        angles = torch.outer(torch.arange(length).float(), turns).repeat(1, 2)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _mlp(self, name: str, x: Tensor, note: Note | None = None) -> tuple[Tensor, Tensor | None]:
        inner = F.linear(x, self.w[f"{name}.linear_fc1.weight"], self.w.get(f"{name}.linear_fc1.bias"))
        if self.m["gated_linear_unit"]:
            gate, up = inner.chunk(2, dim=-1)
            inner = self._activation(gate) * up
        else:
            inner = self._activation(inner)
        return F.linear(inner, self.w[f"{name}.linear_fc2.weight"]), self.w.get(f"{name}.linear_fc2.bias")

    def _activation(self, x: Tensor) -> Tensor:
        if self.m["activation_func"] == "silu":
            return F.silu(x)
        # The fused kernel of Megatron-core, which needs a bias or a gate, has the tanh approximation.
        fused = self.m["bias_activation_fusion"] and (self.m["add_bias_linear"] or self.m["gated_linear_unit"])
        return F.gelu(x, approximate="tanh" if fused else "none")

    def _experts(self, name: str, x: Tensor, note: Note) -> tuple[Tensor, None]:
        """Return for every token the weighted sum over its best experts."""
        logits = F.linear(x, self.w[f"{name}.router.weight"], self.w.get(f"{name}.router.bias"))
        scores = logits.softmax(-1) if self.m["moe_router_pre_softmax"] else logits
        best, chosen = scores.topk(self.m["moe_router_topk"], dim=-1)  # [b, s, k]
        weights = best if self.m["moe_router_pre_softmax"] else best.softmax(-1)
        note(f"{name}.router.experts", chosen)
        note(f"{name}.router.weights", weights)
        total = torch.zeros_like(x)
        for expert in range(self.m["num_moe_experts"]):
            weight = torch.where(chosen == expert, weights, 0.0).sum(-1, keepdim=True)
            out, bias = self._mlp(f"{name}.experts.local_experts.{expert}", x)
            total = total + weight * (out if bias is None else out + bias)
        return total, None


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn pairs of channels, one of each half of the head, by the angle of their position."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
