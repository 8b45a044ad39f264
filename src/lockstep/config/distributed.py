"""Sections that say how processes work together."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lockstep.config.fields import opt
from lockstep.config.reasons import NARROW_FORMATS
from lockstep.config.section import Section
from lockstep.config.variants import Communicators, MegatronFSDP

_RECORDER = (
    "PyTorch's flight recorder is set up in the environment: TORCH_FR_BUFFER_SIZE, TORCH_FR_DUMP_TEMP_FILE, "
    "TORCH_NCCL_DUMP_ON_TIMEOUT"
)
_SYMMETRIC = "PyTorch overlaps tensor-parallel communication only in compiled code with symmetric memory"


@dataclass(kw_only=True)
class DDPConfig(MegatronFSDP, Section):
    """Data parallelism and gradient reduction."""

    section_name: ClassVar[str] = "ddp"

    check_for_large_grads: bool = opt(
        False,
        "--check-for-large-grads",
        refused="gradients are checked by their norm, on the record of every iteration; only finite ones go on",
    )
    grad_reduce_in_fp32: bool | None = opt(
        None,
        "--accumulate-allreduce-grads-in-fp32",
        help="Accumulate and reduce gradients in FP32; on with BF16 unless --grad-reduce-in-bf16.",
    )
    overlap_grad_reduce: bool = opt(
        False,
        "--overlap-grad-reduce",
        help="Reduce the gradients of a bucket as soon as they are there; sharded weights always do.",
        effect="speed",
    )
    num_buckets: int | None = opt(
        None,
        "--ddp-num-buckets",
        help="Set the bucket size so that about as many buckets hold all gradients of a process.",
        effect="speed",
    )
    bucket_size: int | None = opt(
        None,
        "--ddp-bucket-size",
        help="Gradient elements after which a bucket is full, and reduced alone; unset, 40 million, or 1 million for "
        "each process with the same weights where these are more.",
        effect="speed",
    )
    pad_buckets_for_high_nccl_busbw: bool = opt(
        False,
        "--ddp-pad-buckets-for-high-nccl-busbw",
        help="Fill each process's part of a bucket up to a multiple of 65536 elements.",
        effect="speed",
    )
    reduce_scatter_with_fp32_accumulation: bool = opt(
        False,
        "--ddp-reduce-scatter-with-fp32-accumulation",
        refused="gradients are added up in the format they are kept in; keep them in FP32 with "
        "ddp.grad_reduce_in_fp32=true (--accumulate-allreduce-grads-in-fp32)",
    )
    param_name_patterns_for_fp32_local_accumulation: list[str] = opt(
        [],
        "--ddp-param-name-patterns-for-fp32-local-accumulation",
        refused="all gradients are kept in one format; keep them in FP32 with "
        "ddp.grad_reduce_in_fp32=true (--accumulate-allreduce-grads-in-fp32)",
    )
    average_in_collective: bool = opt(
        False,
        "--ddp-average-in-collective",
        holds="losses are divided by global counts before the backward pass, so the reduction is a sum",
        effect="speed",
    )
    overlap_param_gather: bool = opt(
        False,
        "--overlap-param-gather",
        help="Send updated weights while the next forward pass begins; sharded weights always do.",
        effect="speed",
    )
    align_param_gather: bool = opt(
        True,
        "--no-align-param-gather",
        negated=True,
        holds="every pipeline stage sends its weights when it has updated them; when does not change them",
        effect="speed",
    )
    use_distributed_optimizer: bool = opt(
        False,
        "--use-distributed-optimizer",
        help="Share main weights and optimizer state out to the data-parallel processes.",
        effect="speed",
    )
    nccl_ub: bool = opt(
        False, "--use-nccl-ub", refused="PyTorch registers no user buffers with NCCL here", effect="speed"
    )
    disable_symmetric_registration: bool = opt(
        False,
        "--disable-symmetric-registration",
        holds="no user buffers are registered with NCCL, so none symmetrically",
        effect="speed",
    )
    create_all_gather_group: bool = opt(
        False,
        "--create-all-gather-group",
        refused="weights and gradients travel in one group of processes",
        effect="speed",
    )
    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] = opt(
        "optim_grads_params",
        "--data-parallel-sharding-strategy",
        help="What --use-megatron-fsdp shares out: nothing, optimizer state, gradients too, or weights too.",
        effect="speed",
    )
    outer_dp_sharding_strategy: Literal["no_shard", "optim"] = opt(
        "no_shard",
        "--outer-dp-sharding-strategy",
        refused="instances of the shards have the same optimizer state",
        effect="speed",
    )
    gradient_reduce_div_fusion: bool = opt(
        True,
        "--no-gradient-reduce-div-fusion",
        negated=True,
        holds="losses are divided by global counts before the backward pass, so the reduction is a sum",
        effect="speed",
    )
    suggested_communication_unit_size: int | None = opt(
        None, "--suggested-communication-unit-size", refused="this option of data parallelism is not supported yet"
    )
    keep_fp8_transpose_cache: bool = opt(
        False,
        "--keep-fp8-transpose-cache",
        refused=NARROW_FORMATS,
    )
    enable_full_sharding_in_hsdp: bool = opt(
        False,
        "--enable-full-sharding-in-hsdp",
        refused="Megatron-LM reads it nowhere; one instance of the shards is fully sharded",
        effect="speed",
    )
    num_distributed_optimizer_instances: int = opt(
        1,
        "--num-distributed-optimizer-instances",
        help="How many times the data-parallel processes have all that is shared out, each time on neighbouring ranks.",
        effect="speed",
    )
    torch_fsdp2_reshard_after_forward: bool = opt(
        True,
        "--torch-fsdp2-no-reshard-after-forward",
        negated=True,
        help="With --use-torch-fsdp2, free a layer's whole weights after its forward pass.",
        effect="speed",
    )


@dataclass(kw_only=True)
class DistributedConfig(Communicators, Section):
    """Process groups."""

    section_name: ClassVar[str] = "dist"

    distributed_backend: Literal["nccl", "gloo"] = opt(
        "nccl",
        "--distributed-backend",
        help="nccl with GPUs, which refuse gloo; CPUs use gloo whatever is given.",
        effect="speed",
    )
    distributed_timeout_minutes: int = opt(
        10,
        "--distributed-timeout-minutes",
        help="Minutes after which a collective that does not end fails.",
        effect="speed",
    )
    align_grad_reduce: bool = opt(
        True,
        "--no-align-grad-reduce",
        "--disable-align-grad-reduce",
        negated=True,
        holds="every pipeline stage reduces gradients when it has them; when does not change the sums",
        effect="speed",
    )
    local_rank: int = opt(0, "--local-rank", holds="the launcher sets LOCAL_RANK", effect="speed")
    lazy_mpu_init: bool = opt(
        False,
        "--lazy-mpu-init",
        refused="process groups are made when a run starts; another program cannot make them later",
        effect="speed",
    )
    use_megatron_fsdp: bool = opt(
        False,
        "--use-megatron-fsdp",
        help="Share out what --data-parallel-sharding-strategy says; PyTorch's fully_shard does it.",
        effect="speed",
    )
    use_torch_fsdp2: bool = opt(
        False,
        "--use-torch-fsdp2",
        help="Shard weights, gradients and optimizer state over data parallel by PyTorch's fully_shard.",
        effect="speed",
    )
    use_tp_pp_dp_mapping: bool = opt(
        False,
        "--use-tp-pp-dp-mapping",
        help="Number processes along the pipeline before data parallel, so that stages are next to each other.",
        effect="speed",
    )
    use_gloo_process_groups: bool = opt(
        True,
        "--disable-gloo-process-groups",
        negated=True,
        holds="GPUs exchange everything through NCCL",
        effect="speed",
    )
    use_sharp: bool = opt(
        False, "--use-sharp", refused="reductions inside the network (SHARP) are not set up", effect="speed"
    )
    sharp_enabled_group: Literal["dp", "dp_replica"] | None = opt(
        None,
        "--sharp-enabled-group",
        refused="reductions inside the network (SHARP) are not set up",
        effect="speed",
    )
    high_priority_stream_groups: list[str] = opt(
        [],
        "--high-priority-stream-groups",
        refused="all process groups communicate on streams of one priority",
        effect="speed",
    )
    distributed_timeout_seconds_after_init: int | None = opt(
        None,
        "--distributed-timeout-seconds-after-init",
        help="Seconds after which a collective fails once the first iteration is done.",
        effect="speed",
    )
    flight_recorder_dump_path: str | None = opt(None, "--flight-recorder-dump-path", refused=_RECORDER, effect="speed")
    flight_recorder_trace_buffer_size: int = opt(
        2000,
        "--flight-recorder-trace-buffer-size",
        refused=_RECORDER,
        effect="speed",
    )
    flight_recorder_dump_on_timeout: bool = opt(
        True,
        "--no-flight-recorder-dump-on-timeout",
        "--disable-flight-recorder-dump-on-timeout",
        negated=True,
        refused=_RECORDER,
        effect="speed",
    )
    flight_recorder_include_stack_trace: bool = opt(
        False,
        "--flight-recorder-include-stack-trace",
        refused=_RECORDER,
        effect="speed",
    )
    flight_recorder_include_only_active: bool = opt(
        True,
        "--no-flight-recorder-include-only-active",
        "--disable-flight-recorder-include-only-active",
        negated=True,
        refused=_RECORDER,
        effect="speed",
    )
    flight_recorder_extra_dump_on_exec: bool = opt(
        True,
        "--no-flight-recorder-extra-dump-on-exec",
        "--disable-flight-recorder-extra-dump-on-exec",
        negated=True,
        refused=_RECORDER,
        effect="speed",
    )
    disable_jit_fuser: bool = opt(
        False, "--disable-jit-fuser", holds="chooses a kernel, not the result; Lockstep picks its own", effect="speed"
    )
    use_layer_wise_param_layout: bool = opt(
        True,
        "--no-use-layer-wise-param-layout",
        negated=True,
        holds="it is for optimizers that work layer by layer, which there are not",
        effect="speed",
    )
    fake_process_group: bool = opt(
        False,
        "--fake-process-group",
        refused="a run exchanges real numbers; lockstep plan answers for layouts without their processes",
        effect="speed",
    )
    enable_megatron_core_experimental: bool = opt(
        False, "--enable-experimental", refused="Megatron-LM's experimental features are not supported"
    )


@dataclass(kw_only=True)
class CommOverlapConfig(Section):
    """Overlap of communication with computation."""

    section_name: ClassVar[str] = "comm_overlap"

    tp_comm_overlap: bool = opt(False, "--tp-comm-overlap", refused=_SYMMETRIC, effect="speed")
    tp_comm_bootstrap_backend: Literal["nccl", "mpi", "gloo"] = opt(
        "nccl",
        "--tp-comm-bootstrap-backend",
        holds="it is for the start of tp_comm_overlap, which is refused",
        effect="speed",
    )
    overlap_moe_expert_parallel_comm: bool = opt(
        False,
        "--overlap-moe-expert-parallel-comm",
        refused="the exchange of tokens between experts is not overlapped",
        effect="speed",
    )
    delay_wgrad_compute: bool = opt(
        False,
        "--delay-wgrad-compute",
        refused="gradients of weights and of inputs come from one backward pass",
        effect="speed",
    )
    defer_embedding_wgrad_compute: bool = opt(
        False,
        "--defer-embedding-wgrad-compute",
        refused="gradients of weights and of inputs come from one backward pass",
        effect="speed",
    )
    wgrad_deferral_limit: int = opt(
        0,
        "--wgrad-deferral-limit",
        holds="it limits defer_embedding_wgrad_compute, which is refused",
        effect="speed",
    )
    tp_comm_overlap_cfg: str | None = opt(
        None,
        "--tp-comm-overlap-cfg",
        refused=_SYMMETRIC,
        effect="speed",
    )
