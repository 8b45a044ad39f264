"""Aspects of other sections that Megatron-LM and Bridge have and Lockstep does not use."""

from dataclasses import dataclass
from typing import Literal

from lockstep.config.fields import opt
from lockstep.config.section import Section


@dataclass(kw_only=True)
class GpuChecks(Section):
    """Checks of the GPUs."""

    gpu_sniff_test_interval: int | None = opt(
        None, "--gpu-sniff-test-interval", refused="this check of the GPUs is not supported", effect="speed"
    )


@dataclass(kw_only=True)
class TensorDumps(Section):
    """Tensors written beside checkpoints."""

    save_params_interval: int | None = opt(
        None, "--save-params-interval", refused="this dump is not supported", effect="log"
    )
    save_activations_interval: int | None = opt(
        None, "--save-activations-interval", refused="this dump is not supported", effect="log"
    )
    save_tokens_per_expert_interval: int | None = opt(
        None, "--save-tokens-per-expert-interval", refused="this dump is not supported", effect="log"
    )
    save_wgrads_interval: int | None = opt(
        None, "--save-wgrads-interval", refused="this dump is not supported", effect="log"
    )
    save_dgrads_interval: int | None = opt(
        None, "--save-dgrads-interval", refused="this dump is not supported", effect="log"
    )


@dataclass(kw_only=True)
class RoutingTraces(Section):
    """Traces of the routing of experts."""

    moe_routing_trace_path: str | None = opt(
        None, "--moe-routing-trace-path", refused="routing traces are not supported", effect="log"
    )
    moe_routing_trace_max_training_iters: int | None = opt(
        None, "--moe-routing-trace-max-training-iters", refused="routing traces are not supported", effect="log"
    )
    moe_routing_trace_capture_logits: bool = opt(
        False, "--moe-routing-trace-capture-logits", refused="routing traces are not supported", effect="log"
    )
    moe_routing_trace_capture_hidden_states: bool = opt(
        False, "--moe-routing-trace-capture-hidden-states", refused="routing traces are not supported", effect="log"
    )
    moe_routing_trace_dump_weights: bool = opt(
        False, "--moe-routing-trace-dump-weights", refused="routing traces are not supported", effect="log"
    )


@dataclass(kw_only=True)
class MegatronFSDP(Section):
    """Details of Megatron-FSDP."""

    megatron_fsdp_version: Literal[1, 2] = opt(
        1, "--megatron-fsdp-version", refused="Megatron-FSDP is not supported", effect="speed"
    )
    fsdp_manual_registration: bool = opt(
        False, "--fsdp-manual-registration", refused="Megatron-FSDP is not supported", effect="speed"
    )
    fsdp_double_buffer: bool = opt(
        False, "--fsdp-double-buffer", refused="Megatron-FSDP is not supported", effect="speed"
    )
    megatron_fsdp_main_params_dtype: Literal["fp32", "bf16", "fp16", "auto"] = opt(
        "fp32", "--megatron-fsdp-main-params-dtype", refused="Megatron-FSDP is not supported"
    )
    megatron_fsdp_main_grads_dtype: Literal["fp32", "bf16", "fp16", "auto"] = opt(
        "auto", "--megatron-fsdp-main-grads-dtype", refused="Megatron-FSDP is not supported"
    )
    megatron_fsdp_grad_comm_dtype: Literal["fp32", "fp16", "bf16", "auto"] = opt(
        "auto", "--megatron-fsdp-grad-comm-dtype", refused="Megatron-FSDP is not supported"
    )
    megatron_fsdp_enable_fine_grained_param_gather: bool = opt(
        False,
        "--megatron-fsdp-enable-fine-grained-param-gather",
        refused="Megatron-FSDP is not supported",
        effect="speed",
    )
    megatron_fsdp_max_pool_double_buffer: bool = opt(
        False, "--megatron-fsdp-max-pool-double-buffer", refused="Megatron-FSDP is not supported", effect="speed"
    )
    fsdp_db_use_persist_buf_on_alloc_fail: bool = opt(
        False, "--fsdp-db-use-persist-buf-on-alloc-fail", refused="Megatron-FSDP is not supported", effect="speed"
    )


@dataclass(kw_only=True)
class Communicators(Section):
    """Settings of the communicators."""

    nccl_communicator_config_path: str | None = opt(
        None,
        "--nccl-communicator-config-path",
        refused="a file of communicator settings is not supported",
        effect="speed",
    )


@dataclass(kw_only=True)
class ObjectStores(Section):
    """Data in object stores."""

    object_storage_cache_path: str | None = opt(
        None, "--object-storage-cache-path", refused="object stores are not supported", effect="path"
    )


@dataclass(kw_only=True)
class TokenizerBackends(Section):
    """Other tokenizer backends."""

    use_gigatoken: bool = opt(False, "--use-gigatoken", refused="the tokenizers library is used")


@dataclass(kw_only=True)
class InferenceRNG(Section):
    """Random numbers of inference."""

    inference_rng_tracker: bool = opt(
        False, "--inference-rng-tracker", holds="read by inference only, which is not part of a run", effect="speed"
    )
