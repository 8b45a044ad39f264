"""Building a model with the initial weights Megatron-LM draws from the same seed.

Default: the numbers of Megatron-LM's initialisation on one GPU. Weights come from the CUDA generator seeded with
seed + 2718 (the offset of its first tensor-parallel rank), those of experts from one seeded with seed + 1024, in the
dtype of the parameters; learned positions, routers and the gates of shared experts come, in float32, from a CPU
generator seeded with the seed. Without a CUDA device `lockstep.models.philox` produces the same stream.

`use_cpu_initialization`: all weights come, in float32, from one CPU generator seeded with the seed.

The order of draws is the order of the parameters of the whole model, whatever part of it is filled. Where a table of
learned positions is drawn it is drawn twice, and the first draw thrown away: Megatron-LM's constructor initialises the
table before its initialisation does. So is the output projection of multi-latent attention: Megatron-core makes that of
plain attention, with heads of kv_channels, before it.
"""

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lockstep.config.model import ModelConfig
from lockstep.models.decoder import GPTModel
from lockstep.models.expert_weights import Rooms
from lockstep.models.layers import required
from lockstep.models.philox import CudaNormalGenerator

_HASHERS = min(8, os.cpu_count() or 1)
_GPU_SEED_OFFSET = 2718
_GPU_EXPERT_SEED_OFFSET = 1024

_WORDS = "embedding.word_embeddings.weight"
_POSITIONS = "embedding.position_embeddings.weight"
_GATE = ".shared_experts.gate_weight"
_ATTENTION_OUTPUT = ".self_attention.linear_proj.weight"
_ROUTER = (".router.weight", ".router.bias")

# Returns a tensor of the given shape from N(0, std).
Draw = Callable[[torch.Size, float], Tensor]


Part = Callable[[str, Tensor], Tensor]
"""Takes the name and the whole value of a parameter and returns what a process keeps of it."""

Keep = Callable[[torch.nn.Module, str, Tensor], None]
"""Gives the parameter of a module with some name in it its value."""


def build_model(config: ModelConfig, *, seed: int, params_dtype: torch.dtype, device: torch.device) -> GPTModel:
    """Build the model of a resolved config and draw its weights; every parameter has `params_dtype`.

    No global random state is read or changed.
    """
    model = GPTModel(config, dtype=params_dtype, device=torch.device("meta"))
    fill(model, initial_weights(config, seed, params_dtype, device))
    return model


def _replace(owner: torch.nn.Module, leaf: str, value: Tensor) -> None:
    trained = getattr(owner, leaf).requires_grad
    setattr(owner, leaf, torch.nn.Parameter(value, requires_grad=trained))


def fill(
    model: torch.nn.Module,
    weights: Iterator[tuple[str, Tensor]],
    part: Part = lambda _, whole: whole,
    keep: Keep | None = None,
) -> None:
    """Give the parameters of a model on the meta device their values, and so its device.

    `weights` are the values of a whole model; the model may lack some of them, and have a `part` of the others.
    Without `keep` a parameter is its value, but the experts of a linear lie in one tensor, end to end. Buffers, the
    biases of experts, start at zero.
    """
    missing = dict(model.named_parameters())
    rooms = Rooms(missing)
    device = torch.device("cpu")
    for name, whole in weights:
        parameter = missing.pop(name, None)
        if parameter is None:
            continue
        value = part(name, whole)
        assert value.shape == parameter.shape, f"{name}: {value.shape} for {parameter.shape}"
        owner, _, leaf = name.rpartition(".")
        if keep is None:
            _replace(model.get_submodule(owner), leaf, rooms.placed(name, value))
        else:
            keep(model.get_submodule(owner), leaf, value)
        device = value.device
    assert not missing, f"no value for {list(missing)}"
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.zeros_like(buffer, device=device))


@torch.no_grad()
def initial_weights(
    config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and initial value, as `dtype`, of every parameter of the whole model, in order and one at a time."""
    on_cpu = _cpu_draw(seed)
    draw = expert_draw = on_cpu
    if not config.use_cpu_initialization:
        draw = _gpu_draw(seed + _GPU_SEED_OFFSET, dtype, device)
        expert_draw = _gpu_draw(seed + _GPU_EXPERT_SEED_OFFSET, dtype, device)
    for name, parameter in in_order(GPTModel(config, dtype=dtype, device=torch.device("meta"))):
        if name.endswith((*_ROUTER, _GATE)):
            value = on_cpu(parameter.shape, initial_std(config, name))
        elif parameter.dim() < 2:
            value = torch.full(parameter.shape, _constant(config, name))
        elif name == _POSITIONS:
            on_cpu(parameter.shape, 1.0)
            value = on_cpu(parameter.shape, initial_std(config, name))
        else:
            drawn = expert_draw if ".local_experts." in name else draw
            if config.multi_latent_attention and name.endswith(_ATTENTION_OUTPUT):
                plain = required(config.num_attention_heads) * required(config.kv_channels)
                drawn(torch.Size((parameter.shape[0], plain)), 1.0)
            value = drawn(parameter.shape, initial_std(config, name))
        yield name, value.to(device=device, dtype=dtype)


def in_order(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters in the order Megatron-LM draws them: the gate of shared experts after their linears."""
    gate = None
    for name, parameter in model.named_parameters():
        if name.endswith(_GATE):
            gate = (name, parameter)
            continue
        yield name, parameter
        if gate is not None and name.endswith(".shared_experts.linear_fc2.weight"):
            yield gate
            gate = None


def _constant(config: ModelConfig, name: str) -> float:
    """Return the value of a vector: biases are zero, norms change nothing."""
    return 1.0 if name.endswith("layernorm.weight") and not config.layernorm_zero_centered_gamma else 0.0


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
        emulated = CudaNormalGenerator(seed)
        return lambda shape, std: emulated.normal(shape, std, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    return lambda shape, std: torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)


class Fingerprint:
    """Hashes of the parameters of a model, added one by one in the order of the whole model.

    Some are hashed at a time, by threads; a parameter must not change before ``result`` is called.
    """

    def __init__(self) -> None:
        self._prints: dict[str, dict[str, Any]] = {}
        self._threads = ThreadPoolExecutor(_HASHERS, thread_name_prefix="fingerprint")
        self._hashing: deque[tuple[str, Future[str]]] = deque()

    def add(self, name: str, parameter: Tensor) -> None:
        """Describe a parameter."""
        values = parameter.detach().contiguous()
        exact = values.double()
        self._prints[name] = {
            "shape": list(values.shape),
            "dtype": str(values.dtype).removeprefix("torch."),
            "sha256": "",
            "sum": float(exact.sum()),
            "sumsq": float(exact.square().sum()),
        }
        if len(self._hashing) >= 2 * _HASHERS:  # host memory holds no more
            self._settle()
        self._hashing.append((name, self._threads.submit(_hash, values.cpu())))

    def _settle(self) -> None:
        name, digest = self._hashing.popleft()
        self._prints[name]["sha256"] = digest.result()

    def take(self, name: str, known: dict[str, Any]) -> None:
        """Add a parameter that is described already."""
        self._prints[name] = known

    def added(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights on, each added."""
        for name, value in weights:
            self.add(name, value)
            yield name, value

    def result(self) -> dict[str, dict[str, Any]]:
        """Return the description of every parameter, and under "all" that of the model.

        A parameter has shape, dtype, sha256 (first 16 hex digits of its little-endian bytes), sum and sumsq (float64);
        "all" has sha256 of the names and hashes in order.
        """
        while self._hashing:
            self._settle()
        overall = hashlib.sha256("".join(f"{name} {told['sha256']}\n" for name, told in self._prints.items()).encode())
        return self._prints | {"all": {"sha256": overall.hexdigest()[:16]}}


def _hash(values: Tensor) -> str:
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()[:16]


def fingerprint(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Return the fingerprint of a model of one process."""
    prints = Fingerprint()
    for _ in prints.added(in_order(model)):
        pass
    return prints.result()
