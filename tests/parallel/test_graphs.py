"""Micro-batches as graphs on several processes: bit for bit what the passes without them find."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lockstep.models.router import Router
from lockstep.parallel import Mesh
from lockstep.training.graphs import Graph, GraphedPasses
from lockstep.training.optimizer import Optimizer
from lockstep.training.passes import WholePasses
from lockstep.training.setup import build_parallel_model, build_passes
from lockstep.training.sharded import ShardedMainWeights
from lockstep.training.step import StepResult, TrainStep
from tests.parallel import sweep
from tests.parallel.spawn import on_processes
from tests.training.test_graphs import Job, capture_again

CPU = torch.device("cpu")
_STEPS = 4
_LOW = {"mixed_precision.bf16": True, "ddp.grad_reduce_in_fp32": False}
_CHANGES = {case.name: case.changes for case in sweep.CASES}
_GATHERING = {**_CHANGES["EP2, recomputation"], **_CHANGES["EP2 by all-gather"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "EP2": ("experts", _GATHERING),
    "EP2, sharded DP2, overlap, BF16": ("experts", {**_GATHERING, **_CHANGES["sharded DP2, overlap"], **_LOW}),
    "DeepSeek-like, EP2, sharded DP2": ("DeepSeek-like", {**_GATHERING, **_CHANGES["sharded DP2"]}),
    "DP2, overlap": ("Llama-like", _CHANGES["DP2, overlap"]),
    "EP2 x ETP1 x TP2+SP": ("experts", {**_CHANGES["EP2 x ETP1 x TP2+SP"], **_CHANGES["EP2 by all-gather"]}),
}


class _Run:
    """The steps of a job, and what was seen between them."""

    def __init__(self, kind: str, changes: dict[str, Any], mesh: Mesh, graphs: bool) -> None:
        config = sweep.configure({**sweep.KINDS[kind], **changes}, 2)
        dtype = torch.bfloat16 if config.mixed_precision.bf16 else torch.float64
        self.model, spans, _ = build_parallel_model(config, mesh, CPU, dtype)
        self.optimizer = Optimizer(self.model, config, mesh)
        passes = build_passes(config, self.model, spans, mesh, CPU)
        self.jobs = 0
        if graphs:
            assert isinstance(passes, WholePasses)
            passes = GraphedPasses(passes, self.optimizer.weights, self._capture)
        step = TrainStep(passes, self.optimizer, per_token=config.model.calculate_per_token_loss, dp=mesh.dp)
        micro = config.train.micro_batch_size or 1
        self.results: list[StepResult] = []
        self.addresses: list[list[int]] = []
        for number in range(_STEPS):
            batch = sweep.share(sweep.global_batch(config, number), micro, mesh.dp)
            self.results.append(step(batch, micro, 1e-2, 0.01))
            held = [*self.model.parameters(), *self.model.buffers()]
            views = self.optimizer.weights.gradients.collected()
            self.addresses.append([tensor.data_ptr() for tensor in (*held, *views)])
        self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.biases = [
            r.expert_bias for r in self.model.modules() if isinstance(r, Router) and r.expert_bias is not None
        ]

    def _capture(self, job: Job) -> tuple[Graph, list[torch.Tensor]]:
        """Stand for a capture, in which nothing may wait for what began outside, or begin what ends outside."""
        weights, gradients = self.optimizer.weights, self.optimizer.weights.gradients

        def watched() -> Sequence[torch.Tensor]:
            if isinstance(weights, ShardedMainWeights):
                assert not any(each._work for each in weights._weights), "weights are on their way"
            arrived = dict(gradients._arrived)
            found = job()
            gradients._arrived = arrived  # A graph calls no hooks.
            assert not any(bucket.started for bucket in gradients.buckets), "a bucket was started"
            self.jobs += 1
            return found

        return capture_again(watched)


def compared(kind: str, changes: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return how a run of graphs differs from one without."""
    plain, graphed = (_Run(kind, changes, mesh, graphs) for graphs in (False, True))
    return {
        "results": (graphed.results, plain.results),
        "weights": [name for name, x in plain.weights.items() if not torch.equal(x, graphed.weights[name])],
        "biases": [bool(bias.any()) for bias in graphed.biases],
        "addresses": graphed.addresses,
        "jobs": graphed.jobs,
    }


def _all() -> dict[str, Any]:
    found = {}
    for name, (kind, changes) in CASES.items():
        mesh = sweep.mesh_of(sweep.Case(name, 2, {**sweep.KINDS[kind], **changes}))
        found[name] = compared(kind, changes, mesh)
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_processes(_all, 2)


@pytest.mark.parametrize("name", CASES)
def test_steps_of_graphs_are_those_without(results, name: str) -> None:
    for found in (of_rank[name] for of_rank in results):
        graphed, plain = found["results"]
        assert graphed == plain
        assert len({result.loss_sum for result in plain}) == _STEPS
        assert not found["weights"]
        assert found["jobs"] == (_STEPS - 1) * len(plain[0].ledger.loss_sums) // plain[0].ledger.ranks


def test_routers_note_the_same(results) -> None:
    for found in results:
        graphed, _ = found["EP2"]["results"]
        assert set(graphed[-1].router_losses) == {"load_balancing_loss", "seq_load_balancing_loss", "z_loss"}
        assert found["EP2"]["biases"] == [True] * 3


@pytest.mark.parametrize("name", CASES)
def test_weights_and_gradients_stay_where_they_are(results, name: str) -> None:
    for found in results:
        first, *later = found[name]["addresses"]
        assert later == [first] * (_STEPS - 1)
