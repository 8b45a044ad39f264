"""Sections that say how long, how fast and with which optimizer a run trains."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lockstep.config.fields import opt
from lockstep.config.reasons import NARROW_FORMATS, OWN_GRAPHS
from lockstep.config.section import Section
from lockstep.config.variants import GpuChecks, InferenceRNG


@dataclass(kw_only=True)
class TrainConfig(GpuChecks, Section):
    """Batches, length of the run and when it stops."""

    section_name: ClassVar[str] = "train"

    micro_batch_size: int | None = opt(None, "--micro-batch-size", help="Samples a forward pass takes at once.")
    global_batch_size: int | None = opt(
        None, "--global-batch-size", help="Samples an optimizer step takes; micro_batch_size when unset."
    )
    rampup_batch_size: list[int] | None = opt(
        None, "--rampup-batch-size", help="Start, increment and samples of a linear batch-size ramp."
    )
    step_batch_size_schedule: str | None = opt(
        None,
        "--step-batch-size-schedule",
        help="THRESHOLD:BATCH pairs: the global batch size from each threshold on, in tokens.",
    )
    decrease_batch_size_if_needed: bool = opt(
        False,
        "--decrease-batch-size-if-needed",
        refused="a batch that the data-parallel processes cannot share out is an error, which says what to give",
        effect="speed",
    )
    empty_unused_memory_level: Literal[0, 1, 2] = opt(
        0,
        "--empty-unused-memory-level",
        help="Give cached GPU memory back after evaluation (1) and after every iteration (2).",
        effect="speed",
    )
    check_weight_hash_across_dp_replicas_interval: int | None = opt(
        None,
        "--check-weight-hash-across-dp-replicas-interval",
        help="Iterations after which processes that should have the same weights compare them; a difference ends the "
        "run.",
        effect="log",
    )
    train_sync_interval: int | None = opt(
        None,
        "--train-sync-interval",
        holds="the host waits for the device once an iteration as it is",
        effect="speed",
    )
    train_iters: int | None = opt(None, "--train-iters", help="Iterations to train.")
    train_samples: int | None = opt(None, "--train-samples", help="Samples to train, instead of iterations.")
    exit_interval: int | None = opt(
        None, "--exit-interval", help="Stop after an iteration divisible by this.", effect="log"
    )
    exit_duration_in_mins: int | None = opt(
        None, "--exit-duration-in-mins", help="Stop after this many minutes.", effect="log"
    )
    exit_signal_handler: bool = opt(
        False, "--exit-signal-handler", help="On a signal, finish the iteration, save and exit with 0.", effect="log"
    )
    exit_signal: str = opt(
        "SIGTERM",
        "--exit-signal",
        choices=("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"),
        help="The signal that exit_signal_handler waits for.",
        effect="log",
    )
    exit_signal_handler_for_dataloader: bool = opt(
        False, "--exit-signal-handler-for-dataloader", refused="this training option is not supported yet"
    )
    exit_signal_handler_for_training: bool = opt(
        False, "--exit-signal-handler-for-training", refused="this training option is not supported yet"
    )
    manual_gc: bool = opt(
        False, "--manual-gc", help="Switch Python's garbage collector off and collect by hand.", effect="speed"
    )
    manual_gc_interval: int = opt(
        0, "--manual-gc-interval", help="Iterations between collections by hand.", effect="speed"
    )
    manual_gc_eval: bool = opt(
        True,
        "--no-manual-gc-eval",
        "--disable-manual-gc-eval",
        negated=True,
        help="Collect by hand around evaluation.",
        effect="speed",
    )
    iterations_to_skip: list[int] = opt([], "--iterations-to-skip", refused="this training option is not supported yet")


@dataclass(kw_only=True)
class ValidationConfig(Section):
    """Evaluation during and after training."""

    section_name: ClassVar[str] = "validation"

    eval_iters: int = opt(100, "--eval-iters", help="Batches an evaluation takes.")
    eval_interval: int | None = opt(
        None, "--eval-interval", help="Iterations between evaluations; only the final one when unset."
    )
    start_eval_at_iter: int | None = opt(None, "--start-eval-at-iter", help="No evaluation before this iteration.")
    eval_global_batch_size: int | None = opt(
        None, "--eval-global-batch-size", help="Samples of an evaluation batch; global_batch_size when unset."
    )
    eval_micro_batch_size: int | None = opt(
        None, "--eval-micro-batch-size", help="Samples of an evaluation forward pass; micro_batch_size when unset."
    )
    skip_train: bool = opt(False, "--skip-train", help="Only evaluate.")
    test_mode: bool = opt(False, "--test-mode", refused="this way of validating is not supported yet")
    full_validation: bool = opt(False, "--full-validation", refused="this way of validating is not supported yet")
    multiple_validation_sets: bool = opt(
        False, "--multiple-validation-sets", refused="this way of validating is not supported yet"
    )
    validation_set_names: list[str] | None = opt(
        None, "--validation-set-names", refused="this way of validating is not supported yet"
    )


@dataclass(kw_only=True)
class OptimizerConfig(Section):
    """The optimizer."""

    section_name: ClassVar[str] = "optimizer"

    weight_decay: float = opt(0.01, "--weight-decay", help="Weight decay of matrices; biases and norms have none.")
    apply_wd_to_qk_layernorm: bool = opt(
        False, "--apply-wd-to-qk-layernorm", help="Decay the weights of query and key norms too."
    )
    clip_grad: float = opt(1.0, "--clip-grad", help="Largest gradient norm; 0 turns clipping off.")
    adam_beta1: float = opt(0.9, "--adam-beta1", help="First Adam beta.")
    adam_beta2: float = opt(0.999, "--adam-beta2", help="Second Adam beta.")
    adam_eps: float = opt(1e-08, "--adam-eps", help="Adam epsilon.")
    sgd_momentum: float = opt(0.9, "--sgd-momentum", help="SGD momentum.")
    muon_momentum: float = opt(
        0.9, "--muon-momentum", refused="only Adam and SGD with FP32 state on the training device are supported"
    )
    muon_split_qkv: bool = opt(
        True,
        "--muon-no-split-qkv",
        negated=True,
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    muon_nesterov: bool = opt(
        False, "--muon-nesterov", refused="only Adam and SGD with FP32 state on the training device are supported"
    )
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = opt(
        "spectral",
        "--muon-scale-mode",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    muon_fp32_matmul_prec: Literal["low", "medium", "high"] = opt(
        "medium",
        "--muon-fp32-matmul-prec",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    muon_coefficient_type: str = opt(
        "quintic",
        "--muon-coefficient-type",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    muon_num_ns_steps: int = opt(
        5, "--muon-num-ns-steps", refused="only Adam and SGD with FP32 state on the training device are supported"
    )
    muon_tp_mode: Literal["blockwise", "duplicated", "distributed"] = opt(
        "duplicated", "--muon-tp-mode", refused="only Adam and SGD with FP32 state on the training device are supported"
    )
    muon_use_syrk: bool = opt(
        False, "--muon-use-syrk", refused="only Adam and SGD with FP32 state on the training device are supported"
    )
    muon_extra_scale_factor: float = opt(
        1.0,
        "--muon-extra-scale-factor",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    muon_scalar_optimizer: Literal["adam", "lion"] = opt(
        "adam",
        "--muon-scalar-optimizer",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    lion_beta1: float = opt(
        0.95, "--lion-beta1", refused="only Adam and SGD with FP32 state on the training device are supported"
    )
    lion_beta2: float = opt(
        0.98, "--lion-beta2", refused="only Adam and SGD with FP32 state on the training device are supported"
    )
    optimizer: Literal["adam", "sgd", "muon", "dist_muon", "lion", "soap", "adaptive_muon"] = opt(
        "adam", "--optimizer", help="Optimizer."
    )
    optimizer_cpu_offload: bool = opt(
        False,
        "--optimizer-cpu-offload",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    optimizer_cuda_graph: bool = opt(
        False,
        "--optimizer-cuda-graph",
        holds=OWN_GRAPHS,
        effect="speed",
    )
    optimizer_offload_fraction: float = opt(
        1.0,
        "--optimizer-offload-fraction",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    use_torch_optimizer_for_cpu_offload: bool = opt(
        False,
        "--use-torch-optimizer-for-cpu-offload",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    overlap_cpu_optimizer_d2h_h2d: bool = opt(
        False,
        "--overlap-cpu-optimizer-d2h-h2d",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    pin_cpu_grads: bool = opt(
        True,
        "--no-pin-cpu-grads",
        negated=True,
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    pin_cpu_params: bool = opt(
        True,
        "--no-pin-cpu-params",
        negated=True,
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    lr: float | None = opt(None, "--lr", help="Peak learning rate.")
    min_lr: float = opt(0.0, "--min-lr", help="Smallest learning rate.")
    decoupled_lr: float | None = opt(None, "--decoupled-lr", refused="a decoupled learning rate is not supported yet")
    decoupled_min_lr: float | None = opt(
        None, "--decoupled-min-lr", refused="a decoupled learning rate is not supported yet"
    )
    overlap_param_gather_with_optimizer_step: bool = opt(
        False,
        "--overlap-param-gather-with-optimizer-step",
        holds="updated weights are sent after the whole update; when does not change them",
        effect="speed",
    )
    use_precision_aware_optimizer: bool = opt(
        False,
        "--use-precision-aware-optimizer",
        refused="only Adam and SGD with FP32 state on the training device are supported",
    )
    main_grads_dtype: Literal["fp32", "bf16"] = opt(
        "fp32", "--main-grads-dtype", refused="only Adam and SGD with FP32 state on the training device are supported"
    )
    main_params_dtype: Literal["fp32", "fp16"] = opt(
        "fp32", "--main-params-dtype", refused="only Adam and SGD with FP32 state on the training device are supported"
    )
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = opt(
        "fp32", "--exp-avg-dtype", refused="only Adam and SGD with FP32 state on the training device are supported"
    )
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = opt(
        "fp32", "--exp-avg-sq-dtype", refused="only Adam and SGD with FP32 state on the training device are supported"
    )


@dataclass(kw_only=True)
class SchedulerConfig(Section):
    """Learning rate and weight decay over the run."""

    section_name: ClassVar[str] = "scheduler"

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = opt(
        "linear", "--lr-decay-style", help="Shape of the learning-rate decay."
    )
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = opt(
        "exponential", "--lr-wsd-decay-style", help="Shape of the final WSD decay."
    )
    lr_decay_iters: int | None = opt(
        None, "--lr-decay-iters", help="Iterations until the learning rate reaches its minimum; train_iters when unset."
    )
    lr_decay_samples: int | None = opt(None, "--lr-decay-samples", help="The same in samples.")
    lr_wsd_decay_iters: int | None = opt(None, "--lr-wsd-decay-iters", help="Iterations of the final WSD decay.")
    lr_wsd_decay_samples: int | None = opt(None, "--lr-wsd-decay-samples", help="The same in samples.")
    lr_warmup_fraction: float | None = opt(
        None, "--lr-warmup-fraction", help="Share of the decay iterations spent on warm-up."
    )
    lr_warmup_iters: int = opt(0, "--lr-warmup-iters", help="Warm-up iterations.")
    lr_warmup_samples: int = opt(0, "--lr-warmup-samples", help="Warm-up samples.")
    lr_warmup_init: float = opt(0.0, "--lr-warmup-init", help="Learning rate at the start of warm-up.")
    override_opt_param_scheduler: bool = opt(
        False,
        "--override-opt_param-scheduler",
        "--override-opt-param-scheduler",
        help="Resume with the schedules of this run where those of the checkpoint differ.",
    )
    use_checkpoint_opt_param_scheduler: bool = opt(
        False,
        "--use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
        help="Resume with the schedules of the checkpoint.",
    )
    start_weight_decay: float | None = opt(
        None, "--start-weight-decay", help="First weight decay of an increasing style."
    )
    end_weight_decay: float | None = opt(None, "--end-weight-decay", help="Last weight decay of an increasing style.")
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = opt(
        "constant", "--weight-decay-incr-style", help="How weight decay changes over the run."
    )


_DELAYED_SCALING = "is of delayed FP8 scaling, which is not supported; drop it"


@dataclass(kw_only=True)
class MixedPrecisionConfig(Section):
    """Number formats and loss scaling; FP32 when neither bf16 nor fp16 is set."""

    section_name: ClassVar[str] = "mixed_precision"

    fp16: bool = opt(False, "--fp16", help="Train in FP16 with loss scaling.")
    bf16: bool = opt(False, "--bf16", help="Train in BF16.")
    fp8: Literal["e4m3", "hybrid"] | None = opt(
        None,
        "--fp8-format",
        help="Multiply in float8 in the linears of the layers: hybrid has gradients in e5m2, all else is e4m3.",
    )
    fp8_recipe: Literal["tensorwise", "rowwise", "delayed", "mxfp8", "blockwise", "custom"] = opt(
        "delayed",
        "--fp8-recipe",
        help="How float8 operands are scaled; tensorwise: by the largest element that they have now; rowwise (not "
        "in Megatron-LM): each row by its own, with all operands in e4m3.",
    )
    fp8_margin: int = opt(0, "--fp8-margin", refused=_DELAYED_SCALING)
    fp8_amax_history_len: int = opt(1, "--fp8-amax-history-len", refused=_DELAYED_SCALING)
    fp8_amax_compute_algo: Literal["most_recent", "max"] = opt(
        "most_recent", "--fp8-amax-compute-algo", refused=_DELAYED_SCALING
    )
    fp8_wgrad: bool = opt(True, "--no-fp8-wgrad", "--disable-fp8-wgrad", negated=True, refused=_DELAYED_SCALING)
    first_last_layers_bf16: bool = opt(
        False, "--first-last-layers-bf16", help="Keep the first and last layers out of float8."
    )
    num_layers_at_start_in_bf16: int = opt(
        1, "--num-layers-at-start-in-bf16", help="How many first layers --first-last-layers-bf16 keeps out."
    )
    num_layers_at_end_in_bf16: int = opt(
        1, "--num-layers-at-end-in-bf16", help="How many last layers --first-last-layers-bf16 keeps out."
    )
    fp4: Literal["e2m1"] | None = opt(None, "--fp4-format", refused=NARROW_FORMATS)
    fp4_recipe: Literal["nvfp4", "custom"] = opt(
        "nvfp4",
        "--fp4-recipe",
        refused=NARROW_FORMATS,
    )
    loss_scale: float | None = opt(None, "--loss-scale", help="Static loss scale; dynamic when unset.")
    initial_loss_scale: float = opt(4294967296.0, "--initial-loss-scale", help="First dynamic loss scale.")
    min_loss_scale: float = opt(1.0, "--min-loss-scale", help="Smallest dynamic loss scale.")
    loss_scale_window: float = opt(
        1000.0, "--loss-scale-window", help="Iterations without overflow before the loss scale doubles."
    )
    hysteresis: int = opt(2, "--hysteresis", help="Overflows tolerated before the loss scale halves.")
    reuse_grad_buf_for_mxfp8_param_ag: bool = opt(
        False,
        "--reuse-grad-buf-for-mxfp8-param-ag",
        refused=NARROW_FORMATS,
    )
    fp4_param_gather: bool = opt(
        False,
        "--fp4-param-gather",
        refused=NARROW_FORMATS,
    )
    fp8_param_gather: bool = opt(
        False,
        "--fp8-param-gather",
        help="Gather sharded weights of linears that multiply in float8 in that format, from FP32.",
    )
    te_precision_config_file: str | None = opt(
        None,
        "--te-precision-config-file",
        refused=NARROW_FORMATS,
    )


@dataclass(kw_only=True)
class RNGConfig(InferenceRNG, Section):
    """Seeds."""

    section_name: ClassVar[str] = "rng"

    seed: int = opt(1234, "--seed", help="Seed of weights, dropout and data order.")
    te_rng_tracker: bool = opt(False, "--te-rng-tracker", refused="this way of initialising is not supported")
    data_parallel_random_init: bool = opt(
        False,
        "--data-parallel-random-init",
        holds="data-parallel processes start from the weights of the first, as after Megatron-LM's broadcast",
        effect="speed",
    )


@dataclass(kw_only=True)
class RerunStateMachineConfig(Section):
    """Checks on losses and gradients."""

    section_name: ClassVar[str] = "rerun_state_machine"

    check_for_nan_in_loss: bool = opt(
        True,
        "--no-check-for-nan-in-loss-and-grad",
        negated=True,
        help="Stop with an error when a loss or gradient norm is not finite.",
        effect="log",
    )
    result_rejected_tracker_filename: str | None = opt(
        None, "--result-rejected-tracker-filename", refused="this training option is not supported yet"
    )
    error_injection_rate: int = opt(0, "--error-injection-rate", refused="Lockstep has no rerun state machine")
    error_injection_type: Literal["correct_result", "transient_error", "persistent_error"] = opt(
        "transient_error", "--error-injection-type", refused="Lockstep has no rerun state machine"
    )
    rerun_mode: Literal["disabled", "validate_results", "report_stats"] = opt(
        "validate_results",
        "--rerun-mode",
        only=("validate_results", "disabled"),
        refused="only losses and gradient norms are checked; Lockstep has no rerun state machine",
    )
    check_for_spiky_loss: bool = opt(False, "--check-for-spiky-loss", refused="Lockstep has no rerun state machine")
