"""Adapters in every layout against one process in float64, and faults that the comparison must see."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lockstep.models import DropoutStreams
from lockstep.parallel.mesh import Mesh, build_mesh
from lockstep.peft.apply import adapters, is_adapter
from tests.parallel import sweep
from tests.parallel.spawn import on_processes

_BASE: dict[str, Any] = {
    "checkpoint.pretrained_checkpoint": "unread",
    "peft.dim": 6,
    "peft.alpha": 9,
    "peft.lora_B_init_method": "normal",
}
_LORA = {**_BASE, **sweep.KINDS["Llama-like"], "peft.scheme": "lora"}
_CANONICAL = {
    **_LORA,
    "peft.scheme": "dora",
    "peft.target_modules": [
        "linear_q",
        "*.layers.1.*.linear_v",
        "*.layers.3.*.linear_k",
        "linear_proj",
        "linear_fc1_up",
    ],
    "model.add_qkv_bias": True,
}
_DORA = {**_LORA, "peft.scheme": "dora"}
_LATENTS = {
    **_BASE,
    **sweep.KINDS["latents"],
    "peft.scheme": "dora",
    "peft.target_modules": ["*.linear_q_*_proj", "*.linear_kv_*_proj", "linear_proj", "linear_fc2"],
}
_EXPERTS = {**_BASE, **sweep.KINDS["experts"], "peft.scheme": "lora", "model.moe_router_enable_expert_bias": False}
_OWN_EXPERTS = {**_EXPERTS, "peft.scheme": "dora", "peft.share_expert_adapters": False}
_RECOMPUTED = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}
_DROPS = {**_DORA, "peft.dropout": 0.25}
_DROPS_OUTPUTS = {**_LORA, "peft.dropout": 0.25, "peft.dropout_position": "post", "model.hidden_dropout": 0.1}
_LAST_LAYER = {**_LORA, "peft.target_modules": ["*.layers.2.*.linear_fc1", "*.layers.1.*.linear_qkv"]}
KINDS = {
    "lora": _LORA,
    "canonical": _CANONICAL,
    "dora": _DORA,
    "latents": _LATENTS,
    "experts": _EXPERTS,
    "own experts": _OWN_EXPERTS,
    "dropout": _DROPS,
    "dropout of outputs": _DROPS_OUTPUTS,
    "two layers": _LAST_LAYER,
}

_TP = {"model.tensor_model_parallel_size": 2}
_TP_SP = {**_TP, "model.sequence_parallel": True}
_PP = {"model.pipeline_model_parallel_size": 2}
_SHARDED = {"ddp.use_distributed_optimizer": True}
_FSDP = {"dist.use_torch_fsdp2": True}
_EP = {"model.expert_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process, recomputation": _RECOMPUTED,
    "TP2": _TP,
    "TP2+SP": _TP_SP,
    "TP2+SP, recomputation": {**_TP_SP, **_RECOMPUTED},
    "PP2": _PP,
    "PP2, recomputation": {**_PP, **_RECOMPUTED},
    "sharded DP2": _SHARDED,
    "sharded DP2, overlap": {**_SHARDED, "ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True},
    "FSDP2": _FSDP,
    "CP2": {"model.context_parallel_size": 2},
    "EP2": _EP,
    "EP2, all-gather": {**_EP, "model.moe_token_dispatcher_type": "allgather"},
}


def _takes_part(kind: str, layout: str) -> bool:
    if layout.startswith("EP2"):
        return "experts" in kind
    if "dropout" in kind:  # other data-parallel processes and stages draw other masks
        return layout.startswith(("one", "TP2", "CP2"))
    if kind == "two layers":
        return layout in ("PP2", "FSDP2", "PP2, recomputation")
    return True


def _outcome(kind: str, layout: str, sabotage: Callable[..., None] | None = None) -> sweep.Outcome:
    processes = 1 if layout.startswith("one") else 2
    config = sweep.configure({**KINDS[kind], **LAYOUTS[layout]}, processes)
    mesh = build_mesh(config.model, "cpu") if processes == 2 else Mesh()
    return sweep.play(config, mesh, sabotage=sabotage)


def _alone(kind: str) -> sweep.Outcome:
    return sweep.play(sweep.configure(KINDS[kind], 1), Mesh())


def _rows() -> list[tuple[str, str, float, float, float]]:
    found = []
    for kind in KINDS:
        expected = _alone(kind)
        for layout in LAYOUTS:
            if _takes_part(kind, layout):
                row = sweep.compare(kind, layout, _outcome(kind, layout), expected)
                found.append((kind, layout, row.grads, row.norm, row.weights))
    return found


def _counted_twice(model: Any, step: Any, optimizer: Any) -> None:
    optimizer._gradients._split = [True] * len(optimizer._gradients._split)


def _no_partial(model: Any, step: Any, optimizer: Any) -> None:
    optimizer._gradients._partial = [False] * len(optimizer._gradients._partial)


def _masks_of_their_own(model: Any, step: Any, optimizer: Any) -> None:
    def drawn(streams: Any, shape: tuple[int, ...], probability: float) -> torch.Tensor:
        return DropoutStreams.dropped(streams, "hidden", shape, probability)

    for adapter in adapters(model):
        adapter.part.dropped_inputs = drawn  # type: ignore[method-assign]


def _lengths_of_parts(model: Any, step: Any, optimizer: Any) -> None:
    for adapter in adapters(model):
        adapter.part.total = lambda squares: squares  # type: ignore[method-assign]


FAULTS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "an adapter is counted twice in the norm": ("lora", "TP2", _counted_twice),
    "partial gradients are not added up": ("lora", "TP2+SP", _no_partial),
    "every process drops elements of its own": ("dropout", "TP2+SP", _masks_of_their_own),
    "DoRA takes the length of a part of a row": ("dora", "TP2", _lengths_of_parts),
}


def _job() -> tuple[list[tuple[str, str, float, float, float]], dict[str, tuple[float, float]]]:
    rows, seen = _rows(), {}
    for name, (kind, layout, fault) in FAULTS.items():
        row = sweep.compare(kind, layout, _outcome(kind, layout, fault), _alone(kind))
        seen[name] = (row.grads, row.norm)
    dist.barrier()
    return rows, seen


@pytest.mark.slow
def test_adapters_are_those_of_one_process_in_every_layout() -> None:
    found = on_processes(_job, 2)
    for rows, seen in found:
        wrong = [row for row in rows if not max(row[2:]) < sweep.LIMIT]
        assert not wrong
        assert {row[0] for row in rows} == set(KINDS)
        for name, (grads, norm) in seen.items():
            assert max(grads, norm) > 1e-6, name


def test_gradients_are_of_adapters_alone() -> None:
    outcome = _alone("canonical")
    assert outcome.grads
    assert all(is_adapter(name) for name in outcome.grads)
    assert all(bool(grad.abs().max() > 0) for grad in outcome.grads.values())
