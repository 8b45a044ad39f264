import pytest

from lockstep.config import ConfigContainer, Origin, Ref, resolve
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags
from tests.commands import FLAGS, TINY

TRACE = ["--profile", "--use-pytorch-profiler", "--profile-step-start", "1"]


def tiny(*more: str) -> ConfigContainer:
    return parse_flags([*TINY, *more])


def problem(*more: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(tiny(*more))
    return str(caught.value)


def test_derived_values_of_the_reference_flags() -> None:
    config = resolve(parse_flags(FLAGS))
    assert config.model.num_query_groups == 4
    assert config.model.kv_channels == 64
    assert config.model.add_qkv_bias
    assert config.scheduler.lr_decay_iters == 10
    assert config.scheduler.start_weight_decay == config.scheduler.end_weight_decay == 0.01
    assert config.validation.eval_global_batch_size == 32
    assert config.dataset.random_seed == 1234
    assert config.dataset.split == "1,1,1"
    assert config.origin("scheduler.lr_decay_iters") == Origin("derived", "train.train_iters")


@pytest.mark.parametrize(("flags", "width"), [([], 64), (["--swiglu"], int(4 * 160 * 2 / 3 / 64) * 64)])
def test_ffn_hidden_size_follows_the_gate(flags: list[str], width: int) -> None:
    hidden = ["--hidden-size", "160", "--num-attention-heads", "4"] if flags else []
    assert resolve(tiny(*hidden, *flags)).model.ffn_hidden_size == width


def test_resolve_leaves_its_argument_alone() -> None:
    config = tiny()
    resolve(config)
    assert config.scheduler.lr_decay_iters is None


def test_references_follow_the_final_value() -> None:
    config = tiny()
    config.set("scheduler.lr_warmup_init", Ref("optimizer.lr"), Origin("recipe", "r"))
    config.optimizer.lr = 5e-4
    assert resolve(config).scheduler.lr_warmup_init == 5e-4
    config.set("optimizer.lr", Ref("scheduler.lr_warmup_init"), Origin())
    with pytest.raises(ConfigError, match="itself a reference"):
        resolve(config)


def test_all_problems_come_back_at_once() -> None:
    text = problem("--hidden-size", "15", "--global-batch-size", "5", "--min-lr", "1", "--fp16", "--bf16")
    assert text.startswith("4 problems")
    for part in ("not divisible by --num-attention-heads", "use 4 or 6", "above --lr", "exclude each other"):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--lr-warmup-iters", "500"], "set scheduler.lr_warmup_iters=0, or scheduler.lr_decay_iters=501"),
        (["--lr-decay-style", "WSD"], "needs scheduler.lr_wsd_decay_iters"),
        (["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "9"], "longer than the whole decay"),
        (["--max-position-embeddings", "4"], "is below --seq-length = 8"),
        (["--num-attention-heads", "0"], "give a value above 0"),
        (["--decoder-last-pipeline-num-layers", "1"], "--decoder-last-pipeline-num-layers has no effect with"),
        (["--pipeline-model-parallel-layout", ""], "--pipeline-model-parallel-layout has no effect with"),
        (["--num-layers", "9" * 30], "--num-layers = " + "9" * 30 + ": give at most 65536"),
        (["--ffn-hidden-size", "9" * 30], ": give at most 2147483647"),
        (["--global-batch-size", "9" * 30], ": give at most 9223372036854775807"),
        (["--embedding-init-method-std", "nan"], "--embedding-init-method-std = nan: give 0 or more"),
        (["--hidden-dropout", "1.5"], "up to, but not including, 1"),
        (["--tensor-model-parallel-size", "2"], "1 processes are not a multiple of --tensor-model-parallel-size = 2"),
        (
            ["--pipeline-model-parallel-size", "2"],
            "1 processes are not a multiple of --pipeline-model-parallel-size = 2; start 2",
        ),
        (
            ["--context-parallel-size", "2"],
            "1 processes are not a multiple of --context-parallel-size = 2; start 2",
        ),
        (["--context-parallel-size", "8"], "--seq-length = 8 is not divisible by 2 times --context-parallel-size = 8"),
        (["--cp-comm-type", "p2p", "a2a"], "--cp-comm-type names 2 types; give one, or one for each layer"),
        (
            ["--hierarchical-context-parallel-sizes", "2", "2"],
            "the product of --hierarchical-context-parallel-sizes = [2, 2] is not model.context_parallel_size",
        ),
        (["--save", "x"], "--save needs checkpoint.save_interval (--save-interval)"),
        (["--use-checkpoint-args"], "--use-checkpoint-args has no effect without checkpoint.load"),
        (["--attention-backend", "flash"], "has no attention dropout"),
        (["--position-embedding-type", "yarn"], "use learned_absolute, rope or none"),
        (["--train-samples", "8"], "exclude each other"),
        (["--data-path", "x"], "exclude each other"),
        (["--weight-decay-incr-style", "linear"], "needs start_weight_decay and end_weight_decay"),
        (["--optimizer", "lion"], "use adam or sgd"),
        (["--loss-scale", "8"], "has no effect without --fp16"),
        (["--group-query-attention", "--num-query-groups", "3"], "is not divisible by --num-query-groups = 3"),
        (["--no-position-embedding"], "needs --position-embedding-type rope"),
        (["--rampup-batch-size", "2", "2"], "takes three numbers"),
        (["--rerun-mode", "report_stats"], "no rerun state machine"),
        (["--recompute-granularity", "full", "--recompute-num-layers", "1"], "full needs model.recompute_method"),
        (["--recompute-granularity", "full", "--recompute-method", "block"], "needs model.recompute_num_layers"),
        (
            ["--recompute-activations", "--recompute-method", "block"],
            "= block is for model.recompute_granularity = full",
        ),
        (["--recompute-activations", "--recompute-num-layers", "1"], "= 1 is for model.recompute_granularity = full"),
        (["--recompute-method", "uniform"], "= uniform is for model.recompute_granularity = full; drop it"),
        (["--recompute-activations", "--recompute-num-layers", "0"], "give a value above 0"),
        (["--recompute-activations", "--recompute-modules", "mlp", "moe"], "moe is part of models with experts"),
        (["--recompute-activations", "--recompute-modules", "attention"], "there is no module attention; use some of"),
        (["--recompute-activations", "--recompute-modules"], "nothing would be recomputed"),
        (["--recompute-modules", "mlp"], "no effect without model.recompute_granularity = selective"),
        (["--distribute-saved-activations"], "spreading kept activations over ranks is not supported"),
        (["--profile"], "Nsight Systems is not supported; add profiling.use_pytorch_profiler"),
        (["--profile-step-end", "3"], "no effect without profiling.use_pytorch_profiler"),
        (["--profile-ranks", "1"], "no effect without profiling.use_pytorch_profiler"),
        ([*TRACE, "--profile-step-end", "1"], "--profile-step-end = 1 leaves no iteration to trace; give 2 or more"),
        ([*TRACE, "--profile-step-start", "3", "--profile-step-end", "3"], "give 4 or more"),
        ([*TRACE, "--profile-step-start", "-1"], "--profile-step-start = -1: give 0 or more"),
        (["--profile", "--use-pytorch-profiler"], "start) = 10: the run ends with iteration 3; start earlier"),
        ([*TRACE, "--profile-ranks", "0", "1"], "there is no rank 1; ranks are 0 to 0"),
        ([*TRACE, "--skip-train"], "this run only evaluates"),
        ([*TRACE, "--nvtx-ranges"], "only traces by PyTorch's profiler are supported"),
        (["--lr-warmup-fraction", "0.5", "--lr-warmup-iters", "1"], "excludes lr_warmup_iters"),
    ],
)
def test_each_problem_names_what_and_remedy(flags: list[str], part: str) -> None:
    assert part in problem(*flags)


def test_the_sequence_is_cut_for_context_and_sequence_parallelism() -> None:
    words = ["--context-parallel-size", "2", "--tensor-model-parallel-size", "4", "--sequence-parallel"]
    sizes = ["--num-attention-heads", "4", "--cp-comm-type", "a2a", "--hierarchical-context-parallel-sizes", "2", "1"]
    fine = tiny(*words, *sizes, "--seq-length", "16", "--max-position-embeddings", "16")
    assert resolve(fine, world_size=8).model.cp_comm_type == ["a2a"]
    with pytest.raises(ConfigError) as caught:
        resolve(tiny(*words, *sizes, "--seq-length", "12", "--max-position-embeddings", "12"), world_size=8)
    assert str(caught.value).endswith(
        "--seq-length = 12 is not divisible by --tensor-model-parallel-size = 4 times --context-parallel-size = 2, as "
        "--sequence-parallel needs; change one of them"
    )
    with pytest.raises(ConfigError, match="--cp-comm-type: expected list of one of p2p, all_gather, a2a, "):
        tiny("--cp-comm-type", "ring")


def test_recomputation_of_every_kind_is_taken() -> None:
    full = tiny("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "4")
    assert resolve(full).model.recompute_modules is None
    selective = resolve(tiny("--recompute-activations"))
    assert (selective.model.recompute_granularity, selective.model.recompute_modules) == ("selective", ["core_attn"])
    assert resolve(tiny("--recompute-modules", "core_attn")).model.recompute_granularity is None
    chosen = tiny("--recompute-granularity", "selective", "--recompute-modules", "layernorm", "mlp")
    assert resolve(chosen).model.recompute_modules == ["layernorm", "mlp"]
    with pytest.raises(ConfigError, match="contradict each other"):
        tiny("--recompute-activations", "--recompute-granularity", "full")


def test_a_trace_is_asked_for_as_either_peer_does() -> None:
    assert resolve(tiny(*TRACE, "--profile-step-end", "3", "--profile-ranks", "0")).profiling.profile_ranks == [0]
    assert resolve(tiny(*TRACE[1:])).profiling.use_pytorch_profiler
    assert resolve(tiny("--profile-ranks", "0")).profiling.profile_ranks == [0]


def test_a_long_warmup_of_a_longer_schedule_is_fine() -> None:
    config = resolve(tiny("--lr-warmup-iters", "500", "--lr-decay-iters", "1000"))
    assert config.scheduler.lr_warmup_iters == 500


@pytest.mark.parametrize(
    ("processes", "flags", "part"),
    [
        (
            3,
            ["--tensor-model-parallel-size", "2"],
            "3 processes are not a multiple of --tensor-model-parallel-size = 2",
        ),
        (4, ["--tensor-model-parallel-size", "4"], "--num-attention-heads = 2 is not divisible by"),
        (
            2,
            ["--tensor-model-parallel-size", "2", "--ffn-hidden-size", "33"],
            "--ffn-hidden-size = 33 is not divisible",
        ),
        (
            2,
            ["--tensor-model-parallel-size", "2", "--group-query-attention", "--num-query-groups", "1"],
            "--num-query-groups = 1 is not divisible by --tensor-model-parallel-size = 2",
        ),
        (
            2,
            ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--seq-length", "7"],
            "--seq-length = 7 is not divisible by --tensor-model-parallel-size = 2",
        ),
        (4, ["--global-batch-size", "4"], "micro-batch size 2 times 4 data-parallel processes; use a multiple of 8"),
        (2, ["--overlap-param-gather"], "needs ddp.use_distributed_optimizer (--use-distributed-optimizer) and ddp."),
        (2, ["--overlap-param-gather", "--overlap-grad-reduce"], "--overlap-param-gather needs ddp.use_distributed_"),
        (2, ["--ddp-num-buckets", "2", "--ddp-bucket-size", "9"], "exclude each other"),
        (2, ["--ddp-bucket-size", "0"], "--ddp-bucket-size = 0: give a value above 0"),
        (
            2,
            ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "E(t)*99999999999|L"],
            "repeats something 99999999999 times",
        ),
        (2, ["--tp-comm-overlap"], "--tp-comm-overlap = true: PyTorch overlaps tensor-parallel communication only"),
        (2, ["--decrease-batch-size-if-needed"], "cannot share out is an error"),
        (1, ["--microbatch-group-size-per-virtual-pipeline-stage", "5"], "give 1, or drop it"),
    ],
)
def test_a_layout_that_cannot_be_is_one_short_error(processes: int, flags: list[str], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(tiny(*flags), world_size=processes)
    assert part in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "flags",
    [
        "--overlap-grad-reduce --ddp-num-buckets 10 --ddp-average-in-collective --ddp-pad-buckets-for-high-nccl-busbw",
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --no-align-grad-reduce",
        "--use-tp-pp-dp-mapping --distributed-timeout-minutes 60 --distributed-timeout-seconds-after-init 120",
        "--check-weight-hash-across-dp-replicas-interval 10 --disable-gloo-process-groups --data-parallel-random-init",
        "--overlap-p2p-communication-warmup-flush --no-use-layer-wise-param-layout --distributed-backend nccl",
    ],
)
def test_what_launch_scripts_give_is_taken(flags: str) -> None:
    resolve(tiny(*flags.split()), world_size=2)


def test_the_batch_follows_the_data_parallel_size() -> None:
    flags = [word for word in TINY if word != "--global-batch-size" and word != "4"]
    config = parse_flags([*flags, "--tensor-model-parallel-size", "2"])
    config.train.global_batch_size = None
    assert resolve(config, world_size=4).train.global_batch_size == 2 * config.train.micro_batch_size  # type: ignore[operator]


def test_divided_scores_have_their_softmax_in_fp32() -> None:
    config = tiny("--apply-query-key-layer-scaling")
    config.set("model.attention_softmax_in_fp32", False, Origin("recipe"))
    assert resolve(config).model.attention_softmax_in_fp32


def test_sequence_parallel_needs_tensor_parallel_where_it_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--sequence-parallel splits the sequence between tensor-parallel"):
        resolve(tiny("--sequence-parallel"), world_size=2)
    config = tiny()
    config.set("model.sequence_parallel", True, Origin("recipe"))
    config = resolve(config, world_size=2)
    assert not config.model.sequence_parallel
    assert config.origin("model.sequence_parallel").kind == "derived"


def test_missing_values_are_listed_with_key_and_flag() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(ConfigContainer())
    assert "model.num_layers (--num-layers) is not set" in str(caught.value)
    assert "the length of the run is not set" in str(caught.value)
