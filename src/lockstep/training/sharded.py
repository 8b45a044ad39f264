"""The optimizer's share of each process: main weights and their state.

Where the model's weights are whole, each bucket of them is cut into one part for each process of an axis. A process
gets the sum of the gradients of its parts, updates them, and receives the updated weights of the others. Where the
weights are sharded themselves, its shards are its part.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.config.sharding import sharding_strategy
from lockstep.models import GPTModel
from lockstep.models.ops import widened
from lockstep.parallel.buckets import Bucket, Reduction, bucket_size
from lockstep.parallel.fsdp import is_sharded, local, shards_of, span_of
from lockstep.parallel.gradients import is_shared
from lockstep.parallel.mesh import Axis, Mesh
from lockstep.parallel.mixed import put
from lockstep.parallel.plan import is_expert
from lockstep.training.precision import MainWeights, compute_dtype


class _Weights:
    """The weights of a bucket: the model's own end to end, and this process's part of the main weights."""

    def __init__(self, bucket: Bucket) -> None:
        self._axis = bucket.axis
        self._whole = torch.zeros(bucket.length, dtype=bucket.params[0].dtype, device=bucket.grads.device)
        for param, view in zip(bucket.params, bucket.views(self._whole), strict=True):
            view.copy_(param.detach())
            param.data = view
        self._part = bucket.part(self._whole)
        self.main = torch.empty_like(self._part, dtype=widened(self._part[:0]).dtype).copy_(self._part)
        self._work: dist.Work | None = None

    def reload(self) -> None:
        """Set this process's part of the main weights to the model's, which are equal on all processes."""
        self.main.copy_(self._part)

    def gather(self) -> None:
        """Start to round the main weights of all processes into the model; they travel from where they arrive."""
        put(self._part, self.main)
        self._work = None if self._axis.group is None else self._axis.begin_stacked(self._part, self._whole)

    def wait(self) -> None:
        """Wait until the model has them; a GPU waits, not the host."""
        if self._work is not None:
            self._work.wait()
        self._work = None


class ShardedMainWeights(MainWeights):
    """Main weights of one part: ``main_params`` are its pieces of parameters, one-dimensional.

    ``instances`` have the same part. With ``late_gather`` updated weights travel while the optimizer and the next
    forward pass go on: each module waits for its own.
    """

    sharded = True

    def __init__(
        self,
        model: nn.Module,
        grad_dtype: torch.dtype,
        reduction: Reduction,
        instances: Axis,
        late_gather: bool = False,
    ) -> None:
        super().__init__(model, grad_dtype, reduction)
        self._instances = instances
        self._late_gather = late_gather
        if late_gather:
            assert isinstance(model, GPTModel), "modules that wait are known by name"
            self._wait_before_use(model)

    @torch.no_grad()
    def _build_main(self) -> None:
        names = dict(zip(self.model_params, self.names, strict=True))
        self.main_names, self.main_shapes, self.main_params = [], [], []
        self.main_spans = []
        self._pieces: list[torch.Tensor] = []
        self._weights: list[_Weights] = []
        for bucket in self._gradients.buckets:
            weights = _Weights(bucket)
            self._weights.append(weights)
            for param, span, place in bucket.pieces():
                self.main_names.append(names[param])
                self.main_shapes.append(param.shape)
                self.main_spans.append(span)
                self.main_params.append(nn.Parameter(weights.main[place]))
                self._pieces.append(bucket.part(bucket.grads)[place])

    def hand_over(self) -> list[torch.Tensor]:
        """Return the sum of the gradients of every piece."""
        self._gradients.finish()
        for bucket in self._gradients.buckets:
            self._instances.sum_(bucket.part(bucket.grads))
        return self._pieces

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the main weights to the model's dtype, on all processes."""
        # Forward passes use the last buckets first.
        for weights in reversed(self._weights):
            weights.gather()
        if not self._late_gather:
            self.wait()

    @torch.no_grad()
    def copy_from_model(self) -> None:
        """Set the main weights to the model's, which are equal on all processes."""
        for weights in self._weights:
            weights.reload()

    def wait(self) -> None:
        """Wait until the model has the weights of all processes; a GPU waits, not the host."""
        for weights in self._weights:
            weights.wait()

    def _wait_before_use(self, model: GPTModel) -> None:
        """Have the embedding and each layer wait for their weights, and what comes after the layers for all."""
        modules = [module for module in (model.embedding, *model.decoder.layers.values()) if module is not None]
        buckets = list(zip(self._gradients.buckets, self._weights, strict=True))
        for module in modules:
            own = set(module.parameters())
            needed = [weights for bucket, weights in buckets if not own.isdisjoint(bucket.params)]
            module.register_forward_pre_hook(partial(_wait, needed))
        if model.decoder.final_layernorm is not None:
            model.decoder.final_layernorm.register_forward_pre_hook(partial(_wait, self._weights))
            modules += [model.decoder, *([model.output_layer] if model.output_layer is not None else [])]
        model.register_state_dict_pre_hook(partial(_wait, self._weights))
        waiting = {param for module in modules for param in module.parameters()}
        assert waiting.issuperset(self.model_params), "every parameter has a module that waits for it"


def _wait(needed: list[_Weights], *_: object) -> None:
    for weights in needed:
        weights.wait()


class FullyShardedMainWeights(MainWeights):
    """Main weights that are this process's rows of a model's sharded parameters, and share their memory.

    ``axis_of`` tells over which processes a parameter is sharded, and its gradient already added up; ``instances`` have
    the same rows, and add up in ``reduce_dtype``.
    """

    sharded = True

    def __init__(
        self, model: nn.Module, axis_of: Callable[[str], Axis], instances: Axis, reduce_dtype: torch.dtype
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.model_params = [p for _, p in named]
        self._axis_of = axis_of
        self._instances = instances
        self._reduce_dtype = reduce_dtype
        self._copies = compute_dtype(model).itemsize < self.model_params[0].dtype.itemsize
        self._grads: list[torch.Tensor] = []
        self._build_main()

    def _build_main(self) -> None:
        self.main_names, self.main_shapes, self.main_params = [], [], []
        self.main_spans = []
        for name, param in zip(self.names, self.model_params, strict=True):
            begin, end = span_of(param, self._axis_of(name))
            if begin < end:
                self.main_spans.append((begin, end))
                self.main_names.append(name)
                self.main_shapes.append(param.shape)
                self.main_params.append(nn.Parameter(local(param)))

    @property
    def copies(self) -> bool:
        """Whether the main weights have more digits than what the model computes with."""
        return self._copies

    def start_step(self, micro_batches: int | None = None) -> None:
        """Forget the gradients of the step before."""
        for param in self.model_params:
            param.grad = None

    def collect_grads(self) -> list[torch.Tensor]:
        """Return the gradient of this process's rows of every parameter, none of some, zero where nothing came."""
        self._grads = [
            local(param.grad) if param.grad is not None else torch.zeros_like(local(param))
            for param in self.model_params
        ]
        return self._grads

    def hand_over(self) -> list[torch.Tensor]:
        """Return the sum of the gradients of all rows over the instances."""
        grads = [grad for grad in self._grads if grad.numel()]
        if self._instances.size > 1:
            sums = self._instances.sum_(torch.cat([grad.flatten() for grad in grads]).to(self._reduce_dtype))
            for grad, total in zip(grads, sums.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))
        return grads

    def copy_to_model(self) -> None:
        """Do nothing: the main weights are the model's."""

    def copy_from_model(self) -> None:
        """Do nothing: the main weights are the model's."""


def build_main_weights(model: nn.Module, config: ConfigContainer, mesh: Mesh) -> MainWeights:
    """Return the main weights of a model that was laid out over ``mesh``: all, or this process's part."""
    model_dtype = compute_dtype(model)
    grad_dtype = torch.float32 if config.ddp.grad_reduce_in_fp32 is not False else model_dtype
    if is_sharded(model):
        reduce_dtype = torch.float64 if model_dtype == torch.float64 else grad_dtype
        return FullyShardedMainWeights(model, partial(shards_of, mesh=mesh), mesh.instances, reduce_dtype)
    shared_out = mesh.shards.size > 1 and sharding_strategy(config) == "optim"
    axis = mesh.shards if shared_out else mesh.replicas
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    reduction = Reduction(
        axis=axis,
        bucket_size=bucket_size(config, elements, mesh.replicas.size),
        axis_of=partial(_axis_of, axis, mesh) if mesh.experts_apart else None,
        multiple=2**16 if config.ddp.pad_buckets_for_high_nccl_busbw else 1,
        overlap=config.ddp.overlap_grad_reduce,
        late=partial(is_shared, config=config.model, mesh=mesh),
    )
    if shared_out:
        return ShardedMainWeights(model, grad_dtype, reduction, mesh.instances, config.ddp.overlap_param_gather)
    return MainWeights(model, grad_dtype, reduction)


def _axis_of(axis: Axis, mesh: Mesh, name: str) -> Axis:
    return mesh.expert_replicas if is_expert(name) else axis
