"""Float8 products of the linears in the layers, by torchao: operands are scaled by their own largest elements.

Each has one scale, or each of its rows, which is what a product adds up over.

Weights, activations between products, norms, attention, embedding, output layer and losses stay in BF16.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.config import ConfigContainer
from lockstep.config.training import MixedPrecisionConfig
from lockstep.errors import UserError
from lockstep.models import GPTModel
from lockstep.models.layers import Linear

_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}  # of the first NVIDIA GPUs with such float8 products
_MULTIPLE = 16  # of which the products take sizes

Product = Callable[[Tensor, Tensor], Tensor]


def float8_layers(precision: MixedPrecisionConfig, layers: int) -> range:
    """Return which of so many layers have float8 products."""
    if precision.fp8 is None:
        return range(0)
    if not precision.first_last_layers_bf16:
        return range(layers)
    return range(precision.num_layers_at_start_in_bf16, layers - precision.num_layers_at_end_in_bf16)


def describe_float8(config: ConfigContainer) -> str:
    """Say which products are in float8, and how they are scaled."""
    precision, total = config.mixed_precision, config.model.num_layers or 0
    layers = float8_layers(precision, total)
    if not layers:
        return "none"
    formats = "e4m3" if precision.fp8 == "e4m3" else "e4m3, gradients e5m2"
    travel = "kept in FP32 and gathered in e4m3" if precision.fp8_param_gather else "kept and gathered in BF16"
    powers = " and rounded down to powers of two" if precision.fp8_recipe == "rowwise" else ""
    return (
        f"linears of {len(layers)} of {total} layers, {formats}, scaled by {precision.fp8_recipe} maxima of the same "
        f"step{powers}; weights are {travel} (torchao)"
    )


def _check_device(device: torch.device, recipe: str = "tensorwise") -> None:
    """Check that a device has float8 products of operands so scaled; the meta device stands for a GPU that has them.

    Raises:
        UserError: it has not.
    """
    if device.type == "meta":
        return
    if device.type != "cuda":
        raise UserError(f"mixed_precision.fp8 (--fp8-format) needs a GPU, and this run is on {device}; drop it")
    found, needed = torch.cuda.get_device_capability(device), _CAPABILITY[recipe]
    if found < needed:
        remedy = "drop it" if found < _CAPABILITY["tensorwise"] else "use tensorwise"
        raise UserError(
            f"mixed_precision.fp8_recipe (--fp8-recipe) = {recipe} needs a GPU of compute capability {needed[0]}."
            f"{needed[1]} or later, and {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; {remedy}"
        )


def use_float8(model: GPTModel, config: ConfigContainer, device: torch.device, *, emulate: bool = False) -> None:
    """Have the linears of the layers that the config names multiply in float8; the model is already laid out.

    ``emulate``: multiply the rounded operands in float32, for tests on devices without float8 products.

    Raises:
        UserError: the device has no float8 products, torchao is not installed, or they do not take a linear's sizes.
    """
    layers = float8_layers(config.mixed_precision, config.model.num_layers or 0)
    if not layers:
        return
    if not emulate:
        _check_device(device, config.mixed_precision.fp8_recipe)
    product = float8_product(config.mixed_precision, emulate=emulate)
    for number, layer in model.decoder.layers.items():
        if int(number) not in layers:
            continue
        for name, module in layer.named_modules():
            if isinstance(module, Linear):
                _check_sizes(f"decoder.layers.{number}.{name}", module)
                module.multiply = product


def _check_sizes(name: str, module: Linear) -> None:
    rows, columns = module.weight.shape
    if rows % _MULTIPLE or columns % _MULTIPLE:
        raise UserError(
            f"{name} has a weight of {rows} x {columns}, and float8 products take multiples of {_MULTIPLE}; "
            "change the model's sizes or its tensor parallelism, or drop mixed_precision.fp8 (--fp8-format)"
        )


def float8_product(precision: MixedPrecisionConfig, *, emulate: bool = False) -> Product:
    """Return what multiplies x [..., h] by weight [o, h] transposed, in float8 forward and backward.

    Raises:
        UserError: torchao is not installed.
    """
    torchao, matmul, _, _ = _imported()
    # With this, which finds nothing to convert, torchao keeps the compiler from code that stores wrong float8 numbers.
    torchao.convert_to_float8_training(nn.Identity())
    settings = scaling(precision, emulate=emulate)
    products = accumulation(settings)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = matmul.apply(x, weight.t(), products, settings)
        return result

    return product


def scaling(precision: MixedPrecisionConfig, *, emulate: bool = False) -> Any:
    """Return torchao's settings of how operands are scaled and rounded.

    Raises:
        UserError: torchao is not installed.
    """
    torchao, *_ = _imported()
    settings = torchao.Float8LinearConfig.from_recipe_name(precision.fp8_recipe)
    if precision.fp8 == "e4m3":
        gradient = dataclasses.replace(settings.cast_config_grad_output, target_dtype=torch.float8_e4m3fn)
        of_gradients = ("cast_config_grad_output", "cast_config_grad_output_for_grad_weight")
        settings = dataclasses.replace(settings, **dict.fromkeys(of_gradients, gradient))
    return dataclasses.replace(settings, emulate=emulate)


def accumulation(settings: Any) -> Any:
    """Return torchao's settings of how the three products of a linear add up."""
    _, _, mm_config, scaled_mm = _imported()
    gemms = (settings.gemm_config_output, settings.gemm_config_grad_input, settings.gemm_config_grad_weight)
    return mm_config(*(scaled_mm(settings.emulate, gemm.use_fast_accum, False, False) for gemm in gemms))


def _imported() -> tuple[Any, Any, Any, Any]:
    try:
        from torchao import float8
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
        from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig
    except ImportError as error:
        raise UserError(
            f"mixed_precision.fp8 (--fp8-format) is computed by torchao, which cannot be imported ({error}); "
            "install it with: pip install 'lockstep-lm[float8]'"
        ) from error
    return float8, matmul_with_hp_or_float8_args, LinearMMConfig, ScaledMMConfig
