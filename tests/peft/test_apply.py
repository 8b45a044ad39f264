"""Which linears get adapters, what is refused, and that initial values depend on the name and the seed alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lockstep.config import ConfigContainer, Origin
from lockstep.errors import ConfigError, UserError
from lockstep.models import GPTModel
from lockstep.models.expert_weights import lie_end_to_end
from lockstep.models.moe import Experts
from lockstep.parallel.mesh import Mesh
from lockstep.peft.apply import adapter_names, add_adapters, initial_adapters
from lockstep.recipes.overrides import apply_overrides
from lockstep.training.setup import build_parallel_model
from tests.parallel import sweep

_BASE: dict[str, Any] = {"checkpoint.pretrained_checkpoint": "unread", "peft.scheme": "lora"}


def _config(kind: str = "Llama-like", **changes: Any) -> ConfigContainer:
    model = {**sweep.KINDS[kind], "model.moe_router_enable_expert_bias": False}
    return sweep.configure({**model, **_BASE, **{f"peft.{name}": value for name, value in changes.items()}}, 1)


def _names(config: ConfigContainer) -> set[str]:
    model = GPTModel(config.model, dtype=torch.float32, device=torch.device("meta"))
    add_adapters(model, config.peft)
    return {
        name.removesuffix(".linear_in.weight") for name in adapter_names(model) if name.endswith("linear_in.weight")
    }


def test_whole_experts_get_none() -> None:
    config = _config("experts")
    config.model.assign("tensor_model_parallel_size", 2, Origin("python"))
    config.model.assign("expert_tensor_parallel_size", 1, Origin("python"))
    with pytest.raises(UserError, match="whole experts get no adapters"):
        _names(config)
    config.peft.assign("exclude_modules", ["*.local_experts.*"], Origin("python"))
    assert _names(config)


def test_names_and_patterns() -> None:
    assert len(_names(_config())) == 4 * 4
    only = _names(
        _config(
            target_modules=["*.layers.0.*.linear_qkv", "linear_v", "*.layers.2.mlp.*"],
            exclude_modules=["*.layers.0.*.linear_v", "*.layers.2.mlp.linear_fc2", "*.layers.3.*"],
        )
    )
    prefix = "decoder.layers."
    assert only == {
        f"{prefix}0.self_attention.linear_qkv.adapter.linear_qkv",
        f"{prefix}1.self_attention.linear_qkv.adapter.linear_v",
        f"{prefix}2.self_attention.linear_qkv.adapter.linear_v",
        f"{prefix}2.mlp.linear_fc1.adapter.linear_fc1",
    }


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Llama-like", {"target_modules": ["linear_qvk"]}, "Did you mean linear_qkv"),
        ("Llama-like", {"target_modules": ["linear_qkv", "linear_q"]}, "two adapters"),
        ("Llama-like", {"exclude_modules": ["linear_x"]}, "linear_x is no linear"),
        ("Llama-like", {"target_modules": ["linear_fc1"], "exclude_modules": ["linear_fc1"]}, "leaves no linear"),
        ("GPT", {"target_modules": ["linear_fc1_gate"]}, "linear_fc1_gate is no linear"),
        ("latents", {}, "linear_qkv is no linear"),
        ("experts", {"dropout": 0.1}, "adapters of experts have no dropout"),
        ("experts", {"scheme": "dora"}, "experts that share an adapter have no magnitudes"),
    ],
)
def test_what_a_model_cannot_have(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _names(_config(kind, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft.dim": 0}, "peft.dim .--lora-dim. = 0: give 1 or more"),
        ({"peft.dropout": 1.0}, "give a value from 0"),
        ({"peft.lora_A_init_method": "zero"}, "neither would ever move"),
        ({"peft.lora_dtype": "float32"}, "adapters have the dtype of the model"),
        ({"peft.normalize_moe_lora": True}, "have the rank of all others"),
        ({"peft.target_modules": []}, "nothing would be trained"),
        ({"peft.scheme": None, "peft.dim": 8}, "has no effect without"),
        ({"checkpoint.pretrained_checkpoint": None}, "needs checkpoint.pretrained_checkpoint"),
        ({**sweep.KINDS["experts"]}, "the bias of experts moves"),
    ],
)
def test_what_no_run_can_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep.configure({**_BASE, **changes}, 1)


def test_overrides_as_bridge_has_them() -> None:
    config = ConfigContainer()
    apply_overrides(config, ["peft=lora", "peft.dim=16", "peft.target_modules=[linear_qkv,'*.layers.0.*.linear_fc1']"])
    assert (config.peft.scheme, config.peft.dim) == ("lora", 16)
    assert config.peft.target_modules == ["linear_qkv", "*.layers.0.*.linear_fc1"]
    apply_overrides(config, ["peft=null"])
    assert config.peft.scheme is None
    config.set("peft.scheme", "dora", Origin("python"))
    with pytest.raises(ConfigError, match="one of lora, dora"):
        apply_overrides(config, ["peft=loha"])


@pytest.mark.parametrize("method", ["xavier", "kaiming", "normal"])
def test_initial_values(method: str) -> None:
    config = _config(lora_A_init_method=method)
    cpu = torch.device("cpu")
    first = dict(initial_adapters(config.model, config.peft, 1, torch.float32, cpu))
    config.peft.target_modules = ["linear_proj"]
    fewer = dict(initial_adapters(config.model, config.peft, 1, torch.float32, cpu))
    other = dict(initial_adapters(config.model, config.peft, 2, torch.float32, cpu))
    assert fewer.keys() < first.keys()
    assert all(torch.equal(value, first[name]) for name, value in fewer.items())
    name = "decoder.layers.1.self_attention.linear_proj.adapter.linear_proj."
    assert not torch.equal(other[name + "linear_in.weight"], fewer[name + "linear_in.weight"])
    assert not first[name + "linear_out.weight"].any()
    expected = {"xavier": (2 / 64) ** 0.5, "kaiming": (3 * 32) ** -0.5, "normal": 0.2}[method]
    assert float(first[name + "linear_in.weight"].std()) == pytest.approx(expected, rel=0.1)


def test_grouped_products_have_shared_adapters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are multiplied at once, as on a GPU, give what one after the other gives."""
    config, cpu = _config("experts", lora_B_init_method="normal"), torch.device("cpu")
    model, _, _ = build_parallel_model(config, Mesh(), cpu, torch.float32)
    tokens = torch.arange(32).view(2, 16)
    one_by_one = model.eval()(tokens, tokens % 16)

    def grouped(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        ends = [0, *offs.tolist()]
        return torch.cat([x[a:b] @ w for a, b, w in zip(ends, ends[1:], weight, strict=False)])

    monkeypatch.setattr("lockstep.models.moe.takes_grouped_products", lambda *_: True)
    monkeypatch.setattr("lockstep.models.moe.F.grouped_mm", grouped, raising=False)
    at_once = model(tokens, tokens % 16)
    assert torch.allclose(at_once, one_by_one, rtol=1e-5, atol=1e-6)
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        experts.linear_fc2 = None
    assert not torch.allclose(model(tokens, tokens % 16), one_by_one, rtol=1e-3)


def test_adapters_are_trained_alike_where_the_frozen_weights_of_experts_are_stacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, tokens = _config("experts", lora_B_init_method="normal"), torch.arange(32).view(2, 16)
    monkeypatch.setattr("lockstep.models.moe.takes_grouped_products", lambda *_: True)
    monkeypatch.setattr("lockstep.models.ops._measured_mode", lambda *_: "native")
    taken: list[bool] = []

    def noted(weights: Sequence[torch.Tensor]) -> bool:
        taken.append(lie_end_to_end(weights))
        return taken[-1]

    found: list[dict[str, torch.Tensor]] = []
    for lies in (noted, lambda _: False):
        monkeypatch.setattr("lockstep.models.expert_weights.lie_end_to_end", lies)
        model, _, _ = build_parallel_model(config, Mesh(), torch.device("cpu"), torch.bfloat16)
        model(tokens, tokens % 16).float().square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert taken
    assert all(taken)
    assert any(".experts.linear_fc1." in name for name in found[0])
    assert not any(name.endswith("linear_fc1.weight") for name in found[0])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
