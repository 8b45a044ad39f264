"""torchtitan's own trainer on random tokens: its model, parallelism, compilation, loss, clipping and optimizer.

Its options are those that make it fastest: model and loss compiled, no recomputation unless the job has it, fused
AdamW; on several GPUs fully_shard, in float8 with weights gathered in float8 and their scales computed at once.
"""

import dataclasses
import importlib.metadata
from tempfile import mkdtemp
from typing import Any

import torch

from benchmarks.peers.job import Job, report, started


class Recorder:
    """Keeps the loss of every step where torchtitan would log it; leaves its peak of memory alone."""

    def __init__(self, *_: Any) -> None:
        from torchtitan.tools.utils import NoColor

        self.color = NoColor()
        self.losses: list[float] = []
        self.device_memory_monitor = self
        self.device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.max_reserved_gib = self.max_reserved_pct = 0.0

    def get_peak_stats(self) -> "Recorder":
        """Return nothing measured."""
        return self

    def should_log(self, step: int) -> bool:
        """Say that every step is logged, so that its loss is known when it ends."""
        return True

    def log(self, step: int, average: float, *_: Any, **__: Any) -> None:
        """Keep a loss."""
        self.losses.append(float(average))

    def close(self) -> None:
        """Have nothing to close."""


def configured(job: Job) -> Any:
    """Return torchtitan's configuration of a job."""
    from torchtitan.config import JobConfig

    config = JobConfig()
    config.job.dump_folder = mkdtemp()
    config.model.name = "peer"
    config.model.flavor = "job"
    config.training.local_batch_size = job.micro_batch
    config.training.global_batch_size = job.batch
    config.training.seq_len = job.length
    config.training.steps = 1000
    config.optimizer.lr = 1e-4
    config.optimizer.weight_decay = 0.01
    config.lr_scheduler.warmup_steps = 0
    config.lr_scheduler.decay_ratio = 0.0
    config.compile.enable = torch.cuda.is_available()
    config.activation_checkpoint.mode = "full" if job.recomputed else "none"
    if job.float8:
        config.model.converters = ["quantize.linear.float8"]
        float8 = config.quantize.linear.float8
        float8.enable_fsdp_float8_all_gather = float8.precompute_float8_dynamic_scale_for_fsdp = True
        float8.filter_fqns = ["output"]
    if job.family == "deepseek_v2_lite":
        config.parallelism.expert_parallel_degree = job.gpus
    return config


def model_args(job: Job) -> Any:
    """Return torchtitan's description of the model."""
    if job.family == "deepseek_v2_lite":
        from torchtitan.models.deepseek_v3 import deepseekv3_args

        return dataclasses.replace(
            deepseekv3_args["16B"], attn_type="sdpa", attn_mask_type="causal", n_layers=job.layers
        )
    from torchtitan.models.llama3 import TransformerModelArgs

    return TransformerModelArgs(
        dim=job.hidden,
        n_layers=job.layers,
        n_heads=job.heads,
        n_kv_heads=job.groups,
        vocab_size=job.vocabulary,
        # Its width of an MLP is a share of 8/3 of the hidden size, rounded up to a multiple.
        ffn_dim_multiplier=(job.ffn - 0.5) / int(8 * job.hidden / 3),
        multiple_of=2,
        rope_theta=job.rotary_base,
        max_seq_len=job.length,
    )


def main() -> None:
    """Train and report."""
    job, steps, profile = started()
    from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
    from torchtitan.train import Trainer

    spec = get_train_spec("deepseek_v3" if job.family == "deepseek_v2_lite" else "llama3")
    changes: dict[str, Any] = {"build_tokenizer_fn": None, "build_dataloader_fn": None}
    changes |= {"build_metrics_processor_fn": Recorder, "model_args": {"job": model_args(job)}}
    register_train_spec("peer", dataclasses.replace(spec, **changes))
    trainer = Trainer(configured(job))
    rank = torch.distributed.get_rank()

    def take(number: int) -> float:
        trainer.step = number + 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(iter([({"input": text}, labels) for text, labels in job.tokens(number, rank)]))
        losses: list[float] = trainer.metrics_processor.losses
        return losses[-1]

    version = importlib.metadata.version("torchtitan")
    words = {"compilation": "layer by layer, loss" if trainer.job_config.compile.enable else "none"}
    report(job, take, steps, profile, words | {"peer": f"torchtitan {version}"})
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
