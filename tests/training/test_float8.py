"""Float8 products: which linears have them, what they compute, and what is refused."""

import contextlib
import dataclasses
from typing import Any

import pytest
import torch

from lockstep.config import ConfigContainer, Origin
from lockstep.config.training import MixedPrecisionConfig
from lockstep.errors import UserError
from lockstep.megatron_lm.parser import parse_flags
from lockstep.models import build_model
from lockstep.models.layers import Linear
from lockstep.parallel.mesh import Mesh
from lockstep.recipes.catalog import get_recipe
from lockstep.recipes.overrides import apply_overrides
from lockstep.training import float8
from lockstep.training.attention import Choice, use_attention
from lockstep.training.compiling import compile_blocks
from lockstep.training.float8 import describe_float8, float8_layers, float8_product, use_float8
from tests.parallel import sweep
from tests.parallel.spawn import on_processes
from tests.training.test_attention import configured
from tests.training.test_compiling import LLAMA, loss_and_gradients

CPU, GPU = torch.device("cpu"), torch.device("meta")
ROWWISE = {"mixed_precision__fp8": "e4m3", "mixed_precision__fp8_recipe": "rowwise"}
HYBRID = {"mixed_precision__fp8": "hybrid", "mixed_precision__fp8_recipe": "tensorwise"}
FIRST_AND_LAST = {**HYBRID, "model__num_layers": 4, "mixed_precision__first_last_layers_bf16": True}
SAME_DEVICE_ONLY = pytest.mark.usefixtures("torchao")


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao", reason="torchao, which computes in float8, is not installed")


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, range(0)),
        ({"fp8": "hybrid"}, range(6)),
        ({"fp8": "e4m3", "num_layers_at_start_in_bf16": 2}, range(6)),
        ({"fp8": "e4m3", "num_layers_at_start_in_bf16": 2, "first_last_layers_bf16": True}, range(2, 5)),
    ],
)
def test_layers(settings: dict[str, Any], layers: range) -> None:
    assert float8_layers(dataclasses.replace(MixedPrecisionConfig(), **settings), 6) == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_precision__fp8_recipe": "delayed"}, "= delayed scales by the maxima of earlier steps, and is not"),
        (
            {"mixed_precision__fp8_recipe": "blockwise"},
            "= blockwise scales blocks of an operand.*; use tensorwise or rowwise",
        ),
        (
            {"mixed_precision__fp8_recipe": "rowwise"},
            "= rowwise has gradients in e4m3 too, and .* = hybrid .*; use e4m3",
        ),
        ({"mixed_precision__fp8_recipe": "mxfp8"}, "= mxfp8 scales blocks of 32 .*; use tensorwise"),
        ({"mixed_precision__fp8_amax_history_len": 1024}, "is of delayed FP8 scaling, which is not supported"),
        ({"mixed_precision__bf16": False}, "needs mixed_precision.bf16"),
        ({"model__num_moe_experts": 4}, r"does not work with model.num_moe_experts \(--num-experts\) = 4"),
        ({"peft__scheme": "lora"}, r"does not work with peft.scheme \(--peft-scheme\) = lora"),
        ({"model__seq_length": 24}, "take multiples of 16 tokens, and a process has 24"),
        ({"mixed_precision__first_last_layers_bf16": True}, "leave none of 2 layers in float8"),
        (
            {"mixed_precision__fp8": None, "mixed_precision__first_last_layers_bf16": True},
            "has no effect without mixed_precision.fp8",
        ),
    ],
)
def test_what_is_not_supported_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configured(**{**HYBRID, **changes})


def test_a_device_without_float8_products_is_an_error() -> None:
    config = configured(**HYBRID)
    model = build_model(vocabulary(config).model, seed=1, params_dtype=torch.float32, device=CPU)
    with pytest.raises(UserError, match="needs a GPU, and this run is on cpu"):
        use_float8(model, config, CPU)


@pytest.mark.parametrize(
    ("recipe", "capability", "message"),
    [
        ("rowwise", (8, 9), r"= rowwise needs a GPU of compute capability 9\.0 .* has 8\.9; use tensorwise"),
        ("rowwise", (8, 0), r"= rowwise needs a GPU of compute capability 9\.0 .* has 8\.0; drop it"),
        ("tensorwise", (8, 0), r"= tensorwise needs a GPU of compute capability 8\.9 .* has 8\.0; drop it"),
        ("rowwise", (9, 0), ""),
        ("tensorwise", (8, 9), ""),
    ],
)
def test_gpus_have_them_from_some_capability_on(monkeypatch, recipe, capability, message) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        float8._check_device(torch.device("cuda"), recipe)


def test_rowwise_is_named_in_the_features_and_comes_through_both_doors() -> None:
    assert describe_float8(configured(**ROWWISE)) == (
        "linears of 2 of 2 layers, e4m3, scaled by rowwise maxima of the same step and rounded down to powers of two; "
        "weights are kept and gathered in BF16 (torchao)"
    )
    flags = parse_flags("--mock-data --bf16 --fp8-format e4m3 --fp8-recipe rowwise".split())
    recipe = get_recipe("vanilla_gpt_pretrain_config")
    apply_overrides(recipe, ["mixed_precision.fp8=e4m3", "mixed_precision.fp8_recipe=rowwise"])
    for config in (flags, recipe):
        assert (config.mixed_precision.fp8, config.mixed_precision.fp8_recipe) == ("e4m3", "rowwise")


def test_without_torchao_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(UserError, match=r"pip install 'lockstep-lm\[float8\]'"):
        float8_product(configured(**HYBRID).mixed_precision)


def vocabulary(config: ConfigContainer) -> ConfigContainer:
    config.set("model.vocab_size", 64, Origin("python"))
    return config


@SAME_DEVICE_ONLY
def test_sizes_that_the_products_do_not_take_are_an_error() -> None:
    config = vocabulary(configured(**HYBRID, model__ffn_hidden_size=72))
    model = build_model(config.model, seed=1, params_dtype=torch.float32, device=CPU)
    with pytest.raises(UserError, match=r"decoder.layers.0.mlp.linear_fc1 has a weight of 72 x 32"):
        use_float8(model, config, CPU, emulate=True)


@SAME_DEVICE_ONLY
def test_linears_of_the_layers_in_between_have_them_and_nothing_else() -> None:
    config = vocabulary(configured(**FIRST_AND_LAST, model__share_embeddings_and_output_weights=False))
    model = build_model(config.model, seed=1, params_dtype=torch.float32, device=CPU)
    use_float8(model, config, CPU, emulate=True)
    found = {
        name for name, module in model.named_modules() if isinstance(module, Linear) and "multiply" in vars(module)
    }
    names = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert found == {f"decoder.layers.{number}.{name}" for number in (1, 2) for name in names}
    assert describe_float8(config).startswith("linears of 2 of 4 layers, e4m3, gradients e5m2, scaled by tensorwise")


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Round x [..., k], each row scaled by its own power of two."""
    limit = torch.finfo(torch.float8_e4m3fn).max / x.abs().amax(-1, keepdim=True).double()
    scale = torch.exp2(torch.floor(torch.log2(limit))).float()
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return (x * scale.float()).to(dtype).float() / scale.float()


@SAME_DEVICE_ONLY
@pytest.mark.parametrize(("name", "of_gradients"), [("hybrid", torch.float8_e5m2), ("e4m3", torch.float8_e4m3fn)])
def test_operands_are_rounded_to_float8_after_scaling_by_their_largest_element(name, of_gradients) -> None:
    product = float8_product(
        dataclasses.replace(MixedPrecisionConfig(), fp8=name, fp8_recipe="tensorwise"), emulate=True
    )
    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((2, 8, 32), (48, 32), (2, 8, 48)))
    result = product(x.requires_grad_(), weight.requires_grad_())
    found = (result, *torch.autograd.grad(result, (x, weight), grad))
    x8, weight8 = rounded(x.detach(), torch.float8_e4m3fn), rounded(weight.detach(), torch.float8_e4m3fn)
    grad8 = rounded(grad, of_gradients)
    wanted = (x8 @ weight8.t(), grad8 @ weight8, grad8.flatten(0, 1).t() @ x8.flatten(0, 1))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@SAME_DEVICE_ONLY
def test_rows_along_what_is_added_up_are_scaled_each_by_its_own_largest_element() -> None:
    precision = dataclasses.replace(MixedPrecisionConfig(), fp8="e4m3", fp8_recipe="rowwise")
    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((2, 8, 32), (48, 32), (2, 8, 48)))
    x[0, 3] *= 1e3  # a token far above the others, which one scale for all would round away
    weight[5] *= 1e-3
    result = float8_product(precision, emulate=True)(x.requires_grad_(), weight.requires_grad_())
    found = (result, *torch.autograd.grad(result, (x, weight), grad))
    tokens, grads = x.detach().flatten(0, 1), grad.flatten(0, 1)
    whole = rounded_rows(weight.detach())
    wanted = (
        (rounded_rows(tokens) @ whole.t()).view_as(result),
        (rounded_rows(grads) @ rounded_rows(weight.detach().t()).t().contiguous()).view_as(x),
        rounded_rows(grads.t()) @ rounded_rows(tokens.t()).t(),
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def gradients(changes: dict[str, Any], backend: Any = None) -> list[torch.Tensor]:
    """Return the loss and gradients of a model with float8 products, compiled where a backend is given."""
    config = vocabulary(configured(**LLAMA, **changes))
    model = build_model(config.model, seed=1, params_dtype=torch.float32, device=CPU).train()
    use_attention(model, Choice("sdpa", "test"))
    use_float8(model, config, CPU, emulate=True)
    if backend is not None:
        compile_blocks(model, backend)
    return loss_and_gradients(model)


@SAME_DEVICE_ONLY
@pytest.mark.parametrize("settings", [HYBRID, ROWWISE])
def test_compiled_layers_compute_the_same_with_one_graph(settings: dict[str, Any]) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain, float8_eager, float8_compiled = gradients({}), gradients(settings), gradients(settings, backend)
    assert len(graphs) == 1
    for ours, theirs in zip(float8_compiled, float8_eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    errors = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(float8_eager, plain, strict=True)]
    assert errors[0] < 1e-4
    assert 0.01 < max(errors) < 0.15  # e5m2 has two digits after the first: half of 2^-2 at most, and that of few


def _layouts() -> dict[str, sweep.Outcome]:
    asked = configured(**HYBRID, model__num_layers=4)

    def use(model: Any, *_: Any) -> None:
        use_float8(model, asked, CPU, emulate=True)

    found = {}
    for name in ("DP2", "FSDP2", "sharded DP2, overlap"):
        case = next(case for case in sweep.CASES if case.name == name)
        config = sweep.configure({**sweep.KINDS["Llama-like"], **case.changes}, 2)
        found[name] = sweep.play(config, sweep.mesh_of(case), torch.float32, sabotage=use)
    config = sweep.configure(sweep.KINDS["Llama-like"], 1)
    found["alone"] = sweep.play(config, Mesh(), torch.float32)
    return found


@pytest.mark.slow
@SAME_DEVICE_ONLY
def test_sharded_weights_and_optimizers_find_the_same() -> None:
    for found in on_processes(_layouts, 2):
        for name in ("FSDP2", "sharded DP2, overlap"):
            assert found[name].losses == pytest.approx(found["DP2"].losses, rel=1e-6)
            assert sweep.difference(found[name].grads, found["DP2"].grads) < 1e-4
        assert sweep.difference(found["alone"].grads, found["DP2"].grads) > 1e-3  # these are without float8


def test_the_meta_device_stands_for_a_gpu_that_has_them() -> None:
    float8._check_device(GPU)
