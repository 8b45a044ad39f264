"""Sections that say what a run writes and reports."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lockstep.config.fields import opt
from lockstep.config.section import Section
from lockstep.config.variants import RoutingTraces, TensorDumps

_BACKGROUND = (
    "saves in the background are written by a thread that the process keeps; what is saved is the same either way"
)


@dataclass(kw_only=True)
class RunConfig(Section):
    """What only Lockstep has: the run directory, the device, what is compiled, and when gradients are added up."""

    section_name: ClassVar[str] = "run"

    dir: str | None = opt(
        None, "--run-dir", help="Run directory; a new folder under nemo_experiments/<name>/ when unset.", effect="path"
    )
    device: Literal["auto", "cpu", "cuda"] = opt(
        "auto", "--device", help="Where to train; auto takes a GPU when there is one.", effect="speed"
    )
    compile: Literal["auto", "none", "blocks"] = opt(
        "auto",
        "--compile",
        help="Compile every layer without experts (blocks); auto does so on GPUs where the run is long enough to pay.",
        effect="speed",
    )
    cuda_graphs: Literal["auto", "none", "micro-batches"] = opt(
        "auto",
        "--cuda-graphs",
        help="Launch forward and backward pass of a micro-batch as one CUDA graph; auto does so for small models on "
        "one GPU.",
        effect="speed",
    )
    gradient_sync: Literal["auto", "micro-batch", "step"] = opt(
        "auto",
        "--gradient-sync",
        help="Add gradients of sharded weights up over processes after every micro-batch, or once a step, which keeps "
        "them whole in between; auto does the latter on GPUs where they take at most a tenth of the memory.",
        effect="speed",
    )


@dataclass(kw_only=True)
class CheckpointConfig(TensorDumps, Section):
    """Saving and loading."""

    section_name: ClassVar[str] = "checkpoint"

    save: str | None = opt(
        None, "--save", help="Folder that checkpoints are written to; nothing is saved when unset.", effect="path"
    )
    save_interval: int | None = opt(
        None,
        "--save-interval",
        "--persistent-save-interval",
        help="Iterations between checkpoints.",
        effect="path",
    )
    save_retain_interval: int | None = opt(
        None,
        "--save-retain-interval",
        help="Keep checkpoints of iterations divisible by this, and the newest; a multiple of save_interval.",
        effect="path",
    )
    most_recent_k: int = opt(-1, help="Keep so many of the newest checkpoints; -1 keeps all.", effect="path")
    load: str | None = opt(
        None, "--load", help="Folder of checkpoints to resume from; a run starts fresh when unset.", effect="path"
    )
    load_main_params_from_ckpt: bool = opt(
        False,
        "--load-main-params-from-ckpt",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    non_persistent_save_interval: int | None = opt(
        None,
        "--non-persistent-save-interval",
        refused="non-persistent checkpoints are not supported yet",
        effect="path",
    )
    non_persistent_ckpt_type: Literal["global", "local", "in_memory"] | None = opt(
        None, "--non-persistent-ckpt-type", refused="non-persistent checkpoints are not supported yet", effect="path"
    )
    non_persistent_global_ckpt_dir: str | None = opt(
        None,
        "--non-persistent-global-ckpt-dir",
        refused="non-persistent checkpoints are not supported yet",
        effect="path",
    )
    non_persistent_local_ckpt_dir: str | None = opt(
        None,
        "--non-persistent-local-ckpt-dir",
        refused="non-persistent checkpoints are not supported yet",
        effect="path",
    )
    non_persistent_local_ckpt_algo: Literal["fully_parallel", "atomic"] = opt(
        "fully_parallel",
        "--non-persistent-local-ckpt-algo",
        refused="non-persistent checkpoints are not supported yet",
        effect="path",
    )
    finetune: bool = opt(False, "--finetune", help="Load the weights alone and start at iteration 0.")
    pretrained_checkpoint: str | None = opt(
        None,
        "--pretrained-checkpoint",
        help="Checkpoint or Hugging Face folder whose weights a run starts from, unless load holds checkpoints.",
        effect="path",
    )
    ckpt_step: int | None = opt(None, "--ckpt-step", help="Iteration to load instead of the newest.", effect="path")
    use_checkpoint_args: bool = opt(
        False,
        "--use-checkpoint-args",
        help="Take the settings of model and tokenizer from the checkpoint; sizes that are given stay.",
        effect="path",
    )
    use_mp_args_from_checkpoint_args: bool = opt(
        False,
        "--use-mp-args-from-checkpoint-args",
        help="With use_checkpoint_args, take tensor- and pipeline-parallel sizes too.",
        effect="path",
    )
    use_tokenizer_model_from_checkpoint_args: bool = opt(
        True,
        "--no-use-tokenizer-model-from-checkpoint-args",
        "--disable-use-tokenizer-model-from-checkpoint-args",
        negated=True,
        help="With use_checkpoint_args, take the tokenizer too.",
        effect="path",
    )
    exit_on_missing_checkpoint: bool = opt(
        False,
        "--exit-on-missing-checkpoint",
        holds="a checkpoint that was named and cannot be loaded always ends the run",
        effect="path",
    )
    ckpt_format: Literal["torch", "torch_dist", "torch_dcp", "fsdp_dtensor"] = opt(
        "torch_dist",
        "--ckpt-format",
        only=("torch_dist", "torch_dcp", "fsdp_dtensor"),
        refused="checkpoints are written by torch.distributed.checkpoint, and always as safetensors files",
        effect="path",
    )
    auto_detect_ckpt_format: bool = opt(
        False,
        "--auto-detect-ckpt-format",
        holds="a checkpoint says itself what it is, and one that Lockstep did not write is refused",
        effect="path",
    )
    ckpt_convert_format: Literal["torch", "torch_dist"] | None = opt(
        None, "--ckpt-convert-format", refused="only checkpoints of Lockstep itself are read", effect="path"
    )
    ckpt_convert_save: str | None = opt(
        None, "--ckpt-convert-save", refused="only checkpoints of Lockstep itself are read", effect="path"
    )
    ckpt_convert_update_legacy_dist_opt_format: bool = opt(
        False,
        "--ckpt-convert-update-legacy-dist-opt-format",
        refused="only checkpoints of Lockstep itself are read",
        effect="path",
    )
    fully_parallel_save: bool = opt(
        True,
        "--no-ckpt-fully-parallel-save",
        negated=True,
        holds="processes with the same weights always share out the writing; what is saved is the same either way",
        effect="path",
    )
    async_save: bool = opt(
        False, "--async-save", help="Write checkpoints in the background while training goes on.", effect="path"
    )
    async_strategy: Literal["nvrx", "mcore"] = opt("nvrx", "--async-strategy", holds=_BACKGROUND, effect="path")
    use_persistent_ckpt_worker: bool = opt(False, "--use-persistent-ckpt-worker", holds=_BACKGROUND, effect="path")
    async_ckpt_cpu_priority: int = opt(
        10, "--async-ckpt-cpu-priority", refused="a thread of the process writes in the background", effect="path"
    )
    async_ckpt_io_priority: int = opt(
        3, "--async-ckpt-io-priority", refused="a thread of the process writes in the background", effect="path"
    )
    async_ckpt_use_cpu_shm: bool = opt(
        False, "--async-ckpt-use-cpu-shm", refused="a thread of the process writes in the background", effect="path"
    )
    fully_parallel_load: bool = opt(
        False,
        "--ckpt-fully-parallel-load",
        holds="every process reads its part of the files itself; what is loaded is the same either way",
        effect="path",
    )
    ckpt_fully_parallel_load_exchange_algo: Literal["broadcast", "gather_rounds", "gather_object"] = opt(
        "broadcast",
        "--ckpt-fully-parallel-load-exchange-algo",
        refused="processes read their parts of the files themselves and exchange nothing",
        effect="path",
    )
    ckpt_fully_parallel_load_per_rank_objects: bool = opt(
        False,
        "--ckpt-fully-parallel-load-per-rank-objects",
        refused="processes read their parts of the files themselves and exchange nothing",
        effect="path",
    )
    ckpt_fully_parallel_save_process_group: Literal["dp", "ep_dp"] = opt(
        "dp",
        "--ckpt-fully-parallel-save-process-group",
        refused="the writing is shared out over all processes with the same weights",
        effect="path",
    )
    ckpt_fully_parallel_load_process_group: Literal["dp", "ep_dp"] = opt(
        "dp",
        "--ckpt-fully-parallel-load-process-group",
        refused="processes read their parts of the files themselves and exchange nothing",
        effect="path",
    )
    ckpt_assume_constant_structure: bool = opt(
        False,
        "--ckpt-assume-constant-structure",
        holds="each save is planned anew, which takes milliseconds; what is saved is the same either way",
        effect="path",
    )
    ckpt_pg_tensors_cache_path: str | None = opt(
        None,
        "--ckpt-pg-tensors-cache-path",
        refused="this tunes Megatron-LM's checkpoint format, which is not used here",
        effect="path",
    )
    ckpt_pg_tensors_cache_create: bool = opt(
        False,
        "--ckpt-pg-tensors-cache-create",
        refused="this tunes Megatron-LM's checkpoint format, which is not used here",
        effect="path",
    )
    ckpt_load_validate_sharding_integrity: bool = opt(
        True,
        "--no-ckpt-load-validate-sharding-integrity",
        "--disable-ckpt-load-validate-sharding-integrity",
        negated=True,
        refused="this tunes Megatron-LM's checkpoint format, which is not used here",
        effect="path",
    )
    strict_fsdp_dtensor_load: bool = opt(
        True,
        "--no-strict-fsdp-dtensor-load",
        "--disable-strict-fsdp-dtensor-load",
        negated=True,
        refused="a checkpoint that lacks something is never loaded in part",
        effect="path",
    )
    dist_ckpt_strictness: Literal[
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ] = opt(
        "assume_ok_unexpected",
        "--dist-ckpt-strictness",
        holds="all values do the same with a checkpoint of this model, and one of another model is refused by name",
        effect="path",
    )
    dist_ckpt_save_pre_mcore_014: bool = opt(
        False,
        "--dist-ckpt-save-pre-mcore-014",
        refused="this tunes Megatron-LM's checkpoint format, which is not used here",
        effect="path",
    )
    dist_ckpt_optim_fully_reshardable: bool = opt(
        False,
        "--dist-ckpt-optim-fully-reshardable",
        holds="the optimizer's state can always be loaded in another layout",
        effect="path",
    )
    distrib_optim_fully_reshardable_mem_efficient: bool = opt(
        False,
        "--distrib-optim-fully-reshardable-mem-efficient",
        refused="this tunes Megatron-LM's checkpoint format, which is not used here",
        effect="path",
    )
    save_tokenizer_assets: bool = opt(
        True,
        "--no-save-tokenizer-assets",
        "--disable-save-tokenizer-assets",
        negated=True,
        holds="tokenizer files are not copied; the run record names the tokenizer by its hash",
        effect="path",
    )
    replication: bool = opt(False, "--replication", refused="replicated checkpoints are not supported", effect="path")
    replication_jump: int | None = opt(
        None, "--replication-jump", refused="replicated checkpoints are not supported", effect="path"
    )
    replication_factor: int = opt(
        2, "--replication-factor", refused="replicated checkpoints are not supported", effect="path"
    )
    verify_integrity: bool = opt(
        False, "--verify-integrity", holds="the hash of every file is checked before it is loaded", effect="path"
    )
    save_optim: bool = opt(True, "--no-save-optim", negated=True, help="Save the optimizer state.", effect="path")
    save_rng: bool = opt(True, "--no-save-rng", negated=True, help="Save the random streams of dropout.", effect="path")
    load_optim: bool = opt(
        True, "--no-load-optim", negated=True, help="Load the optimizer state and the position in the schedules."
    )
    load_rng: bool = opt(True, "--no-load-rng", negated=True, help="Load the random streams of dropout.")
    override_ckpt_iteration: int | None = opt(
        None, "--override-ckpt-iteration", refused="not supported; use ckpt_step", effect="path"
    )
    dist_ckpt_workers: int = opt(
        1,
        "--dist-ckpt-workers",
        refused="this tunes Megatron-LM's checkpoint format, which is not used here",
        effect="path",
    )
    ckpt_drop_redundant_extra_state: bool = opt(
        False,
        "--ckpt-drop-redundant-extra-state",
        refused="this tunes Megatron-LM's checkpoint format, which is not used here",
        effect="path",
    )


@dataclass(kw_only=True)
class LoggerConfig(RoutingTraces, Section):
    """Console, TensorBoard and trackers."""

    section_name: ClassVar[str] = "logger"

    log_interval: int = opt(100, "--log-interval", help="Iterations between console lines.", effect="log")
    log_params_norm: bool = opt(False, "--log-params-norm", help="Log the norm of the weights.", effect="log")
    log_throughput: bool = opt(False, "--log-throughput", help="Log TFLOP/s.", effect="log")
    log_progress: bool = opt(False, "--log-progress", refused="this log output is not supported yet", effect="log")
    timing_log_level: Literal[0, 1, 2] = opt(
        0, "--timing-log-level", only=(0,), refused="detailed timers are not supported yet", effect="log"
    )
    timing_log_option: Literal["max", "minmax", "all"] = opt(
        "minmax", "--timing-log-option", holds="timers are off, so nothing is printed in either form", effect="log"
    )
    tensorboard_dir: str | None = opt(
        None, "--tensorboard-dir", help="TensorBoard folder; the run directory's tb_logs when unset.", effect="log"
    )
    tensorboard_log_interval: int = opt(
        1, "--tensorboard-log-interval", help="Iterations between TensorBoard points.", effect="log"
    )
    tensorboard_queue_size: int = opt(
        1000, "--tensorboard-queue-size", help="TensorBoard points kept before a write.", effect="log"
    )
    log_timers_to_tensorboard: bool = opt(
        False,
        "--log-timers-to-tensorboard",
        help="Write iteration-time (seconds, mean of a log interval) and throughput to the trackers.",
        effect="log",
    )
    log_loss_scale_to_tensorboard: bool = opt(
        True,
        "--no-log-loss-scale-to-tensorboard",
        "--disable-log-loss-scale-to-tensorboard",
        negated=True,
        help="Write the loss scale to TensorBoard.",
        effect="log",
    )
    log_validation_ppl_to_tensorboard: bool = opt(
        False, "--log-validation-ppl-to-tensorboard", help="Write validation perplexity to TensorBoard.", effect="log"
    )
    log_memory_to_tensorboard: bool = opt(
        False, "--log-memory-to-tensorboard", help="Write memory use to TensorBoard.", effect="log"
    )
    log_memory_interval: int | None = opt(
        None, "--log-memory-interval", refused="this log output is not supported yet", effect="log"
    )
    log_device_memory_used: bool = opt(
        False, "--log-device-memory-used", refused="this log output is not supported yet", effect="log"
    )
    log_num_zeros_in_grad: bool = opt(
        False, "--log-num-zeros-in-grad", help="Log how many gradient elements are zero.", effect="log"
    )
    log_max_attention_logit: bool = opt(
        False, "--log-max-attention-logit", refused="this log output is not supported yet", effect="log"
    )
    log_world_size_to_tensorboard: bool = opt(
        False, "--log-world-size-to-tensorboard", help="Write the number of processes to TensorBoard.", effect="log"
    )
    wandb_project: str | None = opt(
        None, "--wandb-project", help="Weights & Biases project; none when unset.", effect="log"
    )
    wandb_exp_name: str | None = opt(None, "--wandb-exp-name", help="Weights & Biases run name.", effect="log")
    wandb_save_dir: str | None = opt(None, "--wandb-save-dir", help="Weights & Biases folder.", effect="log")
    wandb_entity: str | None = opt(None, "--wandb-entity", help="Weights & Biases entity.", effect="log")
    logging_level: int | None = opt(None, "--logging-level", help="Level of the Python logger.", effect="log")
    log_energy: bool = opt(False, "--log-energy", refused="this log output is not supported yet", effect="log")


@dataclass(kw_only=True)
class ProfilingConfig(Section):
    """Profilers."""

    section_name: ClassVar[str] = "profiling"

    use_nsys_profiler: bool = opt(
        False,
        "--profile",
        help="Profile; only by PyTorch's profiler, with use_pytorch_profiler. Nsight Systems is not supported.",
        effect="log",
    )
    profile_step_start: int = opt(10, "--profile-step-start", help="First iteration that is traced.", effect="log")
    profile_step_end: int = opt(
        12, "--profile-step-end", help="First iteration that is not traced any more.", effect="log"
    )
    use_pytorch_profiler: bool = opt(
        False,
        "--use-pytorch-profiler",
        help="Trace iterations by PyTorch's profiler into torch_profile/ of the run directory.",
        effect="log",
    )
    pytorch_profiler_collect_shapes: bool = opt(
        False, "--pytorch-profiler-collect-shapes", help="Trace the shapes of tensors too.", effect="log"
    )
    pytorch_profiler_collect_callstack: bool = opt(
        False, "--pytorch-profiler-collect-callstack", help="Trace the Python call stack too.", effect="log"
    )
    pytorch_profiler_collect_chakra: bool = opt(
        False,
        "--pytorch-profiler-collect-chakra",
        refused="only traces by PyTorch's profiler are supported",
        effect="log",
    )
    profile_ranks: list[int] = opt([], "--profile-ranks", help="Ranks that are traced; all when empty.", effect="log")
    record_memory_history: bool = opt(
        False, "--record-memory-history", refused="only traces by PyTorch's profiler are supported", effect="log"
    )
    memory_snapshot_path: str = opt(
        "snapshot.pickle",
        "--memory-snapshot-path",
        refused="only traces by PyTorch's profiler are supported",
        effect="log",
    )
    record_shapes: bool = opt(
        False, "--record-shapes", refused="only traces by PyTorch's profiler are supported", effect="log"
    )
    nvtx_ranges: bool = opt(
        False, "--nvtx-ranges", refused="only traces by PyTorch's profiler are supported", effect="log"
    )


@dataclass(kw_only=True)
class StragglerConfig(Section):
    """Straggler detection."""

    section_name: ClassVar[str] = "straggler"

    log_straggler: bool = opt(False, "--log-straggler", refused="straggler detection is not supported", effect="log")
    straggler_ctrlr_port: int = opt(
        65535, "--straggler-ctrlr-port", refused="straggler detection is not supported", effect="log"
    )
    straggler_minmax_count: int = opt(
        1, "--straggler-minmax-count", refused="straggler detection is not supported", effect="log"
    )
    disable_straggler_on_startup: bool = opt(
        False, "--disable-straggler-on-startup", refused="straggler detection is not supported", effect="log"
    )
