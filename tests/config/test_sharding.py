"""What data-parallel processes share out, and what cannot be asked for."""

import pytest

from lockstep.config import resolve
from lockstep.config.sharding import sharding_strategy
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags

JOB = (
    "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --global-batch-size 12 "
    "--train-iters 1 --lr 1e-4 --mock-data --tokenizer-type NullTokenizer --vocab-size 7 "
).split()


@pytest.mark.parametrize(
    ("flags", "strategy", "distributed_optimizer"),
    [
        ("", "no_shard", False),
        ("--use-distributed-optimizer", "optim", True),
        ("--use-torch-fsdp2", "optim_grads_params", False),
        ("--use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward", "optim_grads", False),
        ("--use-megatron-fsdp --ckpt-format fsdp_dtensor", "optim_grads_params", True),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", "optim_grads", True),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim", "optim", True),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy no_shard", "no_shard", True),
        ("--data-parallel-sharding-strategy no_shard", "no_shard", False),
        ("--use-torch-fsdp2 --num-distributed-optimizer-instances 2", "optim_grads_params", False),
    ],
)
def test_flags_choose_what_is_shared_out(flags: str, strategy: str, distributed_optimizer: bool) -> None:
    config = resolve(parse_flags([*JOB, *flags.split()]), world_size=4)
    assert sharding_strategy(config) == strategy
    assert config.ddp.use_distributed_optimizer is distributed_optimizer


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--use-torch-fsdp2 --use-megatron-fsdp", "exclude each other"),
        ("--use-torch-fsdp2 --use-distributed-optimizer", "--use-torch-fsdp2 shards the optimizer already"),
        ("--torch-fsdp2-no-reshard-after-forward", "has no effect without dist.use_torch_fsdp2"),
        ("--data-parallel-sharding-strategy optim", "= optim has no effect without dist.use_megatron_fsdp"),
        ("--data-parallel-sharding-strategy optim_grads_params", "has no effect without dist.use_megatron_fsdp"),
        ("--num-distributed-optimizer-instances 2", "has no effect where nothing is sharded"),
        ("--use-torch-fsdp2 --num-distributed-optimizer-instances 0", "= 0: give 1 or more"),
        ("--use-torch-fsdp2 --num-distributed-optimizer-instances 3", "= 3 does not divide the 4 processes"),
        ("--use-megatron-fsdp --outer-dp-sharding-strategy optim", "--outer-dp-sharding-strategy = optim"),
        ("--use-megatron-fsdp --enable-full-sharding-in-hsdp", "Megatron-LM reads it nowhere"),
    ],
)
def test_a_contradiction_is_one_short_error(flags: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(parse_flags([*JOB, *flags.split()]), world_size=4)
    assert part in str(caught.value)


def test_one_process_has_nothing_to_share_out() -> None:
    resolve(parse_flags([*JOB, "--use-torch-fsdp2"]), world_size=1)
