"""The processes of a run, and the axes along which they are spread.

One frozen `Mesh` is handed down; nothing here lives in a module-level variable. An axis of size 1 has no process
group, and every operation on it returns its input: one process needs no group at all.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout as set_group_timeout

from lockstep.config import ConfigContainer
from lockstep.config.experts import has_whole_experts
from lockstep.config.model import ModelConfig
from lockstep.errors import UserError
from lockstep.parallel.watch import join

# torch 2.13 renamed both and warns of the names that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: how many processes, which one this is, and their group (None for one process)."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over the axis, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def highest_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the elementwise maximum over the axis, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def stacked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all processes [size, ...], in the order of their ranks; they have one shape."""
        if self.group is None:
            return tensor[None]
        result = tensor.new_empty((self.size, *tensor.shape))
        _all_gather(result.view(-1), tensor.reshape(-1), group=self.group)
        return result

    def exchanged(self, tensor: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Send the first ``sent[0]`` rows to the first process and so on; return what comes, in the order of ranks."""
        if self.group is None:
            return tensor
        result = tensor.new_empty((sum(received), *tensor.shape[1:]))
        dist.all_to_all_single(result, tensor.contiguous(), received, sent, group=self.group)
        return result

    def split_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor [size, ...] over the axis and return the row [...] of this process."""
        if self.group is None:
            return tensor[0]
        result = torch.empty_like(tensor[0], memory_format=torch.contiguous_format)
        _reduce_scatter(result.view(-1), tensor.reshape(-1), group=self.group)
        return result

    def begin_sum(self, tensor: torch.Tensor) -> dist.Work | None:
        """Start to add up a tensor over the axis, in place; None where there is nothing to wait for."""
        return None if self.group is None else dist.all_reduce(tensor, group=self.group, async_op=True)

    def begin_split_sum(self, tensor: torch.Tensor, part: torch.Tensor) -> dist.Work | None:
        """Start to add up a tensor [size * n] over the axis; ``part`` [n], which may lie in it, gets this row."""
        return None if self.group is None else _reduce_scatter(part, tensor, group=self.group, async_op=True)

    def begin_stacked(self, part: torch.Tensor, whole: torch.Tensor) -> dist.Work | None:
        """Start to put the parts [n] of all processes, in the order of their ranks, into ``whole`` [size * n]."""
        if self.group is None:
            whole.copy_(part)
            return None
        return _all_gather(whole, part, group=self.group, async_op=True)


@dataclass(frozen=True)
class Mesh:
    """The axes of a layout, and all processes together.

    Ranks are numbered as in Megatron-LM, tensor-parallel neighbours next to each other, then context, data and
    pipeline: rank = ((pp.rank * dp.size + dp.rank) * cp.size + cp.rank) * tp.size + tp.rank. With
    ``dist.use_tp_pp_dp_mapping`` data and pipeline change places.

    Attributes:
        dp: data parallel; each process has micro-batches of its own.
        cp: context parallel; each process has a part of the sequence.
        tp: tensor parallel; each process has a part of every layer.
        pp: pipeline parallel; each process has some of the layers.
        replicas: dp and cp together: the processes that have the same weights.
        shards: neighbours in replicas over which weights or optimizer state are shared out, where they are.
        instances: the processes that have the same shard; shards and instances together are replicas.
        ep: expert parallel; neighbours in replicas, or in these and tp where tp does not split experts, that share out
            the experts of every layer.
        expert_replicas: the processes that have the same experts; ep and these together are replicas, or these and tp.
        ends: first and last process of a pipeline, which both have tied word embeddings; size 1 elsewhere.
        world: all processes.
        sequence_parallel: the residual stream is split over tp; on only where tp is more than one process.
        whole_experts: processes of tp have whole experts, and hand out their parts of the sequence.
        closing: what is called before the process groups go, whatever has happened; it must not wait for a GPU.
    """

    dp: Axis = field(default_factory=Axis)
    cp: Axis = field(default_factory=Axis)
    tp: Axis = field(default_factory=Axis)
    pp: Axis = field(default_factory=Axis)
    replicas: Axis = field(default_factory=Axis)
    shards: Axis = field(default_factory=Axis)
    instances: Axis = field(default_factory=Axis)
    ep: Axis = field(default_factory=Axis)
    expert_replicas: Axis = field(default_factory=Axis)
    ends: Axis = field(default_factory=Axis)
    world: Axis = field(default_factory=Axis)
    sequence_parallel: bool = False
    whole_experts: bool = False
    closing: ExitStack = field(default_factory=ExitStack, compare=False, repr=False)

    @property
    def experts_apart(self) -> bool:
        """Whether experts lie otherwise than the weights that all processes of replicas have."""
        return self.ep.size > 1 or self.whole_experts

    @property
    def leads(self) -> bool:
        """Whether this process keeps the record and prints."""
        return self.world.rank == 0

    def from_leader(self, value: Any) -> Any:
        """Return the leading process's value on every process."""
        if self.world.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.world.group)
        return box[0]

    def set_timeout(self, timeout: timedelta) -> None:
        """Let collectives fail after another time than that of the start."""
        for axis in (
            self.world,
            self.dp,
            self.cp,
            self.tp,
            self.pp,
            self.replicas,
            self.shards,
            self.instances,
            self.ep,
            self.expert_replicas,
            self.ends,
        ):
            if axis.group is not None:
                set_group_timeout(timeout, axis.group)

    def describe(self) -> dict[str, Any]:
        """Return the layout as the record keeps it."""
        return {
            "processes": self.world.size,
            "data_parallel": self.dp.size,
            "context_parallel": self.cp.size,
            "tensor_parallel": self.tp.size,
            "pipeline_parallel": self.pp.size,
            "expert_parallel": self.ep.size,
            "expert_tensor_parallel": 1 if self.whole_experts else self.tp.size,
            "sequence_parallel": self.sequence_parallel,
        }


@contextmanager
def start_processes(
    config: ConfigContainer, device: torch.device, on_loss: Callable[[BaseException], None] = lambda error: None
) -> Iterator[Mesh]:
    """Join the other processes of the launcher for the duration of a run; alone, start nothing.

    A process that loses another one says so, calls ``on_loss`` and ends: see ``watch.py``.

    Raises:
        UserError: the launcher did not say where the processes meet, or GPUs are to use gloo.
    """
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size == 1:
        mesh = Mesh()
        with mesh.closing:
            yield mesh
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE={world_size}, but {missing[0]} is not set; start with torchrun")
    if device.type == "cuda" and config.dist.distributed_backend == "gloo":
        raise UserError("dist.distributed_backend (--distributed-backend) = gloo is for CPUs; use nccl with GPUs")
    backend = "gloo" if device.type == "cpu" else "nccl"
    timeout = timedelta(minutes=config.dist.distributed_timeout_minutes)
    store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    closing = ExitStack()
    try:
        with join(store, rank, world_size, os.environ["MASTER_ADDR"], timeout.total_seconds(), on_loss):
            place = {"store": store, "rank": rank, "world_size": world_size}
            dist.init_process_group(backend, **place, timeout=timeout, device_id=device if backend == "nccl" else None)
            instances = config.ddp.num_distributed_optimizer_instances
            mesh = build_mesh(config.model, device.type, config.dist.use_tp_pp_dp_mapping, instances)
            yield replace(mesh, closing=closing)
    finally:
        closing.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def build_mesh(model: ModelConfig, device_type: str, pipeline_first: bool = False, instances: int = 1) -> Mesh:
    """Arrange the processes of the default group, whose number is a multiple of those of the model.

    ``pipeline_first`` numbers along the pipeline before data parallel. ``instances`` is how often what is shared out
    over data-parallel processes is there.
    """
    world, tp = dist.get_world_size(), model.tensor_model_parallel_size
    cp, pp = model.context_parallel_size, model.pipeline_model_parallel_size
    sizes = {"pp": pp, "dp": world // (pp * cp * tp), "cp": cp, "tp": tp}
    order = ("dp", "pp", "cp", "tp") if pipeline_first else ("pp", "dp", "cp", "tp")
    devices = init_device_mesh(device_type, tuple(sizes[name] for name in order), mesh_dim_names=order)

    def axis(name: str) -> Axis:
        return _axis_of(devices[name]) if sizes[name] > 1 else Axis()

    replicas = axis("dp") if cp == 1 else axis("cp")
    if cp > 1 and sizes["dp"] > 1:
        replicas = _axis_of(devices["dp", "cp"]._flatten("replicas"))
    same = ("dp", "cp")
    shards, copies = (replicas, Axis()) if instances == 1 else _runs(devices, replicas.size // instances, same)
    ep, whole = model.expert_model_parallel_size, has_whole_experts(model)
    experts, expert_replicas = Axis(), replicas
    if ep > 1 or whole:
        experts, expert_replicas = _runs(devices, ep, (*same, "tp") if whole else same)
    return Mesh(
        dp=axis("dp"),
        cp=axis("cp"),
        tp=axis("tp"),
        pp=axis("pp"),
        replicas=replicas,
        shards=shards,
        instances=copies,
        ep=experts,
        expert_replicas=expert_replicas,
        ends=_ends(devices) if pp > 1 else Axis(),
        world=Axis(world, dist.get_rank(), dist.group.WORLD),
        sequence_parallel=model.sequence_parallel and tp > 1,
        whole_experts=whole,
    )


def _axis_of(devices: DeviceMesh) -> Axis:
    return Axis(devices.size(), devices.get_local_rank(), devices.get_group())


def _ends(devices: DeviceMesh) -> Axis:
    """Join the first and the last process of every pipeline."""
    return _axis_along(_in_order(devices, "pp")[[0, -1]].flatten(1).t())


def _runs(devices: DeviceMesh, size: int, within: tuple[str, ...]) -> tuple[Axis, Axis]:
    """Cut the processes that differ in the axes ``within`` only into runs of ``size``; return axes along and across."""
    others = [name for name in ("pp", "tp") if name not in within]
    runs = _in_order(devices, *others, *within).flatten(len(others)).unflatten(-1, (-1, size))
    return _axis_along(runs.flatten(0, -2)), _axis_along(runs.transpose(-1, -2).flatten(0, -2))


def _in_order(devices: DeviceMesh, *names: str) -> torch.Tensor:
    """Return the ranks with these axes first."""
    assert devices.mesh_dim_names is not None, "the axes of the mesh have names"
    return devices.mesh.movedim([devices.mesh_dim_names.index(name) for name in names], list(range(len(names))))


def _axis_along(ranks: torch.Tensor) -> Axis:
    """Return the axis of this process where every row of ranks [groups, size] is one; size 1 if it is in none."""
    size = ranks.shape[1]
    if size == 1:
        return Axis()
    group, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
    return Axis() if group is None else Axis(size, dist.get_group_rank(group, dist.get_rank()), group)
