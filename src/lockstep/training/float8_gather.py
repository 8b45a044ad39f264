"""Sharded weights that travel in float8: each process rounds its rows, with the scale of the whole weight.

torchao says what travels, PyTorch's fully_shard carries it. The rows themselves stay in FP32, and nothing is rounded to
BF16 on the way.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lockstep.config import ConfigContainer
from lockstep.errors import UserError
from lockstep.models.layers import Linear
from lockstep.parallel import Axis
from lockstep.parallel.fsdp import local
from lockstep.training.float8 import accumulation, float8_layers, scaling

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_TRAVELS = torch.float8_e4m3fn


def float8_storage(
    config: ConfigContainer, shards: Axis, *, emulate: bool = False
) -> Callable[[nn.Module, str, Tensor], Tensor]:
    """Return what `WeightSharding.kept` takes: weights of linears with float8 products travel in float8.

    Raises:
        UserError: torchao is not installed.
    """
    layers = float8_layers(config.mixed_precision, config.model.num_layers or 0)
    products = accumulation(scaling(config.mixed_precision, emulate=emulate))
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    def kept(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        words = name.split(".")
        if not isinstance(module, Linear) or words[-1] != "weight" or words[:2] != ["decoder", "layers"]:
            return tensor
        if int(words[2]) not in layers:
            return tensor
        if len(tensor) % shards.size:
            raise UserError(
                f"{name} has {len(tensor)} rows, which {shards.size} processes cannot share out evenly, and float8 "
                "weights travel in equal parts; drop mixed_precision.fp8_param_gather (--fp8-param-gather)"
            )
        stored: Tensor = WeightWithDynamicFloat8CastTensor(tensor, products, _TRAVELS)
        return stored

    return kept


def scale_setter(model: nn.Module, shards: Axis) -> Callable[[], None] | None:
    """Return what sets the scales of all weights that travel in float8, by one exchange; None where none does.

    It is to be called before the passes of a batch: weights change between them only.
    """
    travelling = [p for p in model.parameters() if hasattr(_rows(p), "fsdp_pre_all_gather")]
    return partial(_set_scales, travelling, shards) if travelling else None


def _rows(parameter: Tensor) -> Any:
    return getattr(cast("DTensor", parameter), "_local_tensor", None)


@torch.no_grad()
def _set_scales(travelling: list[nn.Parameter], shards: Axis) -> None:
    from torchao.float8.float8_utils import amax_to_scale

    largest = torch.stack(torch._foreach_norm([local(p) for p in travelling], float("inf")))
    scales = amax_to_scale(shards.highest_(largest), _TRAVELS)
    for parameter, scale in zip(travelling, scales, strict=True):
        _rows(parameter)._precomputed_scale = scale
