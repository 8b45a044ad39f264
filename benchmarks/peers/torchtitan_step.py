"""torchtitan's own trainer on random tokens: its model, parallelism, compilation, loss, clipping and optimizer.

Its options are those that make it fastest: model and loss compiled, no recomputation unless the job has it, fused
AdamW; on several GPUs fully_shard, in float8 with weights gathered in float8 and their scales computed at once. What
its configuration does not say is as it comes, such as when weights are gathered and gradients exchanged.
"""

import dataclasses
import importlib.metadata
from tempfile import mkdtemp
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from benchmarks.peers.job import Batches, Job, Turn
from benchmarks.peers.stand_ins import stand_in


class Recorder:
    """Keeps losses where torchtitan would log them; leaves its peak of memory alone."""

    def __init__(self, *_: Any) -> None:
        from torchtitan.tools.utils import NoColor

        self.color = NoColor()
        self.losses: list[float] = []
        self.reads = True
        self.device_memory_monitor = self
        self.device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.max_reserved_gib = self.max_reserved_pct = 0.0

    def get_peak_stats(self) -> "Recorder":
        """Return nothing measured."""
        return self

    def should_log(self, step: int) -> bool:
        """Tell whether the loss is to be known when the step ends."""
        return self.reads

    def log(self, step: int, average: float, *_: Any, **__: Any) -> None:
        """Keep a loss."""
        self.losses.append(float(average))

    def close(self) -> None:
        """Have nothing to close."""


def configured(job: Job) -> Any:
    """Return torchtitan's configuration of a job."""
    from torchtitan.config import JobConfig

    cuda = torch.cuda.is_available()
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
    config.compile.enable = job.compiled
    config.comm.trace_buf_size = 0
    config.activation_checkpoint.mode = "full" if job.recomputed else "none"
    if job.float8:
        config.model.converters = ["quantize.linear.float8"]
        float8 = config.quantize.linear.float8
        float8.filter_fqns = ["output"]
        float8.emulate = not cuda
        if job.float8 == "tensorwise":
            float8.enable_fsdp_float8_all_gather = float8.precompute_float8_dynamic_scale_for_fsdp = job.gpus > 1
        else:
            float8.recipe_name = job.float8
    if job.experts:
        config.parallelism.expert_parallel_degree = job.gpus
    return config


def model_args(job: Job) -> Any:
    """Return torchtitan's description of the model."""
    if job.experts:
        from torchtitan.models.deepseek_v3 import deepseekv3_args

        count, each, width, shared = job.experts
        base = deepseekv3_args["16B"]
        return dataclasses.replace(
            base,
            vocab_size=job.vocabulary,
            dim=job.hidden,
            inter_dim=job.ffn,
            n_layers=job.layers,
            n_heads=job.heads,
            moe_inter_dim=width,
            moe_args=dataclasses.replace(
                base.moe_args, num_experts=count, top_k=each, num_shared_experts=shared // width
            ),
            # Its own choice, flex attention, is for documents apart.
            attn_type="sdpa",
            attn_mask_type="causal",
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


def prepared(job: Job) -> Any:
    """Return torchtitan's trainer, which begins its processes' communication."""
    stand_in()
    cuda = torch.cuda.is_available()
    if not cuda:
        torch._utils._get_available_device_type = lambda: "cpu"  # A PyTorch that is built for GPUs says none.
    from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
    from torchtitan.train import Trainer

    if job.float8:
        import torchtitan.components.quantization.float8  # noqa: F401  The converter registers itself.
    if job.experts and not cuda:
        from torchtitan.models.moe import kernels

        kernels.fill_indices_wrapper = kernels.fill_indices_cpu
        counted = torch.histc
        torch.histc = lambda index, **named: counted(index.float(), **named).to(index.dtype)
    spec = get_train_spec("deepseek_v3" if job.experts else "llama3")
    changes: dict[str, Any] = {"build_tokenizer_fn": None, "build_dataloader_fn": None}
    changes |= {"build_metrics_processor_fn": Recorder, "model_args": {"job": model_args(job)}}
    # Only what saves checkpoints needs it.
    changes["state_dict_adapter"] = None
    register_train_spec("peer", dataclasses.replace(spec, **changes))
    trainer = Trainer(configured(job))
    for module in [] if cuda else trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # Gloo does not scale what it adds up.
    return trainer


def main() -> None:
    """Train and report."""
    turn = Turn.of_command_line()
    trainer = prepared(turn.job)

    def take(number: int, batches: Batches, read: bool) -> float:
        trainer.step = number + 1
        trainer.gc_handler.run(trainer.step)
        trainer.gradient_accumulation_steps = len(batches)
        trainer.metrics_processor.reads = read
        trainer.train_step(({"input": text}, labels) for text, labels in batches)
        losses: list[float] = trainer.metrics_processor.losses
        return losses[-1]

    version = importlib.metadata.version("torchtitan")
    words = {"compilation": "layer by layer, loss" if turn.job.compiled else "none", "peer": f"torchtitan {version}"}
    turn.report(take, words)
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
