"""Faults to plant in one side of a comparison, and what the walk has to say about each.

A `Fault` names the layout of the side it is planted in, a context manager that plants it (a patch of the code under
test, never of the lab), and the stage and the tensor or field at which the walk has to stop. The other side is the
clean run of one process, or of the same layout where a single process has nothing like it. To add one, write what is
planted in `plants.py` and its line in `FAULTS`, with the stage and tensor that are right before you run it. Three ways
to run a planted side, the cheapest first:

- in this process: ``with fault.plant(): probe(job)``, for one process;
- several at a time in one start of processes: ``in_turn([Turn(2, planted, (name, job)), ...])``;
- as users do, by way of the localiser: a `Rerun` whose ``worker`` is ``("-m", "tests.lab.faults", name)``, which makes
  this module plant the fault in every process of that side. Users have no option for it.

Those with ``commands`` are trained and given to ``lockstep compare`` and ``lockstep localise`` as two run directories
(`command_faults.py`); the walk judges the probes of the others.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.data.cache import IndexCache
from lockstep.data.gpt_dataset import GPTDataset
from lockstep.guard import run as guarded
from lockstep.lab.localise import stages
from lockstep.lab.localise.worker import Job, probe
from lockstep.models import attention, mlp, moe, norms, positions, router
from lockstep.parallel import gradients, modules
from lockstep.parallel.buckets import Bucket, GradientBuckets
from lockstep.parallel.gradients import Gradients
from lockstep.record.schema import encode
from lockstep.training import checkpoint_load, feed, optimizer, passes, setup, step
from lockstep.training.precision import MainWeights
from lockstep.training.schedule import LearningRateSchedule
from lockstep.training.sharded import ShardedMainWeights
from lockstep.training.step import TrainStep
from tests.lab import plants
from tests.lab.plants import Plant, changed

GPT: dict[str, Any] = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 48,
    "model.seq_length": 64,
    "model.max_position_embeddings": 64,
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.make_vocab_size_divisible_by": 1,
    "tokenizer.tokenizer_type": "NullTokenizer",
    "tokenizer.vocab_size": 63,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 4,
    "train.train_iters": 3,
    "validation.eval_iters": 0,
    "dataset.mock": True,
    "optimizer.lr": 1e-3,
    "optimizer.clip_grad": 0.1,
    "run.device": "cpu",
}
LLAMA: dict[str, Any] = {
    **GPT,
    "model.num_query_groups": 2,
    "model.normalization": "RMSNorm",
    "model.gated_linear_unit": True,
    "model.activation_func": "silu",
    "model.add_bias_linear": False,
    "model.position_embedding_type": "rope",
    "model.share_embeddings_and_output_weights": False,
}
TENSOR = {"model.tensor_model_parallel_size": 2}
SEQUENCE = {**TENSOR, "model.sequence_parallel": True}
PIPELINE = {"model.pipeline_model_parallel_size": 2}
SHARDED = {"ddp.use_distributed_optimizer": True}
MOE: dict[str, Any] = {
    **LLAMA,
    "model.num_moe_experts": 4,
    "model.moe_ffn_hidden_size": 16,
    "model.moe_layer_freq": "[0]+[1]",
    "model.moe_router_load_balancing_type": ["aux_loss"],
    "model.moe_aux_loss_coeff": [0.01],
    "model.moe_token_dispatcher_type": "alltoall",
}
DOCUMENTS: dict[str, Any] = {
    **LLAMA,
    "rng.seed": 11,  # the first micro-batch has a document more than the others, so a valid token less
    "dataset.reset_attention_mask": True,
    "dataset.reset_position_ids": True,
    "dataset.eod_mask_loss": True,
}
KINDS = {"gpt": GPT, "llama": LLAMA}
JOBS: dict[str, dict[str, Any]] = {
    **KINDS,
    "gpt, BF16": {**GPT, "mixed_precision.bf16": True},
    "gpt, dropout": {**GPT, "model.hidden_dropout": 0.1, "model.attention_dropout": 0.1},
    "llama, scaled positions": {**LLAMA, "model.rope_scaling": True},
    "experts": MOE,
    "documents": DOCUMENTS,
    "documents, loss by token": {**DOCUMENTS, "model.calculate_per_token_loss": True},
}
"""What is trained, by name; clean pairs are of ``KINDS``."""


def config(changes: dict[str, Any], processes: int = 1) -> dict[str, dict[str, Any]]:
    """Return a resolved tree, nested, as a record keeps it."""
    tree = ConfigContainer()
    for path, value in changes.items():
        tree.set(path, value, Origin("python"))
    return encode(resolve(tree, world_size=processes).as_dict())


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": TENSOR,
    "TP2+SP": SEQUENCE,
    "PP2": PIPELINE,
    "DP2": {},
    "sharded DP2": SHARDED,
    "CP2": {"model.context_parallel_size": 2},
    "FSDP2": {"dist.use_torch_fsdp2": True},
}


@dataclass(frozen=True)
class Fault:
    """A fault and what has to be named.

    Attributes:
        plant: plants it while the context lasts.
        stage: the stage of the walk at which it shows first.
        tensor: the tensor, number or setting.
        kind: of job.
        layout: of the side that has it.
        processes: of that side.
        beside: the clean side has this layout too.
        commands: it goes through the commands.
        resumed: the side that has it goes on from the checkpoint that the clean one saved after iteration 2.
        before: what a run with the fault had otherwise that left its index cache to this one.
    """

    plant: Plant
    stage: str
    tensor: str
    kind: str = "gpt"
    layout: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    beside: bool = False
    commands: bool = False
    resumed: bool = False
    before: dict[str, Any] = field(default_factory=dict)

    @property
    def trains_first(self) -> bool:
        """Whether a run comes before the one that shows it, so that probes alone are not enough."""
        return self.resumed or bool(self.before)

    @property
    def clean(self) -> tuple[str, int]:
        """Which clean side it is compared with: job and processes."""
        return self.kind, self.processes if self.beside else 1


FAULTS: dict[str, Fault] = {
    "labels shifted": Fault(changed(feed, "collate", plants.labels_shifted), stages.DATA, "labels", commands=True),
    "first token masked": Fault(changed(feed, "collate", plants.first_token_masked), stages.DATA, "loss_mask"),
    "micro-batches of the first process": Fault(
        changed(setup, "sample_order", plants.samples_of_the_first), stages.DATA, "tokens", processes=2
    ),
    "all-ones loss mask": Fault(
        changed(feed, "collate", plants.loss_everywhere), stages.DATA, "loss_mask", "documents", commands=True
    ),
    "positions run on over documents": Fault(
        changed(GPTDataset, "_position_ids", plants.positions_run_on), stages.DATA, "position_ids", "documents"
    ),
    "documents numbered as one": Fault(
        changed(feed, "collate", plants.documents_joined), stages.DATA, "document_ids", "documents"
    ),
    "stale index cache": Fault(
        changed(IndexCache, "load_or_build", plants.seed_not_in_the_key),
        stages.DATA,
        "tokens",
        commands=True,
        before={"dataset.random_seed": 4321},
    ),
    "another seed": Fault(
        changed(setup, "initial_weights", plants.another_seed),
        stages.WEIGHTS,
        "decoder.layers.1.mlp.linear_fc1.weight",
        commands=True,
    ),
    "replica that drifts": Fault(
        changed(setup, "build_parallel_model", plants.a_replica_drifts),
        stages.WEIGHTS,
        "decoder.final_layernorm.weight",
        processes=2,
    ),
    "schedule off": Fault(changed(LearningRateSchedule, "__call__", plants.one_step_late), stages.SCHEDULE, "lr"),
    "schedule off by one batch": Fault(
        changed(LearningRateSchedule, "__call__", plants.one_batch_ahead), stages.SCHEDULE, "lr", commands=True
    ),
    "bias given weight decay": Fault(
        changed(optimizer, "is_decayed", plants.always),
        stages.SCHEDULE,
        "weight decay of decoder.layers.0.input_layernorm.bias",
    ),
    "dropout streams shared by processes": Fault(
        plants.streams_shared,
        stages.STATE,
        "random stream embedding 1",
        "gpt, dropout",
        processes=2,
        beside=True,
    ),
    "rope base": Fault(
        changed(positions, "inverse_frequencies", plants.another_base),
        stages.FORWARD,
        "rotary cosine",
        "llama",
        commands=True,
    ),
    "rope scaling factor lost": Fault(
        changed(positions, "scaled_frequencies", plants.not_scaled),
        stages.FORWARD,
        "rotary cosine",
        "llama, scaled positions",
    ),
    "norm epsilon in the kernel": Fault(
        changed(norms.Norm, "forward", plants.epsilon_in_the_kernel), stages.FORWARD, "decoder.layers.0.input_layernorm"
    ),
    "norm epsilon of the module": Fault(
        changed(norms.Norm, "__init__", plants.epsilon_of_the_module),
        stages.FEATURES,
        "model.layernorm_epsilon",
        commands=True,
    ),
    "softmax in low precision": Fault(
        changed(attention, "core_attention", plants.low_softmax), stages.FORWARD, "decoder.layers.0.self_attention"
    ),
    "products in low precision": Fault(
        changed(sys.modules["lockstep.models.layers"], "linear", plants.low_products),
        stages.FORWARD,
        "decoder.layers.0.self_attention.linear_qkv",
    ),
    "last key always seen": Fault(
        changed(sys.modules["lockstep.models.mask"], "hidden_positions", plants.no_mask),
        stages.FORWARD,
        "attention mask",
    ),
    "all-ones attention mask": Fault(
        changed(sys.modules["lockstep.models.mask"], "hidden_positions", plants.all_seen),
        stages.FORWARD,
        "attention mask",
    ),
    "document boundaries not seen by attention": Fault(
        changed(sys.modules["lockstep.models.mask"], "hidden_positions", plants.boundaries_not_seen),
        stages.FORWARD,
        "attention mask",
        "documents",
        commands=True,
    ),
    "query and key swapped": Fault(
        changed(attention, "core_attention", plants.query_and_key_swapped),
        stages.FORWARD,
        "decoder.layers.0.self_attention",
    ),
    "router in low precision": Fault(
        changed(router._RouterProduct, "forward", plants.low_router),
        stages.FORWARD,
        "decoder.layers.1.mlp.router.weights",
        "experts",
    ),
    "expert left out": Fault(
        changed(moe.Experts, "forward", plants.without_the_last_expert),
        stages.FORWARD,
        "decoder.layers.1.mlp",
        "experts",
        commands=True,
    ),
    "missing sum in the forward pass": Fault(
        changed(modules.RowParallelLinear, "product", plants.product_not_added),
        stages.FORWARD,
        "decoder.layers.0.self_attention",
        layout=TENSOR,
        processes=2,
    ),
    "one process is off": Fault(
        changed(modules.RowParallelLinear, "product", plants.one_process_is_off),
        stages.FORWARD,
        "decoder.layers.0.self_attention",
        layout=TENSOR,
        processes=2,
    ),
    "tokens counted twice": Fault(
        changed(passes, "masked_sum", plants.every_token_counts_double), stages.LOSS, "valid tokens", commands=True
    ),
    "wrong divisor": Fault(changed(TrainStep, "__init__", plants.two_replicas_assumed), stages.LOSS, "divisor"),
    "masked tokens divide too": Fault(
        changed(step, "_divisors", plants.all_tokens_divide), stages.LOSS, "divisor", "documents", commands=True
    ),
    "weight of the routers' loss": Fault(
        changed(router.RouterLosses, "__init__", plants.double_weight),
        stages.GRADIENTS,
        "decoder.layers.1.mlp.router.weight",
        "experts",
        commands=True,
    ),
    "activation's backward": Fault(
        changed(mlp._FusedActivation, "backward", plants.scaled_in_backward),
        stages.GRADIENTS,
        "decoder.layers.1.mlp.linear_fc1.weight",
        commands=True,
    ),
    "each process divides by its own tokens": Fault(
        changed(step, "in_global_order", plants.own_tokens_for_all),
        stages.REDUCED,
        "embedding.word_embeddings.weight",
        "documents, loss by token",
        processes=2,
    ),
    "first micro-batch counted twice": Fault(
        changed(GradientBuckets, "_accumulate", plants.first_counted_twice),
        stages.REDUCED,
        "embedding.position_embeddings.weight",
        commands=True,
    ),
    "last micro-batch alone": Fault(
        changed(GradientBuckets, "_accumulate", plants.overwritten),
        stages.REDUCED,
        "embedding.position_embeddings.weight",
    ),
    "missing all-reduce over tensor parallel": Fault(
        changed(gradients, "_is_partial", plants.never),
        stages.REDUCED,
        "embedding.position_embeddings.weight",
        layout=SEQUENCE,
        processes=2,
    ),
    "missing all-reduce over data parallel": Fault(
        changed(Bucket, "reduce", plants.not_added),
        stages.REDUCED,
        "embedding.position_embeddings.weight",
        processes=2,
        commands=True,
    ),
    "missing sum of tied embeddings": Fault(
        changed(gradients, "is_tied", plants.never),
        stages.REDUCED,
        "embedding.word_embeddings.weight",
        layout=PIPELINE,
        processes=2,
    ),
    "clip before reduce": Fault(
        changed(MainWeights, "hand_over", plants.clipped_first),
        stages.REDUCED,
        "embedding.position_embeddings.weight",
        processes=2,
    ),
    "norm counts whole parameters twice": Fault(
        changed(Gradients, "norms", plants.all_split), stages.NORM, "gradient norm", layout=TENSOR, processes=2
    ),
    "norm leaves a parameter out": Fault(
        changed(Gradients, "norms", plants.one_left_out), stages.NORM, "gradient norm", commands=True
    ),
    "norm leaves experts out": Fault(
        changed(Gradients, "_total", plants.experts_left_out),
        stages.NORM,
        "gradient norm",
        "experts",
        {"model.expert_model_parallel_size": 2},
        processes=2,
    ),
    "clipped twice": Fault(
        changed(optimizer.WideGradients, "multiply", plants.clipped_twice),
        stages.CLIPPED,
        "embedding.position_embeddings.weight",
        commands=True,
    ),
    "Adam's epsilon of the group": Fault(
        changed(optimizer, "_build", plants.another_epsilon), stages.FEATURES, "optimizer.adam_eps"
    ),
    "Adam's epsilon in the update": Fault(
        plants.epsilon_in_the_update, stages.UPDATE, "embedding.position_embeddings.weight", commands=True
    ),
    "model keeps its weights": Fault(
        changed(MainWeights, "copy_to_model", plants.no_copy),
        stages.AFTER,
        "embedding.position_embeddings.weight",
        "gpt, BF16",
        commands=True,
    ),
    "weights not sent on": Fault(
        changed(ShardedMainWeights, "copy_to_model", plants.no_copy),
        stages.AFTER,
        "embedding.position_embeddings.weight",
        layout=SHARDED,
        processes=2,
    ),
    "random streams not restored": Fault(
        changed(checkpoint_load, "_restore_streams", plants.nothing),
        stages.STATE,
        "random stream embedding 0",
        "gpt, dropout",
        commands=True,
        resumed=True,
    ),
    "samples repeated": Fault(
        changed(feed.Feed, "seek", plants.nothing), stages.DATA, "tokens", commands=True, resumed=True
    ),
    "moments not restored": Fault(
        changed(checkpoint_load.Source, "read", plants.moments_zero),
        stages.STATE,
        "exp_avg.embedding.position_embeddings.weight",
        commands=True,
        resumed=True,
    ),
    "updates not counted on": Fault(
        changed(checkpoint_load, "make_optimizer_state", plants.updates_forgotten),
        stages.STATE,
        "updates",
        commands=True,
        resumed=True,
    ),
    "consumed samples off": Fault(
        changed(checkpoint_load, "_restore_progress", plants.one_batch_less),
        stages.STATE,
        "consumed samples",
        commands=True,
        resumed=True,
    ),
}


def tree_of(fault: Fault) -> dict[str, dict[str, Any]]:
    """Return the tree of the side with a fault."""
    return config({**JOBS[fault.kind], **fault.layout}, fault.processes)


def job_of(name: str | None, folder: Path, start: Path, kind: str = "gpt") -> Job:
    """Return the job of the side with a fault, or with None of the clean side of one process."""
    return Job(config(JOBS[kind]) if name is None else tree_of(FAULTS[name]), [1], str(folder), str(start))


def clean_job_of(name: str, folder: Path) -> Job:
    """Return the job of the clean side that a fault is compared with."""
    fault = FAULTS[name]
    return Job(tree_of(fault) if fault.beside else config(JOBS[fault.kind]), [1], str(folder), str(folder))


def planted(name: str | None, job: Job) -> int:
    """Do a job with a fault planted, or with None without."""
    with ExitStack() as stack:
        if name is not None:
            stack.enter_context(FAULTS[name].plant())
        return probe(job)


if __name__ == "__main__":
    sys.exit(guarded(lambda: planted(sys.argv[1], Job.load(Path(sys.argv[2])))))
