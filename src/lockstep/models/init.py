"""Building a model with the initial weights Megatron-LM draws from the same seed.

Default: the numbers of Megatron-LM's initialisation on one GPU. Weights come from the CUDA generator seeded with
seed + 2718 (the offset of its first tensor-parallel rank), in the dtype of the parameters; learned positions come from
a CPU generator seeded with the seed. Without a CUDA device `lockstep.models.philox` produces the same stream.

`use_cpu_initialization`: all weights come, in float32, from one CPU generator seeded with the seed.

The order of draws is the order of the parameters. Where a table of learned positions is drawn it is drawn twice, and
the first draw thrown away: Megatron-LM's constructor initialises the table before its initialisation does.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.config.model import ModelConfig
from lockstep.models.decoder import GPTModel
from lockstep.models.layers import required
from lockstep.models.philox import CudaNormalGenerator

_GPU_SEED_OFFSET = 2718

_WORDS = "embedding.word_embeddings.weight"
_POSITIONS = "embedding.position_embeddings.weight"

# Returns a tensor of the given shape from N(0, std).
Draw = Callable[[torch.Size, float], Tensor]


def build_model(config: ModelConfig, *, seed: int, params_dtype: torch.dtype, device: torch.device) -> GPTModel:
    """Build the model of a resolved config and draw its weights; every parameter has `params_dtype`.

    No global random state is read or changed.
    """
    model = GPTModel(config, dtype=params_dtype, device=device)
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: GPTModel, seed: int) -> None:
    """Draw the weights of a model in place; norms and biases keep the constants they are built with."""
    config = model.config
    on_cpu = _cpu_draw(seed)
    example = next(model.parameters())
    draw = on_cpu if config.use_cpu_initialization else _gpu_draw(seed, example.dtype, example.device)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        if name == _POSITIONS:
            on_cpu(parameter.shape, 1.0)
            parameter.copy_(on_cpu(parameter.shape, initial_std(config, name)))
        else:
            parameter.copy_(draw(parameter.shape, initial_std(config, name)))


def initial_std(config: ModelConfig, name: str) -> float:
    """Return the standard deviation that the named weight is drawn with."""
    if name in (_WORDS, _POSITIONS):
        std = config.embedding_init_method_std
        return config.init_method_std if std is None else std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.init_method_std / math.sqrt(2.0 * required(config.num_layers))
    return config.init_method_std


def _cpu_draw(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape, std: torch.empty(shape).normal_(0.0, std, generator=generator)


def _gpu_draw(seed: int, dtype: torch.dtype, device: torch.device) -> Draw:
    if device.type != "cuda":
        emulated = CudaNormalGenerator(seed + _GPU_SEED_OFFSET)
        return lambda shape, std: emulated.normal(shape, std, dtype)
    generator = torch.Generator(device).manual_seed(seed + _GPU_SEED_OFFSET)
    return lambda shape, std: torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Describe every parameter, and under "all" the model, by hashes of their bytes.

    A parameter has shape, dtype, sha256 (first 16 hex digits of its little-endian bytes), sum and sumsq (float64);
    "all" has sha256 of the names and hashes in order.
    """
    prints: dict[str, dict[str, Any]] = {}
    overall = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().cpu().contiguous()
        digest = hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()[:16]
        exact = values.double()
        prints[name] = {
            "shape": list(values.shape),
            "dtype": str(values.dtype).removeprefix("torch."),
            "sha256": digest,
            "sum": float(exact.sum()),
            "sumsq": float(exact.square().sum()),
        }
        overall.update(f"{name} {digest}\n".encode())
    prints["all"] = {"sha256": overall.hexdigest()[:16]}
    return prints
