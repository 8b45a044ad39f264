"""Flags of Megatron-LM that have no place in the tree, by what they belong to.

Read from Megatron-LM d98e8a64 (2026-08-22): the parser of ``pretrain_gpt.py`` and ``pretrain_hybrid.py`` with the
options of Model Optimizer, ``megatron/elastification/arguments.py``, ``pretrain_vlm.py``, and the multimodal, MIMO and
inference examples.
A flag is spelled ``--name`` (a switch), ``--name:1`` or ``--name:*`` (one value, several), with ``=default`` where
Megatron-LM has one, and ``/`` between two spellings.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Flags that belong together: what becomes of one that asks for something, and why."""

    name: str
    verdict: Literal["waived", "blocking"]
    reason: str
    flags: str


@dataclass(frozen=True)
class Elsewhere:
    """A flag outside the tree: how many values it takes (``0``, ``1``, ``*``) and Megatron-LM's default."""

    flag: str
    arity: str
    default: str | None
    family: Family


@cache
def elsewhere() -> dict[str, Elsewhere]:
    """Return every flag outside the tree by each of its spellings."""
    table = {}
    for family in FAMILIES:
        for entry in family.flags.split():
            spelled, _, default = entry.partition("=")
            spelled, _, arity = spelled.partition(":")
            for flag in spelled.split("/"):
                table[flag] = Elsewhere(flag, arity or "0", default or None, family)
    return table


FAMILIES: tuple[Family, ...] = (
    Family(
        "Model Optimizer's model",
        "waived",
        "how Model Optimizer builds and stores the same model",
        "--export-model-type:1=GPTModel --export-te-mcore-model --export-default-te-spec",
    ),
    Family("layer specification", "blocking", "builds the model from code that it names", "--spec:*"),
    Family(
        "inference",
        "waived",
        "read by inference only; training does not read it",
        """
        --inference-batch-times-seqlen-threshold:1=-1 --max-tokens-to-oom:1=12000 --use-legacy-static-engine
        --inference-max-requests:1=8 --inference-max-seq-length:1=2560 --inference-dynamic-batching
        --inference-dynamic-batching-buffer-size-gb:1=40.0 --inference-dynamic-batching-paused-buffer-size-gb:1
        --inference-dynamic-batching-mamba-memory-ratio:1 --inference-dynamic-batching-block-size:1=256
        --inference-dynamic-batching-max-requests:1 --inference-dynamic-batching-max-tokens:1
        --inference-dynamic-batching-num-cuda-graphs:1=16 --inference-dynamic-batching-track-paused-request-events
        --inference-dynamic-batching-track-generated-token-events --decode-only-cuda-graphs
        --inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens:1=512
        --inference-dynamic-batching-unified-memory-level:1=0 --enable-chunked-prefill --num-speculative-tokens:1=0
        --inference-dynamic-batching-prefix-caching/--no-inference-dynamic-batching-prefix-caching
        --inference-dynamic-batching-prefix-caching-eviction-policy:1=ref_zero
        --inference-dynamic-batching-prefix-caching-coordinator-policy:1=load_balanced
        --inference-dynamic-batching-prefix-caching-routing-alpha:1=0.5
        --inference-dynamic-batching-prefix-caching-mamba-gb:1
        --inference-dynamic-batching-cuda-graph-mixed-prefill-count:1=16
        --inference-dynamic-batching-cuda-graph-sizing-distribution:1=exponential
        --inference-dynamic-batching-sampling-backend:1=torch --use-same-sampling-seed-across-dp-ranks
        --inference-dynamic-batching-async-sched-mode:1=legacy
        --inference-dynamic-batching-logprobs-mode:1=raw_logprobs --inference-logging-step-interval:1=0
        --inference-text-gen-server-logging/--no-inference-text-gen-server-logging
        --inference-wandb-logging/--no-inference-wandb-logging --inference-coordinator-port:1
        --mamba-inference-conv-states-dtype:1=bf16 --mamba-inference-ssm-states-dtype:1=bf16
        --inference-use-synchronous-zmq-collectives/--no-inference-use-synchronous-zmq-collectives
        --inference-disable-ep-consensus/--no-inference-disable-ep-consensus --inference-shards:1
        """,
    ),
    Family(
        "BERT",
        "waived",
        "read by BERT models and exports only; a GPT run does not read it",
        """
        --onnx-safe:1 --bert-no-binary-head --sample-rate:1=1.0 --mask-prob:1=0.15 --short-seq-prob:1=0.1
        --output-bert-embeddings --bert-embedder-type:1=megatron
        """,
    ),
    Family(
        "parameter map",
        "waived",
        "writes a listing; changes nothing in the run",
        """
        --dump-param-to-param-group-map:1
        """,
    ),
    Family(
        "ADLR autoresume",
        "waived",
        "how the cluster restarts a job",
        """
        --adlr-autoresume --adlr-autoresume-interval:1=1000
        """,
    ),
    Family(
        "OpenTelemetry",
        "waived",
        "telemetry",
        """
        --otel-enabled --otel-service-name:1 --otel-span-groups:1
        """,
    ),
    Family(
        "one-logger",
        "waived",
        "telemetry of NVIDIA",
        """
        --no-one-logger --one-logger-project:1=megatron-lm --one-logger-run-name:1 --one-logger-async
        --app-tag-run-name:1 --app-tag-run-version:1=0.0.0
        """,
    ),
    Family(
        "object stores",
        "waived",
        "how paths in object stores are opened",
        """
        --enable-msc
        """,
    ),
    Family(
        "workload inspector",
        "waived",
        "a server to inspect the running job",
        """
        --run-workload-inspector-server
        """,
    ),
    Family(
        "communication buffers",
        "waived",
        "where communication buffers lie; speed only",
        """
        --gtp-remat-nccl-ub --gtp-expert-remat-nccl-ub
        """,
    ),
    Family(
        "saved logits",
        "waived",
        "writes logits beside the run; changes nothing in it",
        """
        --logits-save-top-k:1 --logits-save-top-p:1 --logits-save-top-p-min-k:1=1 --logits-save-dir:1
        --logits-save-dtype:1=fp16
        """,
    ),
    Family(
        "distillation from saved logits",
        "blocking",
        "adds a distillation loss",
        """
        --logits-load-dir:1 --logits-load-decode-threads:1=4 --logits-load-prefetch-factor:1=3
        --logits-load-msc-prefetch-depth:1=2 --logits-load-kd-loss-alpha:1=1.0 --logits-load-ignore-errors
        """,
    ),
    Family(
        "T5",
        "blocking",
        "belongs to encoder-decoder models",
        """
        --decoder-num-layers:1 --relative-attention-num-buckets:1=32 --relative-attention-max-distance:1=128
        --decoder-seq-length:1
        """,
    ),
    Family(
        "reinforcement learning",
        "blocking",
        "belongs to reinforcement learning, not to pre-training",
        """
        --perform-rl-step --rl-prompts-per-eval:1=32 --grpo-prompts-per-step:1=32 --grpo-group-size:1=2
        --rl-generation-lag:1 --rl-max-inflight-requests:1 --rl-submission-granularity:1=B
        --rl-consumption-granularity:1=B --rl-durable-rollout-bank --rl-rollout-bank-dir:1
        --rl-rollout-bank-max-bytes:1=0 --grpo-iterations:1=2 --grpo-clamp-eps-lower:1=0.01
        --grpo-clamp-eps-upper:1=0.01 --grpo-kl-beta:1=0.001 --grpo-entropy-term-weight:1=0.0
        --grpo-filter-groups-with-same-reward --langrl-env-config:1 --rl-default-temperature:1=1.0
        --rl-default-top-p:1=0 --rl-default-top-k:1=-1 --rl-offload-optimizer-during-inference
        --rl-kv-cache-management-mode:1=persist --rl-persist-cuda-graphs/--no-rl-persist-cuda-graphs
        --rl-partial-rollouts/--no-rl-partial-rollouts
        --rl-inference-logprobs-is-correction/--no-rl-inference-logprobs-is-correction
        --rl-importance-sampling-truncation-coef:1 --rl-use-sequence-packing/--no-rl-use-sequence-packing
        --rl-sequence-packing-max-sequences-per-bin:1=50 --rl-sequence-packing-algo:1=fifo
        --rl-training-cuda-graphs/--no-rl-training-cuda-graphs --rl-inference-tensor-model-parallel-size:1
        --rl-inference-pipeline-model-parallel-size:1 --rl-inference-expert-model-parallel-size:1
        --rl-inference-expert-tensor-model-parallel-size:1 --rl-inference-model-unified-memory-level:1=0
        --rl-offload-inference-model-weights-when-idle/--no-rl-offload-inference-model-weights-when-idle
        --refit-method:1=gloo --rl-verify-model-weights-swap/--no-rl-verify-model-weights-swap
        --rl-skip-bos-token/--no-rl-skip-bos-token --rl-profile --rl-profile-dir:1 --rl-inference-parsers:*
        """,
    ),
    Family(
        "frozen layers",
        "blocking",
        "freezes weights",
        """
        --freeze-all-layers
        """,
    ),
    Family(
        "weight shards",
        "blocking",
        "changes how gradients of sharded weights are added up",
        """
        --gtp-remat-reduce-scatter-with-fp32-accumulation
        """,
    ),
    Family(
        "phase transitions",
        "blocking",
        "changes the order of the data",
        """
        --phase-transition-iterations:1
        """,
    ),
    Family(
        "fill in the middle",
        "blocking",
        "rewrites the samples",
        """
        --fim-data --fim-rate:1=0.5 --fim-spm-rate:1=0.5 --fim-split-sample:1 --fim-fragment-rate:1 --fim-no-prefix:1
        --fim-prefix-token:1=<fim_prefix> --fim-middle-token:1=<fim_middle> --fim-suffix-token:1=<fim_suffix>
        --fim-pad-token:1=<fim_pad> --fim-eod-token:1=<|endoftext|>
        """,
    ),
    Family(
        "retrieval",
        "blocking",
        "belongs to retrieval models",
        """
        --ict-head-size:1 --biencoder-projection-dim:1=0 --biencoder-shared-query-context-model --ict-load:1
        --bert-load:1 --titles-data-path:1 --query-in-block-prob:1=0.1 --use-one-sent-docs --evidence-data-path:1
        --retriever-report-topk-accuracies:* --retriever-score-scaling --block-data-path:1 --embedding-path:1
        --indexer-batch-size:1=128 --indexer-log-interval:1=1000
        """,
    ),
    Family(
        "vision",
        "blocking",
        "belongs to vision models",
        """
        --num-classes:1=1000 --img-h:1=224 --img-w:1=224 --num-channels:1=3 --patch-dim:1=16 --classes-fraction:1=1.0
        --data-per-class-fraction:1=1.0 --no-data-sharding --head-lr-mult:1=1.0 --vision-pretraining
        --vision-pretraining-type:1=classify --vision-backbone-type:1=vit --swin-backbone-type:1=tiny
        --mask-type:1=random --mask-factor:1=1.0 --iter-per-epoch:1=1250 --dino-local-img-size:1=96
        --dino-local-crops-number:1=10 --dino-head-hidden-size:1=2048 --dino-bottleneck-size:1=256
        --dino-freeze-last-layer:1=1 --dino-norm-last-layer --dino-warmup-teacher-temp:1=0.04
        --dino-teacher-temp:1=0.07 --dino-warmup-teacher-temp-epochs:1=30
        """,
    ),
    Family(
        "upcycling",
        "blocking",
        "starts from the weights of a dense model",
        """
        --moe-use-upcycling --moe-upcycling-granularity:1=1
        """,
    ),
    Family(
        "heterogeneous layers",
        "blocking",
        "gives every layer a shape of its own",
        """
        --heterogeneous-layers-config-path:1 --heterogeneous-layers-config-encoded-json:1
        """,
    ),
    Family(
        "Model Optimizer",
        "blocking",
        "belongs to quantisation, pruning and distillation by Model Optimizer",
        """
        --export-legacy-megatron --export-force-local-attention --export-kv-cache-quant:1=none
        --export-real-quant-cfg:1=None --export-quant-cfg:1 --export-kd-teacher-load:1
        --export-kd-teacher-model-config:1
        --export-kd-teacher-ckpt-format:1 --export-kd-cfg:1 --finetune-hf-dataset:1 --finetune-data-split:1=train
        --finetune-data-files:* --qad-train-target:1 --freeze-base-for-mtp --export-qk-l2-norm
        --export-moe-apply-probs-on-input --export-offline-model --modelopt-enabled --enable-gpt-oss
        """,
    ),
    Family(
        "Flextron",
        "blocking",
        "belongs to elastic models, which have a training script of their own",
        """
        --distillation --distill-coeff:1=0.0 --distill-only --flextron --binary-mask --slice --enable-router
        --add-skipping --no-attn-skip --lr-mult-router:1=1.0 --flex-strict --is-flex-eval --freeze-router
        --freeze-model --flex-hetero-ffn --flex-hetero-mamba --flex-hetero-moe-expert --router-std:1=0.1
        --normalize-router-logits --soft-mask --budget-probs:* --prefill-chunk-size:1=16384
        --mem-infer-seq-len:1=131072 --mem-batch-size:1=1 --original-model-sample-prob:1=0.33 --force-router-skip:*
        --force-mlp:* --force-mamba:* --force-emb:* --skip-num-attn-layer-constraint:1 --skip-total-layer-constraint:1
        --disable-budget --curr-iteration:1 --hard-sample-th:1=0.996 --router-beta:1=1.0 --loss-alpha:1=1.0
        --tau-init:1=1.0 --tau-decay:1=0.9999 --router-inter-dim:1=128 --linear-scaler-start:1=1.0
        --linear-scaler-end:1=10.0 --override-selected-budget:* --router-gbs:1=32 --budget-list:*=1.0
        --mamba-per-list:* --mlp-per-list:* --emb-per-list:* --moe-expert-per-list:* --mamba-int-list:*
        --mlp-int-list:* --emb-int-list:* --moe-expert-int-list:* --budget-type:1=param --memory-profile:1=bf16
        --memory-profile-path:1 --bpe-params:1 --bpe-kv-cache:1 --bpe-ssm-cache:1 --bpe-max-buffer:1
        --param-budget-target:1 --layer-ranking-list:* --log-budgets:*=all --basemodel-type:1=nemotronh_8b
        --flextron-config-file:1
        """,
    ),
    Family(
        "vision-language",
        "blocking",
        "belongs to vision-language models",
        """
        --freeze-LM --freeze-ViT --disable-vision-class-token --dataloader-seq-length:1 --decoder-tp-comm-overlap
        --use-packed-sequence --dataset-config:1 --prompt-path:1 --freeze-sound-model --language-model-type:1
        --vision-model-type:1=clip --sound-model-type:1 --allow-missing-vision-projection-checkpoint
        --allow-missing-sound-projection-checkpoint --allow-missing-sound-model-checkpoint --use-te
        --dataloader-save:1 --use-tiling --max-num-tiles:1=1 --use-thumbnail --thumbnail-area-threshold:1=0.8
        --dataloader-seed:1=0 --lr-data-range-start:1=0 --lr-data-range-end:1=100 --num-frames:1=1
        --online-evaluation-config:1 --special-tokens:* --tokenizer-prompt-format:1 --pixel-shuffle
        --image-tag-type:1= --use-tile-tags --class-token-len:1 --packing-buffer-size:1 --packing-seq-length:1=0
        --packing-knapsack-algorithm:1=greedy_knapsack --recompute-vision --recompute-sound --use-loss-scaling
        --force-system-message --eos-id:1 --use-area-weighted-aspect-ratio --use-mcore-inference
        --use-vision-backbone-fp8-arch --dynamic-resolution --dynamic-resolution-min-patches:1=0
        --dynamic-resolution-max-patches:1=0 --dynamic-resolution-min-side:1 --match-tiling-dynamic-resolution
        --masked-tiling-dynamic-resolution --image-break-token:1 --conv-merging --allow-missing-conv-merge-checkpoint
        --video-min-num-frames:1=8 --video-max-num-frames:1=32 --video-default-fps:1=2 --video-frame-temporal-jitter
        --video-target-img-size:1 --video-target-num-patches:1 --video-maintain-aspect-ratio
        --video-temporal-patch-size:1=1 --allow-checkpoint-without-temporal-compression --separate-video-embedder
        --video-prompt-version:1=2 --enable-fusions --optimize-broadcast --recompute-vision-num-layers:1=0
        --recompute-granularity-vision:1 --recompute-method-vision:1 --recompute-vision-projection
        --recompute-sound-projection --allow-large-videos --efficient-video-sampling-variant:1
        --sound-target-rate:1=16000 --sound-embedding-size:1=750 --sound-clip-duration:1=30 --sound-min-duration:1=0.1
        --sound-pad-to-clip-duration --sound-batch-split:1=1 --use-new-dataloader-path --freeze-vision-projection
        --freeze-sound-projection --relax-sender-check --relax-thinking-trace-check --allow-cross-sample-attention
        --only-keep-samples-with-img --unfreeze-router --apply-data-augment --radio-force-eval-mode
        --radio-force-cpe-eval-mode --radio-interpolate-only-cpe --radio-cpe-aspect-ratio-select --radio-disable-cpe
        --no-calculate-per-token-loss --tokenizer-keep-history-thinking --log-model-grad-norms --log-model-act-norms
        --dynamic-resolution-no-truncate --video-aug-scale-frames-up:1 --video-aug-scale-resolution-only
        --video-aug-scale-resolution-up:1
        """,
    ),
    Family(
        "inference scripts",
        "blocking",
        "belongs to a script that generates text, not to training",
        """
        --max-batch-size:1 --stream --temperature:1=1.0 --top_k:1=1 --top_p:1=0.0 --return-log-probs
        --num-tokens-to-generate:1=30 --encoder-prompts:* --coordinator-host:1 --coordinator-port:1 --host:1=0.0.0.0
        --port:1=5000 --parsers:* --verbose --frontend-replicas:1=4 --use-coordinator --async-mode --prompts:*
        --num-tokens-to-prompt:* --num-tokens-from-file --top-n-logprobs:1=0 --incoming-requests-per-step:1
        --incoming-requests-per-sec:1=100.0 --incoming-requests-duration:1=10.0 --model-provider:1=gpt
        --skip-prompt-log-probs --stop-words:* --output-path:1 --output-every-n-results:1=1 --output-request-events
        --prompt-file:1 --prompt-file-num-truncate:1 --use-flashinfer-fused-rope --no-record-throughput
        --inference-ckpt-non-strict --termination-id:1 --suspend-resume-interval:1 --suspend-timeout:1=0.0
        --inference-repeat-n:1=1 --throughput-check-only --drain-between-batches --batch-boundaries:1
        --coordinator-schedule-output-path:1 --moe-routing-trace-max-inference-steps:1 --num-input-tokens:1=128
        --engine-type:1=static --benchmark-profile
        """,
    ),
    Family(
        "MIMO",
        "blocking",
        "belongs to models of several modalities, which have a training script of their own",
        """
        --encoder-tp:1=2 --encoder-dp:1=2 --llm-offset:1=4 --llm-tp:1=2 --llm-cp:1=1 --llm-pp:1=1 --llm-dp:1=2
        --llm-ep:1=1 --llm-expt-tp:1 --llm-only --encoder-ddp-overlap --dataset-provider:1=mock --image-size:1=224
        --total-seq-length:1=512 --pad-token-id:1=0 --image-token-id:1=32000 --image-seq-length:1=197
        --audio-encoder-model:1 --hf-assign-unused-tokens:* --language-model-checkpoint:1
        """,
    ),
)
