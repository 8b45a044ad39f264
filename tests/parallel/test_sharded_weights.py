"""Weights sharded by fully_shard: the run of whole ones, and faults that a comparison with one process must see."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from lockstep.parallel.fsdp import local, rows_of
from lockstep.parallel.mesh import Axis, Mesh
from lockstep.training.setup import build_parallel_model
from tests.parallel import sweep
from tests.parallel.spawn import on_processes
from tests.parallel.test_gradient_sync import counted

_TWICE = next(case for case in sweep.CASES if case.name == "FSDP2 of gradients twice, recomputation")
_DATA = next(case for case in sweep.CASES if case.name == "DP4")
_PIPELINE = next(case for case in sweep.CASES if case.name == "PP2 interleaved x FSDP2, gradients once a step")
_CPU = torch.device("cpu")


def _gradients_averaged(model: Any, step: Any, optimizer: Any) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(2.0)


def _norm_over_instances_too(model: Any, step: Any, optimizer: Any) -> None:
    mesh = optimizer._gradients._mesh
    optimizer._gradients._mesh = dataclasses.replace(mesh, shards=mesh.replicas)


def _no_sum_over_instances(model: Any, step: Any, optimizer: Any) -> None:
    optimizer.weights._instances = Axis()


def _weights_of_the_step_before(model: Any, step: Any, optimizer: Any) -> None:
    """Keep whole weights over the update."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard = lambda: None  # type: ignore[method-assign]


def _evaluated_first(model: Any, step: Any, optimizer: Any) -> None:
    """Change nothing that counts: this is no fault."""
    batch = sweep.global_batch(sweep.configure({}, 1), 0)
    step._passes.evaluate(sweep.share(batch, 2, Axis(4, 0)), 2)


_FAULTS: dict[str, Callable[..., None]] = {
    "mean of gradients instead of their sum": _gradients_averaged,
    "norm counted over instances too": _norm_over_instances_too,
    "missing all-reduce over instances": _no_sum_over_instances,
    "whole weights not let go": _weights_of_the_step_before,
}


def _on_data(changes: dict[str, Any], dtype: torch.dtype = torch.float64) -> sweep.Outcome:
    """Run a job on four data-parallel processes."""
    return sweep.play(sweep.configure(changes, 4), sweep.mesh_of(_DATA), dtype)


def _everything() -> dict[str, Any]:
    """Run everything on four processes, in one start of them."""
    fsdp = {"dist.use_torch_fsdp2": True}
    config, mesh = sweep.configure(_TWICE.changes, 4), sweep.mesh_of(_TWICE)
    expected = sweep.play(sweep.configure({}, 1), Mesh())
    evaluated = sweep.play(config, mesh, sabotage=_evaluated_first)
    found: dict[str, Any] = {"zeros": (evaluated.zeros, expected.zeros)}
    found["evaluated"] = sweep.compare("GPT", "evaluated", evaluated, expected)
    found["faults"] = {
        name: sweep.compare("GPT", name, sweep.play(config, mesh, sabotage=fault), expected)
        for name, fault in _FAULTS.items()
    }
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        low = {f"mixed_precision.{name}": True}
        found[name] = _on_data(low, dtype), _on_data({**low, **fsdp}, dtype)
    few = {"model.kv_channels": 2, "model.qk_layernorm": True, "model.normalization": "RMSNorm"}
    alone = sweep.play(sweep.configure(few, 1), Mesh())
    found["few"] = sweep.compare("GPT", "few rows", _on_data({**few, **fsdp}), alone)
    found["pipeline"] = {
        when: counted({**_PIPELINE.changes, "run.gradient_sync": when}, 4, sweep.mesh_of(_PIPELINE))
        for when in ("micro-batch", "step")
    }
    model, _, _ = build_parallel_model(config, mesh, _CPU, torch.bfloat16)
    found["held"] = sum(local(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    found["stored"] = {str(p.dtype) for p in model.parameters()}
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_processes(_everything, 4)


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_planted_fault_is_seen(results, fault: str) -> None:
    assert any(not found["faults"][fault].passes for found in results)


def test_low_precision_starts_with_the_loss_of_whole_weights_and_goes_on_within_rounding(results) -> None:
    for found in results:
        plain, sharded = found["bf16"]
        assert plain.losses[0] == sharded.losses[0]
        assert plain.losses == pytest.approx(sharded.losses, rel=1e-6)
        assert plain.norms == pytest.approx(sharded.norms, rel=1e-6)


def test_steps_that_overflow_leave_the_weights_as_they_were(results) -> None:
    for found in results:
        plain, sharded = found["fp16"]  # the loss scale starts at its highest
        assert plain.norms[:-1] == sharded.norms[:-1] == [0.0, 0.0]
        assert all(torch.equal(plain.weights[name].float(), weight) for name, weight in sharded.weights.items())


def test_evaluation_between_steps_and_zeros_in_gradients(results) -> None:
    for found in results:
        assert found["evaluated"].passes
        counted, expected = found["zeros"]
        assert counted == pytest.approx(expected, rel=0.01)  # sums that cancel are zero or nearly so


def test_stages_of_a_pipeline_add_up_gradients_once_a_step(results) -> None:
    for found in results:  # two layers and what is left, once or in every micro-batch
        reductions = {when: counts["_reduce_scatter_base_"] for when, counts in found["pipeline"].items()}
        assert reductions["step"] == 3
        assert reductions["micro-batch"] >= 4 * 3


def test_some_processes_have_no_row_of_a_short_parameter(results) -> None:
    assert all(found["few"].passes for found in results)  # norms of heads have two rows


def test_a_process_keeps_its_rows_in_fp32(results) -> None:
    for found in results:
        assert found["held"] < 0.52  # two shards, and rows that do not divide
        assert found["stored"] == {"torch.float32"}


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 101])
def test_rows_are_those_of_torch_chunk(rows: int) -> None:
    parts = [slice(*rows_of(rows, Axis(4, rank))) for rank in range(4)]
    found = [torch.arange(rows)[part].tolist() for part in parts]
    assert [part for part in found if part] == [chunk.tolist() for chunk in torch.arange(rows).chunk(4)]
