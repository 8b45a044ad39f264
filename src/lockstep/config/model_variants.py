"""Aspects of the model section that Megatron-LM and Bridge have and Lockstep does not train with."""

from dataclasses import dataclass
from typing import Literal

from lockstep.config.fields import opt
from lockstep.config.reasons import NARROW_FORMATS
from lockstep.config.section import Section


@dataclass(kw_only=True)
class HybridModels(Section):
    """Layers of several kinds: Mamba, gated delta net, attention."""

    mtp_hybrid_override_pattern: str | None = opt(
        None, "--mtp-hybrid-override-pattern", refused="hybrid models are not supported"
    )
    is_hybrid_model: bool = opt(False, "--is-hybrid-model", refused="hybrid models are not supported")
    mamba_state_dim: int = opt(128, "--mamba-state-dim", refused="hybrid models are not supported")
    mamba_head_dim: int = opt(64, "--mamba-head-dim", refused="hybrid models are not supported")
    mamba_num_groups: int = opt(8, "--mamba-num-groups", refused="hybrid models are not supported")
    mamba_num_heads: int | None = opt(None, "--mamba-num-heads", refused="hybrid models are not supported")
    gdp_num_householder: int = opt(3, "--gdp-num-householder", refused="hybrid models are not supported")
    use_mamba_mem_eff_path: bool = opt(
        True, "--disable-mamba-mem-eff-path", negated=True, refused="hybrid models are not supported", effect="speed"
    )
    gdp_cutedsl_kernel: bool = opt(
        False, "--gdp-cutedsl-kernel", refused="hybrid models are not supported", effect="speed"
    )
    gdp_num_chunk_states_to_recompute: int = opt(
        2, "--gdp-num-chunk-states-to-recompute", refused="hybrid models are not supported", effect="speed"
    )
    mamba_training_ssm_states_dtype: Literal["fp32", "bf16"] | None = opt(
        None, "--mamba-training-ssm-states-dtype", refused="hybrid models are not supported"
    )
    hybrid_layer_pattern: str | None = opt(
        None, "--hybrid-layer-pattern", "--hybrid-override-pattern", refused="hybrid models are not supported"
    )


@dataclass(kw_only=True)
class AttentionVariants(Section):
    """Attention and activation in other forms."""

    glu_linear_offset: float = opt(
        0.0, "--glu-linear-offset", refused="this variant of attention or activation is not supported"
    )
    activation_func_clamp_value: float | None = opt(
        None, "--activation-func-clamp-value", refused="this variant of attention or activation is not supported"
    )
    attention_output_gate: bool = opt(
        False, "--attention-output-gate", refused="this variant of attention or activation is not supported"
    )
    experimental_attention_variant: Literal["gdn", "gdn2", "dsa", "gated_delta_net"] | None = opt(
        None, "--experimental-attention-variant", refused="this variant of attention or activation is not supported"
    )
    dsa_indexer_n_heads: int | None = opt(
        None, "--dsa-indexer-n-heads", refused="this variant of attention or activation is not supported"
    )
    dsa_indexer_head_dim: int | None = opt(
        None, "--dsa-indexer-head-dim", refused="this variant of attention or activation is not supported"
    )
    dsa_indexer_topk: int | None = opt(
        None, "--dsa-indexer-topk", refused="this variant of attention or activation is not supported"
    )
    dsa_indexer_topk_freq: int = opt(
        1, "--dsa-indexer-topk-freq", refused="this variant of attention or activation is not supported"
    )
    dsa_indexer_skip_topk_offset: int = opt(
        0, "--dsa-indexer-skip-topk-offset", refused="this variant of attention or activation is not supported"
    )
    dsa_indexer_loss_coeff: float | None = opt(
        None, "--dsa-indexer-loss-coeff", refused="this variant of attention or activation is not supported"
    )
    dsa_indexer_use_sparse_loss: bool = opt(
        False, "--dsa-indexer-use-sparse-loss", refused="this variant of attention or activation is not supported"
    )
    dsa_kernel_backend: Literal["none", "tilelang", "cudnn"] = opt(
        "none",
        "--dsa-kernel-backend",
        refused="this variant of attention or activation is not supported",
        effect="speed",
    )
    dsa_indexer_rope_interleaved: bool = opt(
        False, "--dsa-indexer-rope-interleaved", refused="this variant of attention or activation is not supported"
    )
    dsa_indexer_rotate_activation: bool = opt(
        True,
        "--no-dsa-indexer-rotate-activation",
        "--disable-dsa-indexer-rotate-activation",
        negated=True,
        refused="this variant of attention or activation is not supported",
    )
    dsa_indexer_scoring_relu: bool = opt(
        True,
        "--no-dsa-indexer-scoring-relu",
        "--disable-dsa-indexer-scoring-relu",
        negated=True,
        refused="this variant of attention or activation is not supported",
    )
    dsa_indexer_k_norm_epsilon: float | None = opt(
        None, "--dsa-indexer-k-norm-epsilon", refused="this variant of attention or activation is not supported"
    )
    dsa_indexer_k_norm_fp32: bool = opt(
        False, "--dsa-indexer-k-norm-fp32", refused="this variant of attention or activation is not supported"
    )
    linear_conv_kernel_dim: int = opt(
        4, "--linear-conv-kernel-dim", refused="this variant of attention or activation is not supported"
    )
    linear_key_head_dim: int = opt(
        128, "--linear-key-head-dim", refused="this variant of attention or activation is not supported"
    )
    linear_value_head_dim: int = opt(
        128, "--linear-value-head-dim", refused="this variant of attention or activation is not supported"
    )
    linear_num_key_heads: int = opt(
        16, "--linear-num-key-heads", refused="this variant of attention or activation is not supported"
    )
    linear_num_value_heads: int = opt(
        32, "--linear-num-value-heads", refused="this variant of attention or activation is not supported"
    )
    use_kitchen_attention: bool = opt(
        False,
        "--use-kitchen-attention",
        refused="this variant of attention or activation is not supported",
        effect="speed",
    )
    kitchen_attention_backend: Literal["sdpa", "fa"] = opt(
        "sdpa",
        "--kitchen-attention-backend",
        refused="this variant of attention or activation is not supported",
        effect="speed",
    )
    mrope_section: list[int] | None = opt(
        None, "--mrope-section", refused="this variant of attention or activation is not supported"
    )
    logit_dtype: Literal["bf16", "fp32"] | None = opt(
        None, "--output-logit-dtype", refused="this variant of attention or activation is not supported"
    )
    cache_mla_latents: bool = opt(
        False, "--cache-mla-latents", refused="this variant of attention or activation is not supported"
    )
    linear_attention_freq: int | str | None = opt(
        None, "--linear-attention-freq", refused="this variant of attention or activation is not supported"
    )


@dataclass(kw_only=True)
class HyperConnections(Section):
    """Several residual streams."""

    enable_mhc_connections: bool = opt(False, "--enable-mhc-connections", refused="hyper-connections are not supported")
    mhc_num_residual_streams: int = opt(4, "--mhc-num-residual-streams", refused="hyper-connections are not supported")
    mhc_sinkhorn_iterations: int = opt(20, "--mhc-sinkhorn-iterations", refused="hyper-connections are not supported")
    mhc_init_gating_factor: float = opt(0.01, "--mhc-init-gating-factor", refused="hyper-connections are not supported")
    mhc_recompute_layer_num: int | None = opt(
        None, "--mhc-recompute-layer-num", refused="hyper-connections are not supported", effect="speed"
    )


@dataclass(kw_only=True)
class MaximalUpdate(Section):
    """Maximal-update parametrisation."""

    use_mup: bool = opt(False, "--use-mup", refused="maximal-update parametrisation is not supported")
    mup_width_mult: float = opt(1.0, "--mup-width-mult", refused="maximal-update parametrisation is not supported")
    mup_base_hidden_size: int | None = opt(
        None, "--mup-base-hidden-size", refused="maximal-update parametrisation is not supported"
    )
    mup_embedding_mult: float = opt(
        1.0, "--mup-embedding-mult", refused="maximal-update parametrisation is not supported"
    )
    mup_output_mult: float = opt(1.0, "--mup-output-mult", refused="maximal-update parametrisation is not supported")
    mup_base_head_dim: float | None = opt(
        None, "--mup-base-head-dim", refused="maximal-update parametrisation is not supported"
    )
    mup_attn_scale_power: float = opt(
        1.0, "--mup-attn-scale-power", refused="maximal-update parametrisation is not supported"
    )


@dataclass(kw_only=True)
class ExpertKernels(Section):
    """How experts are executed."""

    overlap_dispatch_backward_with_experts_wgrad: bool = opt(
        False,
        "--overlap-dispatch-backward-with-experts-wgrad",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    ep_overlap_early_attn_memory_release: bool = opt(
        False,
        "--ep-overlap-early-attn-memory-release",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_shared_expert_glu_interleave_size: int | None = opt(
        None,
        "--moe-shared-expert-glu-interleave-size",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_enable_routing_replay: bool = opt(
        False, "--moe-enable-routing-replay", refused="this option of mixture-of-experts models is not supported"
    )
    moe_use_grouped_tensor: bool = opt(
        False,
        "--moe-use-grouped-tensor",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_single_grouped_weight: bool = opt(
        False,
        "--moe-single-grouped-weight",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_single_grouped_bias: bool = opt(
        False,
        "--moe-single-grouped-bias",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_hybridep_pad_uneven_dispatch_inputs: bool = opt(
        False,
        "--moe-hybridep-pad-uneven-dispatch-inputs",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_pad_experts_for_cuda_graph_inference: bool = opt(
        False,
        "--moe-pad-experts-for-cuda-graph-inference",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_latent_size: int | None = opt(
        None, "--moe-latent-size", refused="this option of mixture-of-experts models is not supported"
    )
    moe_flex_dispatcher_num_sms: int | None = opt(
        None,
        "--moe-flex-dispatcher-num-sms",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_deepep_num_sms: int | None = opt(
        None,
        "--moe-deepep-num-sms",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_hybridep_num_sms: int | None = opt(
        None,
        "--moe-hybridep-num-sms",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_hybridep_num_blocks_permute: int | None = opt(
        None,
        "--moe-hybridep-num-blocks-permute",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_hybridep_num_blocks_unpermute: int | None = opt(
        None,
        "--moe-hybridep-num-blocks-unpermute",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_hybridep_num_sms_preprocessing: int = opt(
        108,
        "--moe-hybridep-num-sms-preprocessing",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_ncclep_zero_copy: bool = opt(
        False,
        "--moe-ncclep-zero-copy",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_dispatch_fwd_dtype: Literal["bf16", "mxfp8"] = opt(
        "bf16", "--moe-dispatch-fwd-dtype", refused="this option of mixture-of-experts models is not supported"
    )
    moe_combine_bwd_dtype: Literal["bf16", "mxfp8"] = opt(
        "bf16", "--moe-combine-bwd-dtype", refused="this option of mixture-of-experts models is not supported"
    )
    moe_mlp_glu_interleave_size: int | None = opt(
        None,
        "--moe-mlp-glu-interleave-size",
        refused="this option of mixture-of-experts models is not supported",
        effect="speed",
    )
    moe_expert_rank_capacity_factor: float | None = opt(
        None, "--moe-expert-rank-capacity-factor", refused="this option of mixture-of-experts models is not supported"
    )


@dataclass(kw_only=True)
class ActivationOffloading(Section):
    """Activations kept elsewhere than in device memory."""

    fine_grained_activation_offloading: bool = opt(
        False, "--fine-grained-activation-offloading", refused="activation offloading is not supported", effect="speed"
    )
    offload_modules: list[str] = opt(
        [], "--offload-modules", refused="activation offloading is not supported", effect="speed"
    )
    min_offloaded_tensor_size: int = opt(
        1048576, "--min-offloaded-tensor-size", refused="activation offloading is not supported", effect="speed"
    )
    delay_offload_until_cuda_graph: bool = opt(
        False, "--delay-offload-until-cuda-graph", refused="activation offloading is not supported", effect="speed"
    )
    delta_offload_bytes_across_pp_ranks: int = opt(
        0, "--delta-offload-bytes-across-pp-ranks", refused="activation offloading is not supported", effect="speed"
    )
    activation_offload_fraction: float = opt(
        1.0, "--activation-offload-fraction", refused="activation offloading is not supported", effect="speed"
    )
    moe_paged_stash: bool = opt(
        False, "--moe-paged-stash", refused="activation offloading is not supported", effect="speed"
    )
    moe_paged_stash_page_size: int = opt(
        64, "--moe-paged-stash-page-size", refused="activation offloading is not supported", effect="speed"
    )
    moe_paged_stash_buffer_size_factor_cuda: float = opt(
        1.1,
        "--moe-paged-stash-buffer-size-factor-cuda",
        refused="activation offloading is not supported",
        effect="speed",
    )
    moe_paged_stash_buffer_size_factor_cpu: float = opt(
        0.0,
        "--moe-paged-stash-buffer-size-factor-cpu",
        refused="activation offloading is not supported",
        effect="speed",
    )
    fine_grained_offloading_max_inflight_offloads: int | None = opt(
        None,
        "--fine-grained-offloading-max-inflight-offloads",
        refused="activation offloading is not supported",
        effect="speed",
    )


@dataclass(kw_only=True)
class InferenceOptions(Section):
    """What only inference reads."""

    inference_cuda_graph_scope: Literal["none", "layer", "block"] | None = opt(
        None, "--inference-cuda-graph-scope", holds="read by inference only, which is not part of a run", effect="speed"
    )
    flash_decode: bool = opt(
        False, "--flash-decode", holds="read by inference only, which is not part of a run", effect="speed"
    )
    symmetric_ar_type: Literal["two_shot", "one_shot", "multimem_all_reduce"] | None = opt(
        None, "--symmetric-ar-type", holds="read by inference only, which is not part of a run", effect="speed"
    )
    nccl_all_reduce_for_prefill: bool = opt(
        False,
        "--nccl-all-reduce-for-prefill",
        holds="read by inference only, which is not part of a run",
        effect="speed",
    )
    inference_fuse_tp_communication: bool = opt(
        False,
        "--inference-fuse-tp-communication",
        holds="read by inference only, which is not part of a run",
        effect="speed",
    )
    inference_disable_triton_nvls_kernels: bool = opt(
        False,
        "--inference-disable-triton-nvls-kernels",
        holds="read by inference only, which is not part of a run",
        effect="speed",
    )
    inference_grouped_gemm_backend: Literal["flashinfer", "torch", "vllm"] = opt(
        "vllm",
        "--inference-grouped-gemm-backend",
        holds="read by inference only, which is not part of a run",
        effect="speed",
    )
    inference_moe_disable_fused_quant_kernels: bool = opt(
        False,
        "--inference-moe-disable-fused-quant-kernels",
        holds="read by inference only, which is not part of a run",
        effect="speed",
    )
    inference_moe_token_dispatcher_type: Literal["nccl", "nvls"] = opt(
        "nvls",
        "--inference-moe-token-dispatcher-type",
        holds="read by inference only, which is not part of a run",
        effect="speed",
    )
    mlp_chunks_for_prefill: int = opt(
        1, "--mlp-chunks-for-prefill", holds="read by inference only, which is not part of a run", effect="speed"
    )


@dataclass(kw_only=True)
class OtherExecution(Section):
    """Other ways to execute a model."""

    tensor_parallel_num_weight_shards: int | None = opt(
        None,
        "--tensor-parallel-num-weight-shards",
        refused="this way of executing the model is not supported",
        effect="speed",
    )
    max_seqlen_per_dp_cp_rank: int | None = opt(
        None, "--max-seqlen-per-dp-cp-rank", refused="this way of executing the model is not supported", effect="speed"
    )
    hybrid_context_parallel: bool = opt(
        False, "--hybrid-context-parallel", refused="this way of executing the model is not supported", effect="speed"
    )
    expert_tensor_parallel_num_weight_shards: int | None = opt(
        None,
        "--expert-tensor-parallel-num-weight-shards",
        refused="this way of executing the model is not supported",
        effect="speed",
    )
    use_fused_weighted_squared_relu: bool = opt(
        False,
        "--use-fused-weighted-squared-relu",
        holds="chooses a kernel, not the result; Lockstep picks its own",
        effect="speed",
    )
    fused_residual_rmsnorm: bool = opt(
        False,
        "--fused-residual-rmsnorm",
        holds="chooses a kernel, not the result; Lockstep picks its own",
        effect="speed",
    )
    fp8_quantizer_factory: str | None = opt(
        None,
        "--fp8-quantizer-factory",
        refused=NARROW_FORMATS,
    )
    fp4_quantizer_factory: str | None = opt(
        None,
        "--fp4-quantizer-factory",
        refused=NARROW_FORMATS,
    )
    gtp_remat_opt_in_modules: list[str] = opt(
        [], "--gtp-remat-opt-in-modules", refused="this way of executing the model is not supported", effect="speed"
    )
    config_logger_dir: str = opt("", "--config-logger-dir", refused="this log is not supported", effect="log")
    batch_invariant_mode: bool = opt(
        False, "--batch-invariant-mode", refused="this way of executing the model is not supported"
    )
    batch_invariant_backend: Literal["te_native", "deepgemm", "triton"] = opt(
        "te_native", "--batch-invariant-backend", refused="this way of executing the model is not supported"
    )
    use_te_activation_func: bool = opt(
        False,
        "--use-te-activation-func",
        holds="chooses a kernel, not the result; Lockstep picks its own",
        effect="speed",
    )
    mlp_chunks_for_training: int = opt(
        1, "--mlp-chunks-for-training", refused="this way of executing the model is not supported", effect="speed"
    )
