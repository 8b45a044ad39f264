"""Layers with experts, and what is wrong with their settings."""

import pytest

from lockstep.config import Origin, resolve
from lockstep.config.experts import auxiliary_names, expert_layers
from lockstep.config.model import ModelConfig
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags
from lockstep.megatron_lm.translate import flags_from_config

JOB = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 1 --train-iters 2 "
    "--lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 100 --swiglu --disable-bias-linear"
).split()


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (1, "1111"),
        (2, "1010"),
        ("2", "1010"),
        ([0, 1, 1, 1], "0111"),
        ("[0]+[1]*3", "0111"),
        ("([1]*1+[0])*2", "1010"),
        ("2*[1, 0]", "1010"),
    ],
)
def test_layers_with_experts(given: int | str | list[int], layers: str) -> None:
    config = ModelConfig(num_layers=4, num_moe_experts=2, moe_layer_freq=given)
    assert expert_layers(config) == [layer == "1" for layer in layers]
    assert not any(expert_layers(ModelConfig(num_layers=4)))


@pytest.mark.parametrize(
    "given", ["[0]+[1]", "[2]*4", "0", "__import__('os')", "[1]*10**9", "[1]*999999", "layers", "[["]
)
def test_patterns_that_are_none(given: str) -> None:
    with pytest.raises(ValueError, match=r"give|pattern"):
        expert_layers(ModelConfig(num_layers=4, num_moe_experts=2, moe_layer_freq=given))


_SINKHORN = "--num-experts 4 --moe-router-load-balancing-type sinkhorn"


def problem(*flags: str, processes: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(parse_flags([*JOB, *flags]), processes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--moe-router-topk 4", "--moe-router-topk has no effect without"),
        ("--num-experts 4 --moe-router-topk 5", "--moe-router-topk = 5 is above --num-experts = 4"),
        ("--num-experts 4 --moe-router-topk 1", "add --moe-router-pre-softmax"),
        ("--num-experts 0", "--num-experts = 0: give 1 or more"),
        ("--num-experts 4 --moe-layer-freq [0]*4", "gives no layer experts"),
        ("--num-experts 4 --moe-layer-freq [1]*3", "the pattern is for 3 layers, the model has 4"),
        ("--num-experts 4 --moe-router-num-groups 2", "need each other"),
        ("--num-experts 4 --moe-router-num-groups 3 --moe-router-group-topk 1", "does not divide the 4 experts"),
        ("--num-experts 4 --moe-router-num-groups 2 --moe-router-group-topk 3", "is above"),
        (
            "--num-experts 8 --moe-router-topk 3 --moe-router-num-groups 4 --moe-router-group-topk 2",
            "use a multiple of 2 up to 4",
        ),
        ("--num-experts 4 --moe-router-enable-expert-bias", "needs --moe-router-score-function sigmoid"),
        ("--num-experts 4 --moe-router-load-balancing-type global_aux_loss", "gradients would depend on the layout"),
        (f"{_SINKHORN} aux_loss --moe-aux-loss-coeff 0 0.1", "= sinkhorn stands alone; drop the other kinds"),
        (f"{_SINKHORN} --moe-aux-loss-coeff 0.1", "= sinkhorn adds no loss; set --moe-aux-loss-coeff to 0"),
        (
            f"{_SINKHORN} --moe-router-score-function sigmoid",
            "= sinkhorn has scores of its own; drop --moe-router-score",
        ),
        (f"{_SINKHORN} --moe-router-pre-softmax", "--moe-router-pre-softmax has no effect with --moe-router-load"),
        (
            "--num-experts 4 --moe-router-load-balancing-type quantile_balancing",
            "use aux_loss, seq_aux_loss, sinkhorn or",
        ),
        ("--num-experts 4 --moe-aux-loss-coeff 0.1 0.2", "give one each"),
        ("--num-experts 4 --moe-expert-capacity-factor 0", "drops every token"),
        ("--num-experts 4 --moe-pad-expert-input-to-capacity", "needs model.moe_expert_capacity_factor"),
        ("--num-experts 4 --moe-shared-expert-gate", "needs model.moe_shared_expert_intermediate_size"),
        ("--num-experts 4 --expert-model-parallel-size 0", "= 0: give 1 or more"),
        ("--num-experts 4 --expert-tensor-parallel-size 2", "experts are split as the other layers are"),
        (
            "--num-experts 4 --tensor-model-parallel-size 2 --expert-tensor-parallel-size 1",
            "--expert-tensor-parallel-size = 1 beside --tensor-model-parallel-size = 2 needs --sequence-parallel",
        ),
        ("--expert-tensor-parallel-size 2", "has no effect without model.num_moe_experts (--num-experts)"),
        ("--num-experts 4 --moe-token-dispatcher-type flex", "needs kernels that Lockstep does not use"),
        ("--recompute-granularity selective --recompute-modules moe", "moe is part of models with experts"),
        (
            "--num-experts 4 --recompute-granularity selective --recompute-modules shared_experts",
            "the model has no shared_experts",
        ),
        ("--num-experts 4 --moe-ffn-hidden-size 33 --tensor-model-parallel-size 2", "is not divisible by"),
    ],
)
def test_each_problem_names_what_and_remedy(flags: str, part: str) -> None:
    assert part in problem(*flags.split())


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--expert-model-parallel-size 2", ["= 2 has no effect without model.num_moe_experts (--num-experts)"]),
        ("--num-experts 6 --expert-model-parallel-size 4", ["= 4 does not divide the 6 experts; use a divisor"]),
        ("--num-experts 4 --expert-model-parallel-size 4 --tensor-model-parallel-size 2", ["the 2 data-parallel"]),
        (
            "--num-experts 4 --expert-model-parallel-size 2 --use-torch-fsdp2 --peft-scheme lora",
            ["= 2 with adapters and sharded weights is not supported"],
        ),
        (
            "--num-experts 4 --expert-model-parallel-size 2 --use-torch-fsdp2 --tensor-model-parallel-size 2 "
            "--sequence-parallel --expert-tensor-parallel-size 1",
            ["with sharded weights is not supported"],
        ),
        (
            "--num-experts 8 --expert-model-parallel-size 8 --tensor-model-parallel-size 2 --sequence-parallel "
            "--expert-tensor-parallel-size 1",
            ["= 8 beside --expert-tensor-parallel-size = 1 does not divide the 4 tensor- and data-parallel processes"],
        ),
        (
            "--num-experts 4 --expert-model-parallel-size 2 --use-distributed-optimizer "
            "--num-distributed-optimizer-instances 2",
            ["= 2 with --num-distributed-optimizer-instances is not supported"],
        ),
    ],
)
def test_each_problem_of_sharing_out_experts(flags: str, parts: list[str]) -> None:
    found = problem(*flags.split(), "--global-batch-size", "4", processes=4)
    assert "--expert-model-parallel-size" in found
    assert all(part in found for part in parts), found
    assert found.count("--expert-model-parallel-size") == 1


def test_flags_of_experts_there_and_back() -> None:
    flags = "--num-experts 8 --moe-layer-freq [0]+[1]*3 --moe-router-load-balancing-type aux_loss seq_aux_loss "
    flags += "--moe-aux-loss-coeff 0.1 0.2 --moe-z-loss-coeff 0.01 --moe-ffn-hidden-size 32 --moe-grouped-gemm"
    config = parse_flags([*JOB, *flags.split()])
    assert auxiliary_names(config.model) == ("load_balancing_loss", "seq_load_balancing_loss", "z_loss")
    again = parse_flags(flags_from_config(config))
    assert again.model.as_dict() == config.model.as_dict()
    config.set("model.moe_layer_freq", [0, 1, 1, 1], Origin("python"))
    assert "[0,1,1,1]" in flags_from_config(config)


def test_the_width_of_an_expert_is_that_of_the_mlp_unless_given() -> None:
    assert resolve(parse_flags([*JOB, "--num-experts", "4"])).model.moe_ffn_hidden_size == 128
    assert resolve(parse_flags(JOB)).model.moe_ffn_hidden_size is None
