"""Sharded weights: PyTorch's fully_shard on a model that is otherwise laid out.

Between passes a process keeps some rows of each of its parameters, in FP32 at least: they are the main weights that the
optimizer updates. Around its work a layer has whole weights in the dtype of the model. What its backward pass finds is
added up over the processes, cut into the same rows, right after it, or is kept whole until the last micro-batch of a
step.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.models import GPTModel
from lockstep.models.moe import Experts
from lockstep.models.ops import widened
from lockstep.parallel.mesh import Axis, Mesh
from lockstep.parallel.plan import is_expert

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class WeightSharding:
    """How the weights of a model are sharded.

    Attributes:
        reduce_dtype: what gradients are added up in.
        between_passes_only: weights stay whole from their first use in a batch to the end of its passes, rather than
            for the work of their layer alone.
        device_type: of the processes' devices.
        kept: takes the module that has a parameter, the parameter's name in the model, and the tensor it is to be kept
            in; returns what stands for that tensor towards PyTorch, which says what of it travels.
    """

    reduce_dtype: torch.dtype
    between_passes_only: bool = False
    device_type: str = "cpu"
    kept: Callable[[nn.Module, str, Tensor], Tensor] = lambda module, name, tensor: tensor


def shard_weights(model: GPTModel, mesh: Mesh, sharding: WeightSharding) -> None:
    """Shard every layer, and together what is left of this process's part of the model, over ``mesh.shards``.

    Experts that expert parallelism shares out are sharded over the processes that have the same ones, by themselves.

    The model is on the meta device and stays there. What is left (embedding, final norm, output layer) is whole from
    the first use to the end of a backward pass, since the output layer may share the embedding's weight; so it stays
    whole to the end of a batch's passes, which takes no more memory at the peak. Nor does it to keep the last layer,
    whose backward pass follows its forward pass where there is no pipeline.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert mesh.shards.group is not None, "one process has nothing to shard"
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        # Frozen weights have no main weights.
        kept = widened(parameter.detach()) if parameter.requires_grad else parameter.detach()
        of = model.get_submodule(owner)
        kept = sharding.kept(of, name, kept)
        setattr(of, leaf, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    devices = DeviceMesh.from_group(mesh.shards.group, sharding.device_type, mesh_dim_names=("shards",))
    # Inputs already have the model's dtype.
    policy = MixedPrecisionPolicy(model.dtype, sharding.reduce_dtype, cast_forward_inputs=False)
    resharded = not sharding.between_passes_only
    with_same_experts = _devices_of_experts(mesh, sharding.device_type) if mesh.experts_apart else devices
    layers = list(model.decoder.layers.values())
    for layer in layers:
        freed = resharded and (layer is not layers[-1] or mesh.pp.size > 1)
        for inner in list(layer.modules()) if mesh.experts_apart else ():
            if isinstance(inner, Experts):
                fully_shard(inner, mesh=with_same_experts, mp_policy=policy, reshard_after_forward=freed)
        fully_shard(layer, mesh=devices, mp_policy=policy, reshard_after_forward=freed)
    model.register_forward_hook(_without_views)
    fully_shard(model, mesh=devices, mp_policy=policy, reshard_after_forward=False)
    for module in _sharded_modules(model):
        # The losses behind gradients are divided by the counts of the whole global batch: a sum, and no more.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reshard_after_backward(resharded and module is not model, recurse=False)


def _devices_of_experts(mesh: Mesh, device_type: str) -> "DeviceMesh":
    """Return the processes that have the same experts, with a group also where that is one process."""
    from torch.distributed.device_mesh import DeviceMesh

    group = mesh.expert_replicas.group
    if group is None:
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("shards",))


def shards_of(name: str, mesh: Mesh) -> Axis:
    """Return the processes over which a parameter is sharded, where weights are."""
    return mesh.expert_replicas if mesh.experts_apart and is_expert(name) else mesh.shards


def _without_views(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """Return the losses of a model in memory of their own: PyTorch warns of views, whose hooks can be lost."""
    return output.clone() if output._is_view() else output


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `shard_weights` was applied to a model, or to a layer."""
    # What was never imported cannot have sharded anything: its import is seconds of every start.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def keeper(model: nn.Module, mesh: Mesh) -> Callable[[nn.Module, str, Tensor], None]:
    """Return what sets, of a sharded parameter of a module, the rows of this process from the value of all rows."""
    names = {module: name for name, module in model.named_modules()}

    def keep(owner: nn.Module, leaf: str, value: Tensor) -> None:
        first, end = rows_of(len(value), shards_of(f"{names[owner]}.{leaf}", mesh))
        local(getattr(owner, leaf)).copy_(value[first:end])

    return keep


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a sharded tensor that this process has; they share its memory."""
    detached = tensor.detach()
    tensor_module = sys.modules.get("torch.distributed.tensor")
    if tensor_module is None or not isinstance(detached, tensor_module.DTensor):
        return detached
    rows: Any = cast("DTensor", detached).to_local()
    return cast(Tensor, rows._tensor if hasattr(rows, "fsdp_pre_all_gather") else rows)


def rows_of(rows: int, axis: Axis) -> tuple[int, int]:
    """Return first and end of the rows that this process has of so many: equal parts but for the last ones."""
    width = -(-rows // axis.size)
    return min(rows, axis.rank * width), min(rows, (axis.rank + 1) * width)


def span_of(parameter: Tensor, shards: Axis) -> tuple[int, int]:
    """Return which elements of a sharded parameter, counted row by row, this process has."""
    # PyTorch's own answer can be that of an earlier run in this process, whose groups are gone: it caches meshes.
    first, end = rows_of(len(parameter), shards)
    row = parameter.numel() // len(parameter)
    return first * row, end * row


def own_weights(model: GPTModel, axis_of: Callable[[str], Axis]) -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """Return this process's rows of the parameters it has some of, in the dtype of the model, and their spans.

    ``axis_of`` tells over which processes a parameter is sharded. The tensors are the model's own only where that is
    the dtype in which they are kept.
    """
    found = {name: (local(p).to(model.dtype), span_of(p, axis_of(name))) for name, p in model.named_parameters()}
    return {name: (rows, span) for name, (rows, span) in found.items() if rows.numel()}


@torch.no_grad()
def take_weights(model: GPTModel, weights: Mapping[str, Tensor]) -> None:
    """Set this process's rows of parameters from what `own_weights` returned."""
    for name, rows in weights.items():
        local(model.get_parameter(name)).copy_(rows)


def release(model: nn.Module) -> None:
    """Let go of whole weights after the passes of a batch, so that the next ones see what the optimizer did."""
    for module in _sharded_modules(model):
        module.reshard()


def add_up_gradients(module: nn.Module, now: bool, recurse: bool = True) -> None:
    """Have backward passes of a sharded module add gradients up over processes, or keep them whole for later ones.

    They are kept in the dtype of the reduction. ``recurse``: also in the sharded modules within it. What is not sharded
    stays as it is.
    """
    if is_sharded(module):
        cast("FSDPModule", module).set_requires_gradient_sync(now, recurse=recurse)


def _sharded_modules(model: nn.Module) -> "Iterator[FSDPModule]":
    return (cast("FSDPModule", module) for module in model.modules() if is_sharded(module))
