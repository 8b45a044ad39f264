"""What processes do beside the reductions: their order, the check of their weights, time-outs."""

import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lockstep.errors import CommonError
from lockstep.parallel.mesh import Mesh, build_mesh
from lockstep.training.replicas import ReplicaCheck, TimeoutHook
from lockstep.training.setup import build_parallel_model
from tests.parallel import sweep
from tests.parallel.spawn import on_processes

_PIPELINE = {"model.pipeline_model_parallel_size": 2}
_BIAS = "decoder.layers.3.mlp.linear_fc2.bias"
_REPORT: Any = SimpleNamespace(iteration=4)


def _pipeline_first() -> dict[str, Any]:
    """Return the places of this process in both orders, and whether a job in the second is that of one process."""
    config = sweep.configure(_PIPELINE, 4)
    usual, other = (build_mesh(config.model, "cpu", pipeline_first=first) for first in (False, True))
    row = sweep.compare("", "", sweep.play(config, other), sweep.play(sweep.configure({}, 1), Mesh()))
    places = [(mesh.pp.rank, mesh.dp.rank, mesh.ends.rank) for mesh in (usual, other)]
    return {"places": places, "equal": row.passes}


def _weights_checked() -> list[str]:
    """Return what the check says of equal weights, in an iteration that it leaves out, and of others on rank 3."""
    config = sweep.configure(_PIPELINE, 4)
    mesh = build_mesh(config.model, "cpu")
    model, _, _ = build_parallel_model(config, mesh, torch.device("cpu"), torch.bfloat16)
    check = ReplicaCheck(model, mesh, interval=2)
    said = []
    for iteration, change in ((4, 0.0), (5, 0.5), (6, 0.0)):
        if mesh.world.rank == 3 and change:
            with torch.no_grad():
                dict(model.named_parameters())[_BIAS][0] += change
        try:
            check.after_step(SimpleNamespace(iteration=iteration))  # type: ignore[arg-type]
            said.append("")
        except CommonError as error:
            said.append(str(error))
    return said


def _time_out() -> str | None:
    """Return what a collective says that two processes come to too late, once the first iteration is done."""
    mesh = build_mesh(sweep.configure(_PIPELINE, 4).model, "cpu")
    hook = TimeoutHook(mesh, timedelta(seconds=1))
    hook.after_step(_REPORT)
    if mesh.dp.rank == 1:
        time.sleep(4)
        return None
    try:
        mesh.dp.sum_(torch.ones(1))
    except RuntimeError as error:
        return str(error)
    return "ended"


def _everything() -> dict[str, Any]:
    return {"order": _pipeline_first(), "weights": _weights_checked(), "time-out": _time_out()}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_processes(_everything, 4)


def test_ranks_run_along_the_pipeline_before_data_parallel(found: list[dict[str, Any]]) -> None:
    usual, other = zip(*(result["order"]["places"] for result in found), strict=True)
    assert list(usual) == [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]
    assert list(other) == [(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1)]
    assert all(result["order"]["equal"] for result in found)


def test_weights_that_differ_are_named_on_all_processes(found: list[dict[str, Any]]) -> None:
    for result in found:
        equal, left_out, different = result["weights"]
        assert (equal, left_out) == ("", "")
        assert different.startswith("iteration 6: the weights of rank 3 differ from those of rank 2, ")
        assert f"first in {_BIAS}" in different


def test_a_collective_fails_sooner_after_the_first_iteration(found: list[dict[str, Any]]) -> None:
    for rank in (0, 2):
        assert "Timed out" in found[rank]["time-out"]
