"""The model as a whole: variants, activations, low precision, and counted operations."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lockstep.models import GPTModel, build_model
from lockstep.models.attention import AttentionContext
from lockstep.models.flops import flops_per_iteration, flops_per_token
from lockstep.models.mask import CausalMask
from lockstep.models.mlp import MLP, uses_fused_activation
from lockstep.models.norms import Norm

CPU = torch.device("cpu")


def batch(length: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 512, (2, length)), torch.arange(length).expand(2, length)


def loss_and_gradients(model: GPTModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    tokens, positions = batch()
    loss = model(tokens, positions, tokens).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_bfloat16_follows_float32(tiny, llama_like, use_mode):
    for make, mode in itertools.product((tiny, llama_like), ("native", "fp32-rounded")):
        use_mode(mode)
        low = build_model(make(), seed=1, params_dtype=torch.bfloat16, device=CPU)
        full = build_model(make(), seed=1, params_dtype=torch.float32, device=CPU)
        full.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
        (loss, gradients), (wanted, exact) = loss_and_gradients(low), loss_and_gradients(full)
        assert loss.item() == pytest.approx(wanted.item(), abs=2e-3)
        for name, gradient in gradients.items():
            error = (gradient.float() - exact[name]).norm() / exact[name].norm()
            assert error.item() < 0.03, (mode, name)


def test_residual_may_start_at_the_norm_output(tiny):
    config = tiny(num_layers=1, apply_residual_connection_post_layernorm=True)
    model = build_model(config, seed=1, params_dtype=torch.float32, device=CPU)
    layer: Any = model.get_submodule("decoder.layers.0")
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "linear" in name:
                parameter.zero_()
    hidden = torch.randn(2, 6, 32)
    twice = layer.pre_mlp_layernorm(layer.input_layernorm(hidden))
    context = AttentionContext(CausalMask(6, CPU), None, None)
    assert torch.equal(layer(hidden, context), twice)


TANH, ERF = (lambda x: F.gelu(x, approximate="tanh")), F.gelu


@pytest.mark.parametrize(
    ("overrides", "fused", "function"),
    [
        ({}, True, TANH),
        ({"bias_activation_fusion": False}, False, ERF),
        ({"add_bias_linear": False}, False, ERF),
        ({"add_bias_linear": False, "gated_linear_unit": True}, True, TANH),
        ({"activation_func": "openai_gelu"}, False, TANH),
        ({"activation_func": "silu", "gated_linear_unit": True}, True, F.silu),
        ({"activation_func": "silu"}, False, F.silu),
        ({"activation_func": "quick_gelu"}, False, lambda x: x * torch.sigmoid(1.702 * x)),
        ({"activation_func": "squared_relu"}, False, lambda x: F.relu(x) ** 2),
    ],
)
def test_activations(overrides, fused, function, tiny):
    config = tiny(**overrides)
    assert uses_fused_activation(config) == fused
    mlp = MLP(config, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 32, requires_grad=True)
    inner = mlp.linear_fc1(x)
    if config.gated_linear_unit:
        gate, up = inner.chunk(2, dim=-1)
        wanted = function(gate) * up
    else:
        wanted = function(inner)
    wanted = mlp.linear_fc2.product(wanted)
    output, bias = mlp(x)
    assert bias is mlp.linear_fc2.bias
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-4)
    ours = torch.autograd.grad(output.sum(), [x, *mlp.linear_fc1.parameters()])
    theirs = torch.autograd.grad(wanted.sum(), [x, *mlp.linear_fc1.parameters()])
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-3)


def test_norms_in_bfloat16_are_rounded_once(tiny):
    for kind, shifted in itertools.product(("LayerNorm", "RMSNorm"), (False, True)):
        config = tiny(normalization=kind, layernorm_zero_centered_gamma=shifted)
        norm = Norm(config, 32, dtype=torch.bfloat16, device=CPU)
        torch.nn.init.constant_(norm.weight, 0.0 if shifted else 1.0)
        if norm.bias is not None:
            torch.nn.init.zeros_(norm.bias)
        x = torch.randn(50, 32).bfloat16()
        exact = x.double()
        if kind == "LayerNorm":
            exact = exact - exact.mean(dim=-1, keepdim=True)
        exact = exact / (exact.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        assert (norm(x) == exact.bfloat16()).float().mean() > 0.99


def test_position_ids_select_learned_positions_only(tiny, llama_like):
    tokens, positions = batch()
    for make, differs in ((tiny, True), (llama_like, False)):
        model = build_model(make(), seed=1, params_dtype=torch.float32, device=CPU)
        assert torch.equal(model(tokens, positions), model(tokens, positions * 0)) != differs


def test_operations_of_a_step(tiny, llama_like):
    # Per token and layer: qkv 32*96, projection 32*32, MLP 2*32*112, scores 32*64; output 32*512; six each.
    per_token = 6 * (2 * (32 * 96 + 32 * 32 + 2 * 32 * 112 + 32 * 64) + 32 * 512)
    assert flops_per_token(tiny()) == per_token
    assert flops_per_iteration(tiny(), 8) == per_token * 64 * 8
    grouped = 6 * (2 * (32 * 64 + 32 * 32 + 3 * 32 * 112 + 32 * 64) + 32 * 512)
    assert flops_per_token(llama_like()) == grouped
