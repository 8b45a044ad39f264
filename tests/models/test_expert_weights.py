"""The weights of experts as one tensor: when it is a view, what it does to gradients, and that it changes no bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lockstep.models import build_model, expert_weights, moe
from lockstep.models.expert_weights import as_one, lie_end_to_end, runs_of_experts
from lockstep.models.init import initial_weights
from lockstep.models.moe import Experts
from lockstep.models.router import RouterLosses

CPU, META = torch.device("cpu"), torch.device("meta")


def weights_of(number: int = 3, device: torch.device = CPU, start: int = 0, dtype: Any = torch.bfloat16) -> list[Any]:
    """Return parameters [4, 8] end to end in one tensor, which begins with so many other numbers."""
    room = torch.arange(start + number * 32, dtype=torch.float32, device=device).to(dtype)
    return [nn.Parameter(each) for each in room[start:].view(number, 4, 8)]


def same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def test_runs_are_by_layer_and_linear_in_the_order_of_numbers() -> None:
    layer = "decoder.layers.1.mlp.experts.local_experts."
    other = "decoder.layers.2.mlp.experts.local_experts."
    names = [f"{layer}{n}.linear_fc{m}.{leaf}" for n in (10, 9, 11) for m in (2, 1) for leaf in ("bias", "weight")]
    names += [
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
        f"{layer}9.linear_fc1.adapter.linear_fc1.linear_in.weight",
        f"{other}0.linear_fc1.weight",
    ]
    assert runs_of_experts(names) == [
        [f"{layer}{n}.linear_fc2.weight" for n in (9, 10, 11)],
        [f"{layer}{n}.linear_fc1.weight" for n in (9, 10, 11)],
        [f"{other}0.linear_fc1.weight"],
    ]


@pytest.mark.parametrize("device", [CPU, META])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_a_view_is_laid_out_as_a_stack_is(device: torch.device, number: int, grad: bool) -> None:
    weights = weights_of(number, device, start=16)
    with torch.set_grad_enabled(grad):
        found, wanted = as_one(weights), torch.stack(weights)
    assert same_storage(found, weights[0])
    assert found.storage_offset() == 16
    assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert found.requires_grad is grad
    assert device == META or torch.equal(found, wanted)


def mislaid() -> dict[str, list[Any]]:
    first, second, third, fourth = weights_of(4)
    wide = torch.zeros(2, 4, 16, dtype=torch.bfloat16)
    square = torch.zeros(2, 8, 8, dtype=torch.bfloat16)
    return {
        "in another order": [second, first],
        "with a gap": [first, third],
        "twice the same": [first, first],
        "in two storages": [first, weights_of()[1]],
        "of unlike shapes": [first, nn.Parameter(second.detach().view(8, 4))],
        "of unlike dtypes": [first, nn.Parameter(second.detach().view(torch.float16))],
        "rows apart": [*wide[..., :8]],
        "transposed": [each.t() for each in square],
        "where no product may begin": weights_of(start=4),
        "not plain": [each.as_subclass(_Marked) for each in (third.detach(), fourth.detach())],
    }


class _Marked(Tensor):
    pass


@pytest.mark.parametrize("how", mislaid())
def test_weights_that_do_not_lie_so_are_not_viewed(how: str) -> None:
    weights = mislaid()[how]
    assert not lie_end_to_end(weights)
    if how not in ("of unlike shapes", "of unlike dtypes"):
        assert not same_storage(as_one(weights), weights[0])
        assert torch.equal(as_one(weights), torch.stack(weights))


def test_every_weight_gets_its_slice_of_the_gradient_without_a_copy() -> None:
    weights = weights_of()
    called: list[int] = []
    for number, weight in enumerate(weights):
        weight.register_post_accumulate_grad_hook(lambda _, number=number: called.append(number))
    weights[1].requires_grad_(False)
    joined = as_one(weights)
    factor = torch.randn(3, 4, 8).bfloat16()
    whole: list[Tensor] = []
    joined.register_hook(whole.append)
    (joined * factor).sum().backward()
    assert sorted(called) == [0, 2]
    assert weights[1].grad is None
    for number in (0, 2):
        found = weights[number].grad
        assert torch.equal(found, factor[number])
        assert same_storage(found, whole[0])
        assert found.storage_offset() == number * 32


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("moved", [0, 2])
def test_a_weight_that_changes_between_forward_and_backward_is_seen(trained: bool, moved: int) -> None:
    weights = [weight.requires_grad_(trained) for weight in weights_of()]

    def product(x: Tensor) -> Tensor:
        return torch.bmm(x, as_one(weights).transpose(1, 2)).sum()

    def change() -> None:
        with torch.no_grad():
            weights[moved].mul_(2)

    x = torch.randn(3, 5, 8).bfloat16().requires_grad_()
    for _ in range(2):  # between steps they may
        product(x).backward()
        change()
    loss = product(x)
    change()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|modified inplace"):
        loss.backward()


def test_a_model_has_its_experts_end_to_end(moe_like) -> None:
    config = moe_like(num_moe_experts=16)
    wanted = dict(initial_weights(config, 3, torch.bfloat16, CPU))
    model = build_model(config, seed=3, params_dtype=torch.bfloat16, device=CPU)
    found = dict(model.named_parameters())
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    runs = runs_of_experts(found)
    assert [len(run) for run in runs] == [16] * 4
    assert all(lie_end_to_end([found[name] for name in run]) for run in runs)


_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_MODES: dict[str, dict[str, Any]] = {
    "kept": {},
    "full": _FULL,
    **{m: {"recompute_granularity": "selective", "recompute_modules": [m]} for m in ("moe", "moe_act")},
}


def results_of(config: Any, frozen: bool) -> list[Tensor]:
    """Return losses and gradients of two micro-batches in each of two steps, the weights after them, and an output."""
    model = build_model(config, seed=1, params_dtype=torch.bfloat16, device=CPU)
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        experts.requires_grad_(not frozen)
    tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(16).expand(2, 16)
    found: list[Tensor] = []
    for _ in range(2):
        for part in (tokens, tokens.flip(0, 1)):
            loss = model(part[:, :-1], positions, part[:, 1:], router_losses=RouterLosses(2.0)).mean()
            loss.backward()
            found.append(loss.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    found.append(parameter.grad.clone())
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
    found += [parameter.detach() for parameter in model.parameters()]
    with torch.no_grad():
        return [*found, model.eval()(tokens[:, :-1], positions)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", _MODES)
def test_views_change_no_bit(mode: str, frozen: bool, moe_like, use_mode, monkeypatch) -> None:
    use_mode("native")
    monkeypatch.setattr(moe, "takes_grouped_products", lambda *_: True)
    config = moe_like(moe_aux_loss_coeff=[0.5], **_MODES[mode])
    taken: list[bool] = []

    def noted(weights: Any) -> bool:
        taken.append(lie_end_to_end(weights))
        return taken[-1]

    monkeypatch.setattr(expert_weights, "lie_end_to_end", noted)
    viewed = results_of(config, frozen)
    assert taken
    assert all(taken)
    monkeypatch.setattr(expert_weights, "lie_end_to_end", lambda _: False)
    stacked = results_of(config, frozen)
    assert len(viewed) == len(stacked)
    assert all(torch.equal(one, other) for one, other in zip(viewed, stacked, strict=True))
