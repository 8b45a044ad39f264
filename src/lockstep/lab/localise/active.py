"""What a model and its optimizer do in fact, beside what the config asks for."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lockstep.models import GPTModel
from lockstep.models.attention import Attention, SelfAttention
from lockstep.models.decoder import Layer
from lockstep.models.mlp import Nonlinearity
from lockstep.models.norms import Norm
from lockstep.models.router import Router
from lockstep.training.optimizer import Optimizer


def active_settings(model: GPTModel, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return by setting what is active, by the module that says so."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        for setting, value in _of_module(module):
            found.setdefault(setting, {})[name] = value
    for setting, value in _of_optimizer(optimizer):
        found.setdefault(setting, {})["optimizer"] = value
    return found


def _of_module(module: nn.Module) -> Iterator[tuple[str, Any]]:
    if isinstance(module, Norm):
        yield "model.layernorm_epsilon", module.epsilon
        yield "model.normalization", "LayerNorm" if module.centered else "RMSNorm"
        yield "model.layernorm_zero_centered_gamma", module.zero_centered_gamma
    elif isinstance(module, Attention):
        yield "model.attention_dropout", module.dropout_probability
        yield "model.attention_softmax_in_fp32", module.softmax_in_fp32
        if isinstance(module, SelfAttention):
            yield "model.kv_channels", module.head_dim
            yield "model.rotary_interleaved", module.interleaved
    elif isinstance(module, Layer):
        yield "model.hidden_dropout", module.dropout_probability
        yield "model.apply_residual_connection_post_layernorm", module.residual_is_norm_output
    elif isinstance(module, Router):
        yield "model.moe_router_topk", module.topk
    nonlinearity = getattr(module, "nonlinearity", None)
    if isinstance(nonlinearity, Nonlinearity):
        yield "model.gated_linear_unit", nonlinearity.gated


def _of_optimizer(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    for group in optimizer.inner.param_groups:
        if "betas" in group:
            yield "optimizer.adam_beta1", group["betas"][0]
            yield "optimizer.adam_beta2", group["betas"][1]
            yield "optimizer.adam_eps", group["eps"]
        elif "momentum" in group:
            yield "optimizer.sgd_momentum", group["momentum"]


def disagreements(active: dict[str, dict[str, Any]], config: dict[str, dict[str, Any]]) -> list[str]:
    """Say where something else is active than the config asks for."""
    found = []
    for setting, values in active.items():
        section, _, name = setting.partition(".")
        wanted = config.get(section, {}).get(name)
        wrong = {where: value for where, value in values.items() if value != wanted}
        for where, value in list(wrong.items())[:1]:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            found.append(f"{setting}: {wanted} is asked for, {value} is active in {where}{more}")
    return found
