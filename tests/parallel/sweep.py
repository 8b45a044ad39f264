"""The layout sweep: one training job in every layout, in float64, against one process.

Each case takes two steps of a tiny model and compares, with what one process found: every parameter's gradient in the
first step, put together from its parts; the gradient norm before clipping; and the weights after both steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.models import GPTModel
from lockstep.parallel.mesh import Axis, Mesh, build_mesh
from lockstep.parallel.plan import is_expert, shard_of
from lockstep.training.feed import Batch
from lockstep.training.optimizer import Optimizer
from lockstep.training.setup import build_parallel_model, build_passes
from lockstep.training.step import TrainStep
from tests.parallel.spawn import on_processes

LIMIT = 1e-10
_STEPS = 2
_LENGTH = 16

_JOB: dict[str, Any] = {
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "model.num_attention_heads": 8,
    "model.num_query_groups": 4,
    "model.ffn_hidden_size": 48,
    "model.seq_length": _LENGTH,
    "model.vocab_size": 101,  # no layout divides it
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.use_cpu_initialization": True,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 8,
    "train.train_iters": _STEPS,
    "optimizer.lr": 1e-2,
    "optimizer.clip_grad": 0.1,
    "logger.log_num_zeros_in_grad": True,
    "tokenizer.tokenizer_type": "NullTokenizer",
    "tokenizer.vocab_size": 100,
}
_LLAMA: dict[str, Any] = {
    "model.gated_linear_unit": True,
    "model.activation_func": "silu",
    "model.normalization": "RMSNorm",
    "model.add_bias_linear": False,
    "model.position_embedding_type": "rope",
    "model.share_embeddings_and_output_weights": False,
    "model.qk_layernorm": True,
    "model.calculate_per_token_loss": True,
}
GATED_ROUTER: dict[str, Any] = {
    "model.moe_shared_expert_intermediate_size": 16,
    "model.moe_shared_expert_gate": True,
    "model.moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "model.moe_aux_loss_coeff": [0.1, 0.2],
    "model.moe_z_loss_coeff": 0.1,
    "model.moe_router_score_function": "sigmoid",
    "model.moe_router_enable_expert_bias": True,
}
"""A gated shared expert, sigmoid scores with a bias of each expert, and every loss of a router."""
_EXPERTS: dict[str, Any] = {
    **_LLAMA,
    "model.calculate_per_token_loss": False,
    "model.num_moe_experts": 4,
    "model.moe_ffn_hidden_size": 16,
    "model.moe_layer_freq": "[0]+[1]*3",
    **GATED_ROUTER,
}
_LATENTS: dict[str, Any] = {
    **_LLAMA,
    "model.num_query_groups": 8,
    "model.multi_latent_attention": True,
    "model.kv_lora_rank": 12,
    "model.qk_head_dim": 6,
    "model.qk_pos_emb_head_dim": 4,
    "model.v_head_dim": 5,
    "model.rotary_scaling_factor": 40.0,
    "model.mscale_all_dim": 0.707,
}
_WITH_QUERY_LATENT: dict[str, Any] = {**_LATENTS, "model.q_lora_rank": 10}
_DEEPSEEK: dict[str, Any] = {
    **_LATENTS,
    "model.calculate_per_token_loss": False,
    "model.num_moe_experts": 4,
    "model.moe_ffn_hidden_size": 16,
    "model.moe_layer_freq": "[0]+[1]*3",
    "model.moe_shared_expert_intermediate_size": 16,
    "model.moe_router_load_balancing_type": ["seq_aux_loss"],
    "model.moe_aux_loss_coeff": [0.1],
    "model.moe_router_pre_softmax": True,
}


@dataclass(frozen=True)
class Case:
    """A layout of some processes and what it changes in the job."""

    name: str
    processes: int
    changes: dict[str, Any] = field(default_factory=dict)


def _tensor(size: int, sequence: bool = False) -> dict[str, Any]:
    return {"model.tensor_model_parallel_size": size, "model.sequence_parallel": sequence}


def _pipeline(size: int, chunks: int | None = None) -> dict[str, Any]:
    return {"model.pipeline_model_parallel_size": size, "model.virtual_pipeline_model_parallel_size": chunks}


def _context(size: int) -> dict[str, Any]:
    return {"model.context_parallel_size": size}


def _expert(size: int, dispatcher: str = "alltoall") -> dict[str, Any]:
    return {"model.expert_model_parallel_size": size, "model.moe_token_dispatcher_type": dispatcher}


_WHOLE = {"model.expert_tensor_parallel_size": 1}
_UNEVEN = {"model.num_layers_in_first_pipeline_stage": 1}
_SHARDED = {"ddp.use_distributed_optimizer": True}
_OVERLAP = {"ddp.overlap_grad_reduce": True, "ddp.bucket_size": 5000}
_OVERLAP_BOTH = {**_SHARDED, **_OVERLAP, "ddp.overlap_param_gather": True}
_FSDP = {"dist.use_torch_fsdp2": True}
_FSDP_GRADS = {"dist.use_megatron_fsdp": True, "ddp.data_parallel_sharding_strategy": "optim_grads"}
_ONCE_A_STEP = {"run.gradient_sync": "step"}
_TWICE = {"ddp.num_distributed_optimizer_instances": 2}
_UNIFORM = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 2,
}
_SELECTIVE = {
    "model.recompute_granularity": "selective",
    "model.recompute_modules": ["core_attn", "layernorm", "mlp"],
}
_DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}

CASES: tuple[Case, ...] = (
    Case("DP2", 2),
    Case("DP4", 4),
    Case("TP2", 2, _tensor(2)),
    Case("TP2+SP", 2, _tensor(2, True)),
    Case("TP4", 4, _tensor(4)),
    Case("TP4+SP", 4, _tensor(4, True)),
    Case("TP2 x DP2", 4, _tensor(2)),
    Case("TP2+SP x DP2", 4, _tensor(2, True)),
    Case("sharded DP2", 2, _SHARDED),
    Case("sharded DP4", 4, _SHARDED),
    Case("TP2 x sharded DP2", 4, {**_tensor(2), **_SHARDED}),
    Case("TP2+SP x sharded DP2", 4, {**_tensor(2, True), **_SHARDED}),
    Case("TP2, dropout", 2, {**_tensor(2), **_DROPOUT}),
    Case("TP2+SP, dropout", 2, {**_tensor(2, True), **_DROPOUT}),
    Case("TP2, recomputation, dropout", 2, {**_tensor(2), **_SELECTIVE, **_DROPOUT}),
    Case("TP2+SP, recomputation", 2, {**_tensor(2, True), **_SELECTIVE}),
    Case("TP4+SP, dropout", 4, {**_tensor(4, True), **_DROPOUT}),
    Case("CP2", 2, _context(2)),
    Case("CP2, dropout", 2, {**_context(2), **_DROPOUT}),
    Case("CP2, recomputation", 2, {**_context(2), **_SELECTIVE}),
    Case("CP4", 4, _context(4)),
    Case("CP2 x TP2+SP", 4, {**_context(2), **_tensor(2, True)}),
    Case("CP2 x TP2+SP, dropout", 4, {**_context(2), **_tensor(2, True), **_DROPOUT}),
    Case("CP2 x DP2", 4, _context(2)),
    Case("CP2 x sharded DP2", 4, {**_context(2), **_SHARDED}),
    Case("CP2 x PP2", 4, {**_context(2), **_pipeline(2)}),
    Case("PP2", 2, _pipeline(2)),
    Case("PP2 interleaved", 2, _pipeline(2, 2)),
    Case("PP2 uneven", 2, {**_pipeline(2), **_UNEVEN}),
    Case("PP2, recomputation", 2, {**_pipeline(2), **_SELECTIVE}),
    Case("PP4", 4, _pipeline(4)),
    Case("PP2 x DP2", 4, _pipeline(2)),
    Case("PP2 x sharded DP2", 4, {**_pipeline(2), **_SHARDED}),
    Case("PP2 interleaved x TP2+SP", 4, {**_pipeline(2, 2), **_tensor(2, True)}),
    Case("FSDP2", 2, _FSDP),
    Case("FSDP2, recomputation", 2, {**_FSDP, **_UNIFORM}),
    Case("FSDP2 of gradients", 2, _FSDP_GRADS),
    Case("FSDP4", 4, _FSDP),
    Case("FSDP2 twice", 4, {**_FSDP, **_TWICE}),
    Case("FSDP2 of gradients twice, recomputation", 4, {**_FSDP_GRADS, **_TWICE, **_SELECTIVE}),
    Case("sharded DP2 twice", 4, {**_SHARDED, **_TWICE}),
    Case("TP2+SP x FSDP2", 4, {**_tensor(2, True), **_FSDP}),
    Case("PP2 x FSDP2", 4, {**_pipeline(2), **_FSDP}),
    Case("PP2 interleaved x FSDP2, recomputation", 4, {**_pipeline(2, 2), **_FSDP, **_UNIFORM}),
    Case("PP2 x FSDP2 of gradients", 4, {**_pipeline(2), **_FSDP_GRADS}),
    Case("FSDP2, gradients once a step", 2, {**_FSDP, **_ONCE_A_STEP}),
    Case("TP2+SP x FSDP2, gradients once a step", 4, {**_tensor(2, True), **_FSDP, **_ONCE_A_STEP}),
    Case("PP2 interleaved x FSDP2, gradients once a step", 4, {**_pipeline(2, 2), **_FSDP, **_ONCE_A_STEP}),
    Case("sharded DP2 twice, overlap", 4, {**_OVERLAP_BOTH, **_TWICE}),
    Case("PP2 x TP2", 4, {**_pipeline(2), **_tensor(2)}),
    Case("DP2, overlap", 2, _OVERLAP),
    Case("sharded DP2, overlap", 2, _OVERLAP_BOTH),
    Case("EP2", 2, _expert(2)),
    Case("EP2 by all-gather", 2, _expert(2, "allgather")),
    Case("EP2, recomputation", 2, {**_expert(2), **_UNIFORM}),
    Case("CP2 x EP2", 2, {**_context(2), **_expert(2)}),
    Case("EP4", 4, _expert(4)),
    Case("CP2 x EP4 by all-gather", 4, {**_context(2), **_expert(4, "allgather")}),
    Case("EP2 x TP2+SP", 4, {**_expert(2), **_tensor(2, True)}),
    Case("EP2 x TP2 by all-gather", 4, {**_expert(2, "allgather"), **_tensor(2)}),
    Case("EP2 x PP2 interleaved", 4, {**_expert(2), **_pipeline(2, 2)}),
    Case("EP2 x DP2", 4, _expert(2)),
    Case("EP2 x sharded DP2, overlap", 4, {**_expert(2), **_OVERLAP_BOTH}),
    Case("EP2 x FSDP2", 2, {**_expert(2), **_FSDP}),
    Case("EP2 x FSDP4, recomputation", 4, {**_expert(2), **_FSDP, **_UNIFORM}),
    Case("EP2 x FSDP4 of gradients, once a step", 4, {**_expert(2), **_FSDP_GRADS, **_ONCE_A_STEP}),
    Case("EP2 x PP2 interleaved x FSDP2, once a step", 4, {**_expert(2), **_pipeline(2, 2), **_FSDP, **_ONCE_A_STEP}),
    Case("EP2 x TP2+SP x FSDP2", 4, {**_expert(2), **_tensor(2, True), **_FSDP}),
    Case("CP2 x EP4 x FSDP4", 4, {**_context(2), **_expert(4), **_FSDP}),
    Case("ETP1 x TP2+SP", 2, {**_tensor(2, True), **_WHOLE}),
    Case("EP2 x ETP1 x TP2+SP", 2, {**_expert(2), **_tensor(2, True), **_WHOLE}),
    Case("EP2 x ETP1 x TP2+SP x sharded DP2", 4, {**_expert(2), **_tensor(2, True), **_WHOLE, **_SHARDED}),
    Case("EP4 x ETP1 x TP2+SP x CP2", 4, {**_expert(4, "allgather"), **_tensor(2, True), **_WHOLE, **_context(2)}),
)
KINDS: dict[str, dict[str, Any]] = {
    "GPT": {},
    "Llama-like": _LLAMA,
    "experts": _EXPERTS,
    "latents": _WITH_QUERY_LATENT,
    "DeepSeek-like": _DEEPSEEK,
}
# The other layouts do to these models what they do to the ones above.
_OF_EXPERTS = (
    "DP2",
    "TP2",
    "TP2+SP",
    "CP2",
    "CP2 x TP2+SP",
    "CP2 x PP2",
    "sharded DP2",
    "PP2",
    "PP2 interleaved",
    "PP2, recomputation",
    "TP2+SP x DP2",
    "PP2 x DP2",
    "FSDP4",
    "PP2 interleaved x TP2+SP",
)
_OF_LATENTS = ("TP2", "TP2+SP", "TP2+SP, recomputation", "CP2 x TP2+SP, dropout", "TP2+SP x sharded DP2")
_OF_DEEPSEEK = ("TP2", "PP2", "TP2+SP x DP2", "FSDP4")
_ONLY = {"experts": _OF_EXPERTS, "latents": _OF_LATENTS, "DeepSeek-like": _OF_DEEPSEEK}


def takes_part(kind: str, case: Case) -> bool:
    """Tell whether a kind of model is run in a layout."""
    if _of_experts(case):
        return kind == "experts"
    return kind not in _ONLY or case.name in _ONLY[kind]


def _of_experts(case: Case) -> bool:
    return any(path.startswith("model.expert_") for path in case.changes)


@dataclass(frozen=True)
class Outcome:
    """What a job found, on logical parameters.

    Attributes:
        grads: gradients of the first step.
        norms: gradient norms before clipping and losses of routers, then the norm of the final weights.
        weights: final weights, and biases of experts.
        zeros: gradient elements that are zero, by step.
        losses: losses by step.
    """

    grads: dict[str, torch.Tensor]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    zeros: list[int]
    losses: list[float]


@dataclass(frozen=True)
class Row:
    """Largest relative differences from one process; each parameter's is relative to its largest element."""

    kind: str
    layout: str
    grads: float
    norm: float
    weights: float

    @property
    def passes(self) -> bool:
        """Whether all differences are below the limit."""
        return max(self.grads, self.norm, self.weights) < LIMIT


def configure(changes: dict[str, Any], processes: int) -> ConfigContainer:
    """Return the resolved configuration of the job with changes by dotted path."""
    config = ConfigContainer()
    for path, value in {**_JOB, **changes}.items():
        config.set(path, value, Origin("python"))
    return resolve(config, world_size=processes)


def global_batch(config: ConfigContainer, step: int) -> Batch:
    """Return random samples with a different number of valid tokens in each."""
    samples = config.train.global_batch_size or 0
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, 100, (samples, _LENGTH + 1), generator=generator)
    valid = torch.arange(samples)[:, None] * 7 % _LENGTH + 1
    positions = torch.arange(_LENGTH).expand(samples, _LENGTH)
    return Batch(text[:, :-1], text[:, 1:], (positions < valid).float(), positions)


def share(batch: Batch, micro_batch_size: int, dp: Axis) -> Batch:
    """Return the micro-batches of one data-parallel process."""
    mine = list(batch.split(micro_batch_size))[dp.rank :: dp.size]
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return Batch(**{name: torch.cat([getattr(part, name) for part in mine]) for name in names})


def play(
    config: ConfigContainer,
    mesh: Mesh,
    dtype: torch.dtype = torch.float64,
    sabotage: Callable[[GPTModel, TrainStep, Optimizer], None] | None = None,
    feed: Callable[[Batch, int, Axis], Batch] = share,
) -> Outcome:
    """Take the steps of a job in one layout; ``sabotage`` and ``feed`` are for tests that plant a fault."""
    device = torch.device("cpu")
    model, spans, _ = build_parallel_model(config, mesh, device, dtype)
    optimizer = Optimizer(model, config, mesh)
    passes = build_passes(config, model, spans, mesh, device)
    step = TrainStep(passes, optimizer, per_token=config.model.calculate_per_token_loss, dp=mesh.dp)
    if sabotage is not None:
        sabotage(model, step, optimizer)
    grads: dict[str, torch.Tensor] = {}
    norms, zeros, losses = [], [], []
    micro = config.train.micro_batch_size or 1
    for number in range(_STEPS):
        result = step(feed(global_batch(config, number), micro, mesh.dp), micro, 1e-2, 0.01)
        norms += [result.grad_norm or 0.0, *result.router_losses.values()]
        zeros.append(result.num_zeros or 0)
        losses.append(result.lm_loss)
        if number == 0:
            # Clipping has scaled them; the norm brings back their size.
            factor = max(1.0, (norms[0] + 1e-6) / config.optimizer.clip_grad)
            grads = logical({name: grad * factor for name, grad in _grads(optimizer, mesh).items()}, config, mesh)
    weights = logical({name: _all_rows(tensor) for name, tensor in model.state_dict().items()}, config, mesh)
    return Outcome(grads, [*norms, float(optimizer.params_norm())], weights, zeros, losses)


def _grads(optimizer: Optimizer, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter that this process has, put together from the pieces of all."""
    weights = optimizer.weights
    assert optimizer.grads is not None, "a step has been taken"
    grads = list(optimizer.grads)
    if not weights.sharded:
        return dict(zip(weights.main_names, grads, strict=True))
    found = {
        name: torch.zeros(p.numel(), dtype=p.dtype) for name, p in zip(weights.names, weights.model_params, strict=True)
    }
    own = list(zip(weights.main_names, weights.main_spans, grads, strict=True))
    for axis in (mesh.replicas, mesh.expert_replicas):
        pieces: list[Any] = [own] * axis.size
        if axis.group is not None:
            dist.all_gather_object(pieces, own, group=axis.group)
        for name, span, grad in (piece for part in pieces for piece in part):
            if is_expert(name) == (axis is mesh.expert_replicas) or not mesh.experts_apart:
                found[name][slice(*span)] = grad.flatten()
    return {name: found[name].view_as(p) for name, p in zip(weights.names, weights.model_params, strict=True)}


def _all_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor of which a sharded one has some rows."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def logical(tensors: dict[str, torch.Tensor], config: ConfigContainer, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Return the tensors of the parameters of one process, put together from the parts of all."""
    whole = {}
    parts: list[Any]
    for name, tensor in tensors.items():
        shard = shard_of(name, config.model)
        if mesh.tp.size == 1 or shard is None:
            whole[name] = tensor.clone()
            continue
        parts = [None] * mesh.tp.size
        dist.all_gather_object(parts, tensor, group=mesh.tp.group)
        whole[name] = shard.whole(parts)
    for axis in (mesh.ep, mesh.pp):
        if axis.size > 1:
            parts = [None] * axis.size
            dist.all_gather_object(parts, whole, group=axis.group)
            whole = {name: tensor for part in parts for name, tensor in part.items()}
    return whole


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any tensor, relative to its largest element; infinite if names differ."""
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return float("inf")
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-300)) for n in b)


def compare(kind: str, layout: str, found: Outcome, expected: Outcome) -> Row:
    """Measure an outcome against that of one process."""
    norm = max(abs(x - y) / y for x, y in zip(found.norms, expected.norms, strict=True))
    grads, weights = difference(found.grads, expected.grads), difference(found.weights, expected.weights)
    return Row(kind, layout, grads, norm, weights)


def mesh_of(case: Case) -> Mesh:
    """Return the mesh of a case that takes all processes of the default group."""
    config = configure({**(_EXPERTS if _of_experts(case) else {}), **case.changes}, case.processes)
    return build_mesh(config.model, "cpu", instances=config.ddp.num_distributed_optimizer_instances)


def run_cases(cases: Sequence[Case]) -> list[Row]:
    """Run, on every process of the default group, the cases that take all of them; return the rows."""
    mine = [(case, mesh_of(case)) for case in cases if case.processes == dist.get_world_size()]
    rows = []
    for kind, changes in KINDS.items():
        alone = {on: play(configure({**changes, **(_DROPOUT if on else {})}, 1), Mesh()) for on in (False, True)}
        for case, mesh in mine:
            if not takes_part(kind, case):
                continue
            expected = alone["model.hidden_dropout" in case.changes]
            config = configure({**changes, **case.changes}, case.processes)
            rows.append(compare(kind, case.name, play(config, mesh), expected))
    return rows


def sweep_rows() -> list[Row]:
    """Run all cases of the present number of processes."""
    return run_cases(CASES)


def sweep() -> list[Row]:
    """Start the processes, run every case and return its worst row over the processes."""
    rows: list[Row] = []
    for processes in sorted({case.processes for case in CASES}):
        for found in zip(*on_processes(sweep_rows, processes), strict=True):
            worst = {key: max(getattr(row, key) for row in found) for key in ("grads", "norm", "weights")}
            rows.append(Row(found[0].kind, found[0].layout, **worst))
    return sorted(rows, key=lambda row: list(KINDS).index(row.kind))
