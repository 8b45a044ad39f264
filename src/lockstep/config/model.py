"""The model section: architecture, initialisation and kernels; the other aspects are mixed in."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lockstep.config.fields import opt
from lockstep.config.model_moe import MixtureOfExperts, MultiLatentAttention, MultiTokenPrediction
from lockstep.config.model_parallel import ModelExecution, ModelParallel
from lockstep.config.model_variants import (
    ActivationOffloading,
    AttentionVariants,
    ExpertKernels,
    HybridModels,
    HyperConnections,
    InferenceOptions,
    MaximalUpdate,
    OtherExecution,
)
from lockstep.config.section import Section


@dataclass(kw_only=True)
class Architecture(Section):
    """What the model computes and how it starts."""

    perform_initialization: bool = opt(
        True, "--no-initialization", negated=True, refused="this way of initialising is not supported"
    )
    use_cpu_initialization: bool = opt(
        False,
        "--use-cpu-initialization",
        help="Draw initial weights from PyTorch's CPU generator instead of the GPU's.",
    )
    deterministic_mode: bool = opt(
        False, "--deterministic-mode", help="Refuse any operation without a deterministic implementation."
    )
    cross_entropy_loss_fusion: bool = opt(
        False,
        "--cross-entropy-loss-fusion",
        holds="chooses a kernel, not the result; Lockstep picks its own",
        effect="speed",
    )
    cross_entropy_fusion_impl: Literal["native", "te"] = opt(
        "native",
        "--cross-entropy-fusion-impl",
        holds="chooses a kernel, not the result; Lockstep picks its own",
        effect="speed",
    )
    num_layers: int | None = opt(None, "--num-layers", help="Number of transformer layers.")
    hidden_size: int | None = opt(None, "--hidden-size", help="Width of the residual stream.")
    num_attention_heads: int | None = opt(None, "--num-attention-heads", help="Number of query heads.")
    attention_backend: Literal["flash", "fused", "unfused", "local", "auto"] = opt(
        "auto",
        "--attention-backend",
        help="What computes attention: fused is cuDNN's kernel, flash one of FlashAttention, unfused and local are "
        "explicit scores. auto takes explicit scores on a CPU, and on a GPU the fastest kernel that can do what is "
        "asked.",
    )
    flash_attention_version: Literal[2, 3, 4] | None = opt(
        None,
        "--flash-attention-version",
        help="Which FlashAttention auto and flash may take: 2 is PyTorch's, 4 is the package flash-attn-4. Null is "
        "either. There is no 3.",
    )
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = opt(
        "vanilla", "--softmax-type", refused="this model option is not supported yet"
    )
    num_query_groups: int | None = opt(
        None, "--num-query-groups", help="Number of key/value heads; the number of query heads when unset."
    )
    ffn_hidden_size: int | None = opt(
        None,
        "--ffn-hidden-size",
        help="Inner width of the MLP; 4 * hidden_size when unset, with a gated MLP int(8/3 * hidden_size / 64) * 64.",
    )
    kv_channels: int | None = opt(
        None,
        "--kv-channels",
        help="Width of one attention head, hidden_size // num_attention_heads when unset; those of multi-latent "
        "attention have widths of their own.",
    )
    hidden_dropout: float = opt(
        0.1,
        "--hidden-dropout",
        help="Dropout probability on embeddings and on what attention and MLP add to the residual stream.",
    )
    attention_dropout: float = opt(0.1, "--attention-dropout", help="Dropout probability on attention probabilities.")
    fp32_residual_connection: bool = opt(
        False, "--fp32-residual-connection", refused="this precision option is not supported yet"
    )
    apply_residual_connection_post_layernorm: bool = opt(
        False,
        "--apply-residual-connection-post-layernorm",
        help="Add the norm output, not its input, to the residual stream.",
    )
    layernorm_epsilon: float = opt(1e-05, "--norm-epsilon", "--layernorm-epsilon", help="Epsilon of every norm.")
    layernorm_zero_centered_gamma: bool = opt(False, "--apply-layernorm-1p", help="Store norm weights minus one.")
    add_bias_linear: bool = opt(True, "--disable-bias-linear", negated=True, help="Biases in linear layers.")
    add_qkv_bias: bool = opt(
        False, "--add-qkv-bias", help="Bias in the query/key/value projection; on whenever linear biases are on."
    )
    rotary_interleaved: bool = opt(
        False, "--rotary-interleaved", help="Rotate even and odd channels against each other instead of halves."
    )
    gated_linear_unit: bool = opt(False, help="Gate the MLP: activation of one half times the other half.")
    activation_func: Literal["gelu", "silu", "squared_relu", "quick_gelu", "openai_gelu"] = opt(
        "gelu", help="Activation of the MLP."
    )
    normalization: Literal["LayerNorm", "RMSNorm"] = opt("LayerNorm", "--normalization", help="Kind of norm.")
    qk_layernorm: bool = opt(False, "--qk-layernorm", help="Normalise queries and keys per head.")
    qk_l2_norm: bool = opt(False, "--qk-l2-norm", refused="this model option is not supported yet")
    qk_clip: bool = opt(False, "--qk-clip", refused="this model option is not supported yet")
    qk_clip_alpha: float = opt(0.5, "--qk-clip-alpha", refused="this model option is not supported yet")
    qk_clip_threshold: float = opt(100.0, "--qk-clip-threshold", refused="this model option is not supported yet")
    calculate_per_token_loss: bool = opt(
        False,
        "--calculate-per-token-loss",
        help="Divide gradients by the valid tokens of the global batch instead of averaging micro-batch means.",
    )
    init_method_std: float = opt(0.02, "--init-method-std", help="Standard deviation of the initial weights.")
    embedding_init_method_std: float | None = opt(
        None,
        "--embedding-init-method-std",
        help="Standard deviation of the initial embeddings; init_method_std when unset.",
    )
    init_model_with_meta_device: bool = opt(
        False, "--init-model-with-meta-device", refused="this way of initialising is not supported"
    )
    apply_query_key_layer_scaling: bool = opt(
        False,
        "--apply-query-key-layer-scaling",
        help="Round scores when divided by the layer's number (from 1), for the range of FP16; FP32 softmax.",
    )
    disable_bf16_reduced_precision_matmul: bool = opt(
        False, "--disable-bf16-reduced-precision-matmul", help="Reduce BF16 matrix products in FP32 on GPUs."
    )
    use_transformer_engine_op_fuser: bool = opt(
        False, "--use-transformer-engine-op-fuser", refused="this model option is not supported yet"
    )
    use_grouped_gemm_for_dense_mlp: bool = opt(
        False, "--use-grouped-gemm-for-dense-mlp", refused="this model option is not supported yet"
    )
    clone_scatter_output_in_embedding: bool = opt(
        True,
        "--no-clone-scatter-output-in-embedding",
        "--disable-clone-scatter-output-in-embedding",
        negated=True,
        holds="the embedding hands on a tensor of its own part of the sequence",
        effect="speed",
    )
    transformer_impl: Literal["local", "transformer_engine", "inference_optimized"] = opt(
        "transformer_engine",
        "--transformer-impl",
        holds="chooses a kernel, not the result; Lockstep picks its own",
        effect="speed",
    )
    window_size: list[int] | None = opt(None, "--window-size", refused="this model option is not supported yet")
    window_attn_skip_freq: int | str | None = opt(
        None, "--window-attn-skip-freq", refused="this model option is not supported yet"
    )
    max_position_embeddings: int | None = opt(
        None, "--max-position-embeddings", help="Rows of the learned position embedding; seq_length when unset."
    )
    position_embedding_type: Literal["learned_absolute", "rope", "yarn", "mrope", "relative", "none"] = opt(
        "learned_absolute", "--position-embedding-type", help="Kind of position embedding."
    )
    yarn_original_max_position_embeddings: int | None = opt(
        None, "--yarn-original-max-position-embeddings", refused="this model option is not supported yet"
    )
    yarn_beta_fast: float | None = opt(None, "--yarn-beta-fast", refused="this model option is not supported yet")
    yarn_beta_slow: float | None = opt(None, "--yarn-beta-slow", refused="this model option is not supported yet")
    yarn_correction_range_round_to_int: bool = opt(
        False, "--yarn-correction-range-round-to-int", refused="this model option is not supported yet"
    )
    rotary_base: int = opt(10000, "--rotary-base", help="Base of the rotary frequencies.")
    rotary_percent: float = opt(1.0, "--rotary-percent", help="Share of head channels that is rotated.")
    seq_len_interpolation_factor: int | None = opt(
        None, "--rotary-seq-len-interpolation-factor", help="Divide positions by this factor."
    )
    rope_scaling: bool = opt(False, "--use-rope-scaling", help="Scale rotary frequencies as Llama 3.1 does.")
    rope_scaling_factor: float = opt(8.0, "--rope-scaling-factor", help="Factor of rope scaling.")
    no_rope_freq: int | str | None = opt(None, "--no-rope-freq", refused="this model option is not supported yet")
    add_position_embedding: bool = opt(
        True,
        "--no-position-embedding",
        negated=True,
        help="A learned position embedding may be used; False demands rotary positions or none.",
    )
    make_vocab_size_divisible_by: int = opt(
        128, "--make-vocab-size-divisible-by", help="Pad the vocabulary to a multiple of this."
    )
    share_embeddings_and_output_weights: bool = opt(
        True, "--untie-embeddings-and-output-weights", negated=True, help="Use the word embedding as output layer."
    )
    masked_softmax_fusion: bool = opt(
        True,
        "--no-masked-softmax-fusion",
        negated=True,
        holds="chooses a kernel, not the result; Lockstep picks its own",
        effect="speed",
    )
    bias_activation_fusion: bool = opt(
        True,
        "--no-bias-gelu-fusion",
        negated=True,
        help="With gelu and linear biases: use the tanh approximation, as the fused kernel does; erf otherwise.",
    )
    bias_dropout_fusion: bool = opt(
        True,
        "--no-bias-dropout-fusion",
        negated=True,
        holds="chooses a kernel, not the result; Lockstep picks its own",
        effect="speed",
    )
    apply_rope_fusion: bool = opt(
        True,
        "--no-rope-fusion",
        negated=True,
        holds="chooses a kernel, not the result; Lockstep picks its own",
        effect="speed",
    )
    rope_type: Literal["rope", "yarn"] | None = opt(
        None, "--rope-type", help="Rotary positions of multi-latent attention; yarn when unset."
    )
    persist_layer_norm: bool = opt(
        True,
        "--no-persist-layer-norm",
        negated=True,
        holds="chooses a kernel, not the result; Lockstep picks its own",
        effect="speed",
    )
    gradient_accumulation_fusion: bool = opt(
        True,
        "--no-gradient-accumulation-fusion",
        negated=True,
        holds="weight gradients are accumulated in the main gradients as the unfused path does",
        effect="speed",
    )
    use_mcore_models: bool = opt(
        False, "--use-mcore-models", holds="Lockstep has one model implementation", effect="speed"
    )
    init_method_xavier_uniform: bool = opt(
        False, "--init-method-xavier-uniform", refused="this way of initialising is not supported"
    )
    attention_softmax_in_fp32: bool = opt(
        False, "--attention-softmax-in-fp32", help="Compute the attention softmax on FP32 scores."
    )
    fp16_lm_cross_entropy: bool = opt(
        False, "--fp16-lm-cross-entropy", refused="this precision option is not supported yet"
    )
    seq_length: int | None = opt(None, "--seq-length", help="Tokens a sample has.")
    vocab_size: int | None = opt(
        None, "--padded-vocab-size", help="Rows of the word embedding; the padded tokenizer vocabulary when unset."
    )
    barrier_with_L1_time: bool = opt(  # noqa: N815  (Bridge's spelling)
        True,
        "--no-barrier-with-level-1-timing",
        negated=True,
        holds="timers do not synchronise the processes",
        effect="log",
    )


@dataclass(kw_only=True)
class ModelConfig(
    InferenceOptions,
    OtherExecution,
    ActivationOffloading,
    ExpertKernels,
    MaximalUpdate,
    HyperConnections,
    AttentionVariants,
    HybridModels,
    MultiTokenPrediction,
    MultiLatentAttention,
    MixtureOfExperts,
    ModelExecution,
    ModelParallel,
    Architecture,
):
    """The model: what is computed, and how it is spread and executed. The fields of the last base come first."""

    section_name: ClassVar[str] = "model"
