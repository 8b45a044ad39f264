"""Experts and their router: choice, weights, capacity, losses, recomputation, both ways of multiplying."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.models import GPTModel, build_model, moe
from lockstep.models.flops import flops_per_token
from lockstep.models.init import initial_weights
from lockstep.models.moe import MixtureOfExperts
from lockstep.models.router import Router, RouterLosses

CPU = torch.device("cpu")


def block_of(config: Any, dtype: torch.dtype = torch.float64) -> MixtureOfExperts:
    block = MixtureOfExperts(config, 0, dtype=dtype, device=CPU)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0.0, 0.3)
    return block


def tokens_of(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 9, 32).to(dtype).requires_grad_()


def expected(block: MixtureOfExperts, x: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over all experts of their output times weights [b, s, e], computed densely."""
    total = torch.zeros_like(x)
    for number, expert in enumerate(block.experts.local_experts.values()):
        fc1, fc2 = expert.linear_fc1.weight, expert.linear_fc2.weight  # type: ignore[union-attr]
        gate, up = (x @ fc1.t()).chunk(2, dim=-1)  # type: ignore[operator]
        total = total + (torch.nn.functional.silu(gate) * up) @ fc2.t() * weights[..., number, None]  # type: ignore[operator]
    return total


def spread(logits: Tensor, topk: int) -> Tensor:
    """Return the softmax over the best experts, zero for the others."""
    worst = logits.topk(topk, dim=-1).values[..., -1:]
    return torch.softmax(logits.masked_fill(logits < worst, -torch.inf), dim=-1)


def test_output_and_gradients_are_those_of_a_dense_sum(moe_like):
    block, x = block_of(moe_like(moe_router_topk=3)), tokens_of()
    wanted = expected(block, x, spread(x @ block.router.weight.t(), 3))
    found, bias = block(x)
    assert bias is None
    torch.testing.assert_close(found, wanted)
    inputs = [x, *block.parameters()]
    pairs = zip(
        torch.autograd.grad(found.sin().sum(), inputs), torch.autograd.grad(wanted.sin().sum(), inputs), strict=True
    )
    for ours, dense in pairs:
        torch.testing.assert_close(ours, dense)


def test_shared_experts_and_their_gate_are_added(moe_like):
    settings = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}
    block, x = block_of(moe_like(**settings)), tokens_of()
    shared = block.shared_experts
    assert shared is not None
    assert shared.gate_weight is not None
    gate, up = (x @ shared.linear_fc1.weight.t()).chunk(2, dim=-1)
    extra = (torch.nn.functional.silu(gate) * up) @ shared.linear_fc2.weight.t()
    wanted = expected(block, x, spread(x @ block.router.weight.t(), 2)) + extra * torch.sigmoid(
        x @ shared.gate_weight.t()
    )
    torch.testing.assert_close(block(x)[0], wanted)


def router_of(make: Any, **settings: Any) -> Router:
    router = Router(make(**settings), 0, dtype=torch.float64, device=CPU)
    torch.nn.init.normal_(router.weight)
    return router


def test_weights_of_each_score_function(moe_like):
    x = tokens_of().detach()
    for kind in ("softmax", "sigmoid", "sqrtsoftplus"):
        pre = kind == "softmax"
        settings = {"moe_router_score_function": kind, "moe_router_pre_softmax": pre}
        router = router_of(moe_like, moe_router_topk_scaling_factor=2.5, **settings)
        logits = (x @ router.weight.t()).flatten(0, 1)
        scores = {
            "softmax": logits.softmax(-1),
            "sigmoid": logits.sigmoid(),
            "sqrtsoftplus": torch.nn.functional.softplus(logits).sqrt(),
        }[kind]
        best, experts = scores.topk(2)
        wanted = best if pre else best / best.sum(-1, keepdim=True)
        assignment = router(x, None)
        assert torch.equal(assignment.experts, experts)
        torch.testing.assert_close(assignment.weights, wanted * 2.5)


def test_groups_limit_the_choice(moe_like):
    router = router_of(moe_like, moe_router_num_groups=4, moe_router_group_topk=1)
    experts = router(tokens_of(), None).experts
    assert bool((experts[:, 0] // 2 == experts[:, 1] // 2).all())
    free = router_of(moe_like)(tokens_of(), None).experts
    assert not bool((free[:, 0] // 2 == free[:, 1] // 2).all())


def test_the_bias_of_an_expert_counts_in_the_choice_only_and_moves_towards_an_even_load(moe_like):
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    router, x = router_of(moe_like, **settings), tokens_of()
    assert router.expert_bias is not None
    assert "expert_bias" in router.state_dict()
    before = router(x, None)
    router.expert_bias.fill_(0.25)
    assert torch.equal(router(x, None).weights, before.weights)
    router.expert_bias[3] = 100.0
    assert bool((router(x, None).experts == 3).any(dim=1).all())
    losses = RouterLosses(1.0)
    router(x, losses)
    router.move_bias(losses.loads[0])
    assert losses.loads[0].sum() == 18 * 2
    assert router.expert_bias[3] == pytest.approx(100.0 - 0.001)
    assert router.expert_bias.max() <= 100.0
    assert bool((router.expert_bias[losses.loads[0] < 4.5] > 0.25).all())


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_experts_keep_what_their_capacity_allows(policy, moe_like):
    settings = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": policy}
    config = moe_like(**settings)
    block, x = block_of(config), tokens_of()
    assignment = block.router(x, None)
    capacity = 3  # ceil(18 * 2 / 8 * 0.5)
    assert assignment.kept is not None
    for expert in range(8):
        asked = (assignment.experts == expert).nonzero()
        kept = assignment.kept[asked[:, 0], asked[:, 1]]
        assert int(kept.sum()) == min(capacity, len(asked))
        free = block_of(moe_like())
        free.load_state_dict(block.state_dict())
        weights = free.router(x, None).weights[asked[:, 0], asked[:, 1]]
        # Tokens in the order of positions: sample 0 and 1 of position 0, of position 1, and so on.
        rank = -weights if policy == "probs" else asked[:, 0] % 9 * 2 + asked[:, 0] // 9
        if len(asked):
            assert set(rank[kept].tolist()) == set(rank.sort().values[:capacity].tolist())
    dense = torch.zeros(18, 8, dtype=torch.float64).scatter(1, assignment.experts, assignment.weights)
    torch.testing.assert_close(block(x)[0], expected(block, x, dense.view(2, 9, 8)))
    assert router_of(moe_like, moe_expert_capacity_factor=-1.0)(x, None).kept is None


def test_forced_balance_is_the_same_every_time(moe_like):
    first, second = (router_of(moe_like, moe_router_force_load_balancing=True)(tokens_of(), None) for _ in range(2))
    assert torch.equal(first.experts, second.experts)


def test_losses_by_hand_and_what_they_count_in_the_gradient(moe_like):
    settings = {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.5, 0.25],
        "moe_z_loss_coeff": 0.125,
    }
    router, x = router_of(moe_like, **settings), tokens_of()
    losses = RouterLosses(3.0)
    assignment = router(x, losses)
    logits = x @ router.weight.t()
    shares = logits.softmax(-1)
    chosen = torch.zeros_like(shares).scatter(2, shares.topk(2).indices, 1.0)
    whole = 8 / (2 * 18 * 18) * (shares.sum((0, 1)) * chosen.sum((0, 1))).sum()
    each = 8 / (2 * 9 * 9) * (shares.sum(1) * chosen.sum(1)).sum(1)
    z = logits.logsumexp(-1).square().mean()
    found = {name: value for (name, _), value in losses.losses.items()}
    wanted = {"load_balancing_loss": whole, "seq_load_balancing_loss": each.mean(), "z_loss": z}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.detach())
    (ours,) = torch.autograd.grad(assignment.weights.sum(), router.weight)  # the weights of a token add up to 1
    (hand,) = torch.autograd.grad(3.0 * (0.5 * whole + 0.25 * each.mean() + 0.125 * z), router.weight)
    torch.testing.assert_close(ours, hand)


_SCALED = {"moe_router_load_balancing_type": ["sinkhorn"], "moe_aux_loss_coeff": [0.0]}


@pytest.mark.parametrize("topk", [1, 2])
def test_scaled_scores_choose_and_plain_ones_weigh(topk, moe_like):
    router, x = router_of(moe_like, moe_router_topk=topk, **_SCALED), tokens_of()
    with torch.no_grad():
        router.weight[0] += x.flatten(0, 1).mean(0) * 3  # a favourite of most tokens
    logits = (x @ router.weight.t()).flatten(0, 1)
    scaled = logits.detach().exp()
    for _ in range(200):
        scaled = scaled / scaled.sum(1, keepdim=True) / 18
        scaled = scaled / scaled.sum(0) / 8
    plain = torch.sigmoid(logits) if topk == 1 else logits.softmax(-1)
    training = router(x, RouterLosses(1.0))
    assert training.experts.sort().values.equal(scaled.topk(topk, dim=-1).indices.sort().values)
    torch.testing.assert_close(training.weights, plain.gather(1, training.experts))
    (ours,) = torch.autograd.grad(training.weights.square().sum(), router.weight, retain_graph=True)
    (hand,) = torch.autograd.grad(plain.gather(1, training.experts).square().sum(), router.weight)
    torch.testing.assert_close(ours, hand)
    without = router.eval()(x, None)
    assert without.experts.equal(plain.topk(topk, dim=-1).indices)
    assert not without.experts.sort().values.equal(training.experts.sort().values)


def test_router_dtype_is_that_of_the_weights(moe_like):
    x = tokens_of(torch.bfloat16)
    for name, dtype in ((None, torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)):
        block = block_of(moe_like(moe_router_dtype=name), torch.bfloat16)
        assert block.router(x, None).weights.dtype == dtype
        output = block(x)[0]
        assert output.dtype == torch.bfloat16
        output.sum().backward()
        assert block.router.weight.grad is not None
        assert block.router.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("factor", [None, 0.5])
def test_grouped_products_are_those_of_one_expert_after_the_other(factor, moe_like, use_mode, monkeypatch):
    use_mode("native")
    block = block_of(moe_like(moe_expert_capacity_factor=factor, moe_router_dtype="fp32"), torch.bfloat16)
    x = tokens_of(torch.bfloat16)
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(moe, "takes_grouped_products", lambda *_, grouped=grouped: grouped)
        output = block(x)[0]
        grads = torch.autograd.grad(output.float().square().sum(), [x, *block.parameters()])
        results.append([output.detach(), *grads])
    for one, other in zip(*results, strict=True):
        assert bool(one.isfinite().all())
        assert float((one - other).norm() / other.norm()) < 1e-2


def test_what_grouped_products_leave_unwritten_counts_nowhere(moe_like, use_mode, monkeypatch):
    use_mode("native")
    monkeypatch.setattr(moe, "takes_grouped_products", lambda *_: True)
    block = block_of(moe_like(moe_expert_capacity_factor=0.5, moe_router_dtype="fp32"), torch.bfloat16)
    x, results, product = tokens_of(torch.bfloat16), [], torch.nn.functional.grouped_mm

    def unwritten(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        past = torch.arange(len(a))[:, None] >= offs[-1]
        if a.requires_grad:
            a.register_hook(lambda grad: grad.masked_fill(past, torch.nan))
        return product(a.masked_fill(past, 0.0), b, offs=offs).masked_fill(past, torch.nan)

    for function in (product, unwritten):
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", function)
        output = block(x)[0]
        results.append([output, *torch.autograd.grad(output.float().square().sum(), [x, *block.parameters()])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_experts_with_biases(tiny):
    block = block_of(tiny(num_moe_experts=4, moe_ffn_hidden_size=16, bias_activation_fusion=False))
    x = tokens_of()
    assert block.router.bias is not None
    logits = x @ block.router.weight.t() + block.router.bias
    weights, wanted = spread(logits, 2), torch.zeros_like(x)
    for number, expert in enumerate(block.experts.local_experts.values()):
        each: Any = expert
        inner = torch.nn.functional.gelu(x @ each.linear_fc1.weight.t() + each.linear_fc1.bias)
        wanted = wanted + (inner @ each.linear_fc2.weight.t() + each.linear_fc2.bias) * weights[..., number, None]
    torch.testing.assert_close(block(x)[0], wanted)


def test_weights_on_the_input(moe_like):
    settings = {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_apply_probs_on_input": True}
    block, x = block_of(moe_like(**settings)), tokens_of()
    shares = (x @ block.router.weight.t()).softmax(-1)
    best, experts = shares.max(-1)
    one = torch.nn.functional.one_hot(experts, 8).double()
    torch.testing.assert_close(block(x)[0], expected(block, x * best[..., None], one))


_SHARED = {"moe_shared_expert_intermediate_size": 16, "moe_layer_freq": "[0]+[1]*2", "num_layers": 3}
_MODES: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    **{
        module: {"recompute_granularity": "selective", "recompute_modules": [module]}
        for module in ("moe", "moe_act", "shared_experts", "layernorm")
    },
}


def step_of(config: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[Any, Tensor]]:
    model = build_model(config, seed=1, params_dtype=dtype, device=CPU)
    tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(3))
    losses = RouterLosses(2.0)
    model(tokens[:, :-1], torch.arange(16).expand(2, 16), tokens[:, 1:], router_losses=losses).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, losses.losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit_and_counts_no_loss_twice(dtype, moe_like, use_mode):
    use_mode("fp32-rounded")
    settings = {**_SHARED, "moe_aux_loss_coeff": [0.5], "moe_z_loss_coeff": 0.1, "moe_router_dtype": "fp32"}
    grads, losses = step_of(moe_like(**settings), dtype)
    assert len(losses) == 4
    for mode, changes in _MODES.items():
        other_grads, other_losses = step_of(moe_like(**settings, **changes), dtype)
        assert grads.keys() == other_grads.keys()
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads), mode
        assert losses == other_losses, mode


def test_initial_weights_are_megatron_lms(moe_like):
    """Numbers of a model with the same settings that Megatron-core built with torch.manual_seed(1234)."""
    config = moe_like(
        num_layers=3,
        num_moe_experts=4,
        moe_layer_freq=[0, 1, 1],
        moe_shared_expert_intermediate_size=40,
        moe_shared_expert_gate=True,
        position_embedding_type="learned_absolute",
        use_cpu_initialization=True,
    )
    weights = dict(initial_weights(config, 1234, torch.float32, CPU))
    mlp = "decoder.layers.1.mlp."
    golden = {
        mlp + "router.weight": [-0.02527229, 0.00894006, -0.01157427, -0.098782],
        mlp + "experts.local_experts.0.linear_fc1.weight": [0.01026537, 0.02591825, 0.01384129, -0.775133],
        mlp + "shared_experts.gate_weight": [0.01088623, -0.01645339, -0.02110317, 0.043738],
        "decoder.layers.2.mlp.experts.local_experts.3.linear_fc2.weight": [
            -0.00387788,
            0.00524297,
            0.02162995,
            -0.217033,
        ],
        "output_layer.weight": [-0.00395493, -0.00038666, -0.01595321, 3.419014],
    }
    for name, numbers in golden.items():
        value = weights[name]
        assert value.flatten()[:3].tolist() == pytest.approx(numbers[:3], abs=6e-9)
        assert float(value.double().sum()) == pytest.approx(numbers[3], abs=1e-5)


def test_experts_are_drawn_from_streams_of_their_own(moe_like):
    few, many = (dict(initial_weights(moe_like(num_moe_experts=n), 5, torch.float32, CPU)) for n in (2, 4))
    others = [name for name in few if ".mlp." not in name]
    assert others
    assert all(torch.equal(few[name], many[name]) for name in others)


def test_operations_of_the_experts_that_a_token_goes_through(moe_like):
    def per_token(**settings: Any) -> float:
        return flops_per_token(moe_like(**settings))

    one_expert = 6 * 3 * 32 * 48  # forward and backward, three products
    dense = flops_per_token(moe_like(num_moe_experts=None, ffn_hidden_size=48))
    assert per_token() == dense + 2 * one_expert
    assert per_token(moe_layer_freq=2, ffn_hidden_size=48) == dense + one_expert
    assert per_token(moe_shared_expert_intermediate_size=48) == dense + 4 * one_expert


def test_a_model_on_the_meta_device_has_the_shapes_of_its_experts(moe_like):
    model = GPTModel(moe_like(), dtype=torch.bfloat16, device=torch.device("meta"))
    tokens = torch.empty(2, 16, dtype=torch.int64, device="meta")
    assert model(tokens, tokens).shape == (2, 16, 512)
