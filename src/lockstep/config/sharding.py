"""What data-parallel processes share out instead of each having all of it, by what the tree says."""

from collections.abc import Callable, Iterator
from typing import Literal

from lockstep.config.container import ConfigContainer

Strategy = Literal["no_shard", "optim", "optim_grads", "optim_grads_params"]
"""Nothing; main weights and optimizer state; gradients too; weights too. Megatron-LM's names."""


def sharding_strategy(config: ConfigContainer) -> Strategy:
    """Return what is shared out where several processes have the same weights."""
    if config.dist.use_torch_fsdp2:
        return "optim_grads_params" if config.ddp.torch_fsdp2_reshard_after_forward else "optim_grads"
    if config.dist.use_megatron_fsdp:
        return config.ddp.data_parallel_sharding_strategy
    return "optim" if config.ddp.use_distributed_optimizer else "no_shard"


def shards_weights(config: ConfigContainer) -> bool:
    """Tell whether PyTorch's fully_shard keeps the weights."""
    return sharding_strategy(config) in ("optim_grads", "optim_grads_params")


def sharding_problems(c: ConfigContainer, replicas: int, name: Callable[[str], str]) -> Iterator[str]:
    """Yield what is wrong with how ``replicas`` processes with the same weights share out; ``name`` names a field."""
    yield from _contradictions(c, name)
    yield from _without_effect(c, name)
    if not shards_weights(c):
        yield from _of_sharded_weights(c, name)
    if shards_weights(c) and replicas > 1:
        yield from _of_whole_weights(c, name)
    yield from _float8_gather(c, replicas, name)
    instances, path = c.ddp.num_distributed_optimizer_instances, "ddp.num_distributed_optimizer_instances"
    if instances < 1:
        yield f"{name(path)} = {instances}: give 1 or more"
    elif instances > 1 and sharding_strategy(c) == "no_shard":
        yield f"{name(path)} = {instances} has no effect where nothing is sharded; add --use-distributed-optimizer"
    elif replicas % instances:
        yield (
            f"{name(path)} = {instances} does not divide the {replicas} processes that have the same weights; "
            f"use a divisor of {replicas}"
        )


def _float8_gather(c: ConfigContainer, replicas: int, name: Callable[[str], str]) -> Iterator[str]:
    precision, path = c.mixed_precision, "mixed_precision.fp8_param_gather"
    if not precision.fp8_param_gather or precision.fp8 is None:
        return
    if not shards_weights(c):
        yield f"{name(path)} is for sharded weights (--use-torch-fsdp2); whole ones travel in BF16; drop it"
    elif replicas // max(1, c.ddp.num_distributed_optimizer_instances) == 1:
        yield f"{name(path)} has no effect where one process has all weights; drop it"


def _contradictions(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    if c.dist.use_torch_fsdp2 and c.dist.use_megatron_fsdp:
        yield f"{name('dist.use_torch_fsdp2')} and {name('dist.use_megatron_fsdp')} exclude each other; drop one"
    elif c.dist.use_torch_fsdp2 and c.ddp.use_distributed_optimizer:
        yield (
            f"{name('dist.use_torch_fsdp2')} shards the optimizer already, and excludes "
            f"{name('ddp.use_distributed_optimizer')}; drop one"
        )


def _without_effect(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    if not (c.dist.use_torch_fsdp2 or c.ddp.torch_fsdp2_reshard_after_forward):
        yield (
            f"{name('ddp.torch_fsdp2_reshard_after_forward')} has no effect without dist.use_torch_fsdp2 "
            "(--use-torch-fsdp2); add that or drop this"
        )
    strategy, path = c.ddp.data_parallel_sharding_strategy, "ddp.data_parallel_sharding_strategy"
    # Saved settings of both trainers have the field whether it is used or not: one as its default, one as no_shard.
    given = strategy == "optim_grads_params" and c.origin(path).kind == "command line"
    if not c.dist.use_megatron_fsdp and (given or strategy in ("optim", "optim_grads")):
        yield (
            f"{name(path)} = {strategy} has no effect without dist.use_megatron_fsdp (--use-megatron-fsdp); "
            "add that or drop this"
        )


def _of_sharded_weights(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    if c.run.gradient_sync == "micro-batch":
        yield (
            f"{name('run.gradient_sync')} = micro-batch is for sharded weights (--use-torch-fsdp2); gradients of whole "
            "ones are added up once a step; drop it"
        )


def _of_whole_weights(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    for path in ("ddp.num_buckets", "ddp.bucket_size", "ddp.pad_buckets_for_high_nccl_busbw"):
        if c.get(path):
            yield f"{name(path)} has no effect with sharded weights, which are exchanged layer by layer; drop it"
    path = "train.check_weight_hash_across_dp_replicas_interval"
    if c.get(path):
        yield f"{name(path)} compares whole weights, and sharded ones are not; drop it"
