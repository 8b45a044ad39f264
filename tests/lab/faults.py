"""Faults to plant in one side of a comparison, and what the walk has to say about each.

A `Fault` names the layout of the side it is planted in, a context manager that plants it (a patch of the code under
test, never of the lab), and the stage and the tensor or field at which the walk has to stop. The other side is the
clean run of one process. To add one, write its context manager and its line in `FAULTS`; `tests/lab/test_localise.py`
runs all of them. Three ways to run a planted side, the cheapest first:

- in this process: ``with fault.plant(): probe(job)``, for one process;
- several at a time in one start of processes: ``in_turn([Turn(2, planted, (name, job)), ...])``;
- as users do, by way of the localiser: a `Rerun` whose ``worker`` is ``("-m", "tests.lab.faults", name)``, which makes
  this module plant the fault in every process of that side. Users have no option for it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.guard import run as guarded
from lockstep.lab.localise import stages
from lockstep.lab.localise.worker import Job, probe
from lockstep.models import attention, mlp, norms, ops, positions
from lockstep.parallel import gradients, modules
from lockstep.parallel.buckets import Bucket, GradientBuckets
from lockstep.parallel.gradients import Gradients
from lockstep.parallel.mesh import Axis
from lockstep.record.schema import encode
from lockstep.training import feed, optimizer, passes, setup
from lockstep.training.precision import MainWeights
from lockstep.training.schedule import LearningRateSchedule
from lockstep.training.sharded import ShardedMainWeights
from lockstep.training.step import TrainStep

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
KINDS = {"gpt": GPT, "llama": LLAMA}


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

Plant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Fault:
    """A fault and what has to be named.

    Attributes:
        plant: plants it while the context lasts.
        stage: the stage of the walk at which it shows first.
        tensor: the tensor, number or setting.
        kind: of model.
        layout: of the side that has it.
        processes: of that side.
    """

    plant: Plant
    stage: str
    tensor: str
    kind: str = "gpt"
    layout: dict[str, Any] = field(default_factory=dict)
    processes: int = 1


def _patched(owner: Any, name: str, value: Any) -> AbstractContextManager[Any]:
    return mock.patch.object(owner, name, value)


def _changed(owner: Any, name: str, change: Callable[..., Any]) -> Plant:
    """Replace a function by ``change(original, *arguments)``."""

    def plant() -> AbstractContextManager[Any]:
        original = getattr(owner, name)
        return _patched(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))

    return plant


# Data.


def _labels_shifted(collate: Any, samples: Any) -> Any:
    batch = collate(samples)
    return batch | {"labels": batch["labels"].roll(-1, dims=1)}


def _first_token_masked(collate: Any, samples: Any) -> Any:
    batch = collate(samples)
    mask = batch["loss_mask"].clone()
    mask[:, 0] = 0
    return batch | {"loss_mask": mask}


def _samples_of_the_first(sample_order: Any, kind: Any, total: int, micro: int, dp: Axis, consumed: int = 0) -> Any:
    return sample_order(kind, total, micro, replace(dp, rank=0), consumed)


# Weights and schedule.


def _another_seed(initial_weights: Any, config: Any, seed: int, dtype: Any, device: Any) -> Any:
    wrong = dict(initial_weights(config, seed + 1, dtype, device))
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    for each, value in initial_weights(config, seed, dtype, device):
        yield each, wrong[name] if each == name else value


def _one_step_late(rate: Any, self: Any, samples: int) -> float:
    return float(rate(self, samples)) * 0.9


def _a_replica_drifts(build: Any, config: Any, mesh: Any, *args: Any) -> Any:
    model, *rest = build(config, mesh, *args)
    if mesh.dp.rank == 1:
        with torch.no_grad():
            model.decoder.final_layernorm.weight[0] += 1e-6
    return (model, *rest)


# Forward.


def _another_base(inverse_frequencies: Any, config: Any, device: Any) -> torch.Tensor:
    return inverse_frequencies(replace(config, rotary_base=500000.0), device)


def _epsilon_in_the_kernel(forward: Any, self: Any, x: torch.Tensor) -> torch.Tensor:
    before, self.epsilon = self.epsilon, 1e-3
    try:
        return forward(self, x)
    finally:
        self.epsilon = before


def _epsilon_of_the_module(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    init(self, *args, **kwargs)
    self.epsilon = 1e-3


def _low_softmax(core: Any, query: Any, key: Any, value: Any, hidden: Any, **settings: Any) -> torch.Tensor:
    scores = torch.bmm(query, key.transpose(1, 2)) / query.shape[-1] ** 0.5
    shares = torch.softmax(scores.masked_fill(hidden, -10000.0).bfloat16(), dim=-1).to(query.dtype)
    return torch.bmm(shares, value)


def _low_products(linear: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    """Multiply in fewer digits where the model is float32, as GPUs do when they may."""
    if x.dtype == torch.float32:
        x, weight = x + (x.bfloat16().float() - x).detach(), weight + (weight.bfloat16().float() - weight).detach()
    return linear(x, weight, bias)


def _no_mask(hidden_positions: Any, where: torch.Tensor, length: int, documents: Any) -> torch.Tensor:
    hidden = hidden_positions(where, length, documents)
    return hidden & (torch.arange(length) != length - 1)


def _all_seen(hidden_positions: Any, where: torch.Tensor, length: int, documents: Any) -> torch.Tensor:
    return torch.zeros_like(hidden_positions(where, length, documents))


def _query_and_key_swapped(core: Any, query: Any, key: Any, *rest: Any, **settings: Any) -> Any:
    return core(key, query, *rest, **settings)


def _product_not_added(product: Any, self: Any, x: torch.Tensor) -> torch.Tensor:
    return ops.linear(x, self.weight)


def _one_process_is_off(product: Any, self: Any, x: torch.Tensor) -> torch.Tensor:
    found = product(self, x)
    return found * 1.001 if self.mesh.tp.rank == 1 else found


# Loss and backward.


def _every_token_counts_double(masked_sum: Any, *args: Any) -> Any:
    total, tokens = masked_sum(*args)
    return total, tokens * 2


def _two_replicas_assumed(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    init(self, *args, **kwargs)
    self._dp = replace(self._dp, size=self._dp.size * 2)


def _scaled_in_backward(backward: Any, ctx: Any, *grads: Any) -> Any:
    first, *rest = backward(ctx, *grads)
    return (first * 1.01, *rest)


# Reduction, norm, clipping, update.


def _overwritten(accumulate: Any, self: Any, param: Any) -> None:
    self._arrived[param] = 0
    accumulate(self, param)


def _never(original: Any, *args: Any) -> bool:
    return False


def _not_added(reduce: Any, self: Any, sharded: bool) -> None:
    self.started = True


def _clipped_first(hand_over: Any, self: Any) -> Any:
    own = self.collect_grads()
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in own]))
    for grad in own:
        grad.mul_(0.1 / max(float(norm), 0.1))
    return hand_over(self)


def _all_split(norm: Any, self: Any, tensors: Any) -> torch.Tensor:
    self._split = [True] * len(self._split)
    return norm(self, tensors)


def _clipped_twice(multiply: Any, self: Any, factor: torch.Tensor) -> None:
    multiply(self, factor)
    multiply(self, factor)


def _always(original: Any, *args: Any) -> bool:
    return True


def _another_epsilon(build: Any, groups: Any, settings: Any) -> Any:
    return build(groups, replace(settings, adam_eps=1e-3))


@contextmanager
def _epsilon_in_the_update() -> Iterator[None]:
    good = torch.optim.AdamW

    def step(self: Any, closure: Any = None) -> Any:
        before = [group["eps"] for group in self.param_groups]
        for group in self.param_groups:
            group["eps"] = 1e-3
        try:
            return good.step(self, closure)
        finally:
            for group, eps in zip(self.param_groups, before, strict=True):
                group["eps"] = eps

    kind = type("AdamW", (good,), {"step": step})
    with mock.patch.object(optimizer.torch.optim, "AdamW", kind):
        yield


def _no_copy(copy_to_model: Any, self: Any) -> None:
    return None


FAULTS: dict[str, Fault] = {
    "labels shifted": Fault(_changed(feed, "collate", _labels_shifted), stages.DATA, "labels"),
    "first token masked": Fault(_changed(feed, "collate", _first_token_masked), stages.DATA, "loss_mask"),
    "micro-batches of the first process": Fault(
        _changed(setup, "sample_order", _samples_of_the_first), stages.DATA, "tokens", processes=2
    ),
    "another seed": Fault(
        _changed(setup, "initial_weights", _another_seed), stages.WEIGHTS, "decoder.layers.1.mlp.linear_fc1.weight"
    ),
    "replica that drifts": Fault(
        _changed(setup, "build_parallel_model", _a_replica_drifts),
        stages.WEIGHTS,
        "decoder.final_layernorm.weight",
        processes=2,
    ),
    "schedule off": Fault(_changed(LearningRateSchedule, "__call__", _one_step_late), stages.SCHEDULE, "lr"),
    "bias given weight decay": Fault(
        _changed(optimizer, "is_decayed", _always),
        stages.SCHEDULE,
        "weight decay of decoder.layers.0.input_layernorm.bias",
    ),
    "rope base": Fault(
        _changed(positions, "inverse_frequencies", _another_base), stages.FORWARD, "rotary cosine", "llama"
    ),
    "norm epsilon in the kernel": Fault(
        _changed(norms.Norm, "forward", _epsilon_in_the_kernel), stages.FORWARD, "decoder.layers.0.input_layernorm"
    ),
    "norm epsilon of the module": Fault(
        _changed(norms.Norm, "__init__", _epsilon_of_the_module), stages.FEATURES, "model.layernorm_epsilon"
    ),
    "softmax in low precision": Fault(
        _changed(attention, "core_attention", _low_softmax), stages.FORWARD, "decoder.layers.0.self_attention"
    ),
    "products in low precision": Fault(
        _changed(sys.modules["lockstep.models.layers"], "linear", _low_products),
        stages.FORWARD,
        "decoder.layers.0.self_attention.linear_qkv",
    ),
    "last key always seen": Fault(
        _changed(sys.modules["lockstep.models.mask"], "hidden_positions", _no_mask), stages.FORWARD, "attention mask"
    ),
    "all-ones attention mask": Fault(
        _changed(sys.modules["lockstep.models.mask"], "hidden_positions", _all_seen), stages.FORWARD, "attention mask"
    ),
    "query and key swapped": Fault(
        _changed(attention, "core_attention", _query_and_key_swapped),
        stages.FORWARD,
        "decoder.layers.0.self_attention",
    ),
    "missing sum in the forward pass": Fault(
        _changed(modules.RowParallelLinear, "product", _product_not_added),
        stages.FORWARD,
        "decoder.layers.0.self_attention",
        layout=TENSOR,
        processes=2,
    ),
    "one process is off": Fault(
        _changed(modules.RowParallelLinear, "product", _one_process_is_off),
        stages.FORWARD,
        "decoder.layers.0.self_attention",
        layout=TENSOR,
        processes=2,
    ),
    "tokens counted twice": Fault(
        _changed(passes, "masked_sum", _every_token_counts_double), stages.LOSS, "valid tokens"
    ),
    "wrong divisor": Fault(_changed(TrainStep, "__init__", _two_replicas_assumed), stages.LOSS, "divisor"),
    "activation's backward": Fault(
        _changed(mlp._FusedActivation, "backward", _scaled_in_backward),
        stages.GRADIENTS,
        "decoder.layers.1.mlp.linear_fc1.weight",
    ),
    "last micro-batch alone": Fault(
        _changed(GradientBuckets, "_accumulate", _overwritten),
        stages.REDUCED,
        "embedding.position_embeddings.weight",
    ),
    "missing all-reduce over tensor parallel": Fault(
        _changed(gradients, "_is_partial", _never),
        stages.REDUCED,
        "embedding.position_embeddings.weight",
        layout=SEQUENCE,
        processes=2,
    ),
    "missing all-reduce over data parallel": Fault(
        _changed(Bucket, "reduce", _not_added), stages.REDUCED, "embedding.position_embeddings.weight", processes=2
    ),
    "missing sum of tied embeddings": Fault(
        _changed(gradients, "is_tied", _never),
        stages.REDUCED,
        "embedding.word_embeddings.weight",
        layout=PIPELINE,
        processes=2,
    ),
    "clip before reduce": Fault(
        _changed(MainWeights, "hand_over", _clipped_first),
        stages.REDUCED,
        "embedding.position_embeddings.weight",
        processes=2,
    ),
    "norm counts whole parameters twice": Fault(
        _changed(Gradients, "norms", _all_split), stages.NORM, "gradient norm", layout=TENSOR, processes=2
    ),
    "clipped twice": Fault(
        _changed(optimizer.WideGradients, "multiply", _clipped_twice),
        stages.CLIPPED,
        "embedding.position_embeddings.weight",
    ),
    "Adam's epsilon of the group": Fault(
        _changed(optimizer, "_build", _another_epsilon), stages.FEATURES, "optimizer.adam_eps"
    ),
    "Adam's epsilon in the update": Fault(
        _epsilon_in_the_update, stages.UPDATE, "embedding.position_embeddings.weight"
    ),
    "weights not sent on": Fault(
        _changed(ShardedMainWeights, "copy_to_model", _no_copy),
        stages.AFTER,
        "embedding.position_embeddings.weight",
        layout=SHARDED,
        processes=2,
    ),
}


def job_of(name: str | None, folder: Path, start: Path, kind: str = "gpt") -> Job:
    """Return the job of the side with a fault, or with None of the clean side of one process."""
    fault = None if name is None else FAULTS[name]
    kind = kind if fault is None else fault.kind
    tree = config({**KINDS[kind], **(fault.layout if fault else {})}, fault.processes if fault else 1)
    return Job(tree, [1], str(folder), str(start))


def planted(name: str | None, job: Job) -> int:
    """Do a job with a fault planted, or with None without."""
    with ExitStack() as stack:
        if name is not None:
            stack.enter_context(FAULTS[name].plant())
        return probe(job)


if __name__ == "__main__":
    sys.exit(guarded(lambda: planted(sys.argv[1], Job.load(Path(sys.argv[2])))))
