"""CUDA graphs: when they are chosen or refused, and that a step of graphs is a step."""

from collections.abc import Callable, Sequence

import pytest
import torch

from lockstep.config import Origin
from lockstep.errors import UserError
from lockstep.models import DropoutStreams, build_model
from lockstep.parallel import Mesh
from lockstep.parallel.mesh import Axis
from lockstep.training.feed import Batch
from lockstep.training.graphs import SMALL_OPERATIONS, GraphedPasses, choose_graphs
from lockstep.training.optimizer import Optimizer
from lockstep.training.passes import WholePasses
from lockstep.training.step import StepResult, TrainStep
from tests.training.test_attention import configured

Job = Callable[[], Sequence[torch.Tensor]]

CPU, GPU = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(
    ("device", "operations", "changes", "used", "reason"),
    [
        (GPU, SMALL_OPERATIONS, {}, True, "auto, micro-batches are small"),
        (GPU, 2 * SMALL_OPERATIONS, {}, False, "auto, micro-batches are large"),
        (CPU, 1.0, {}, False, "auto, on a CPU"),
        (GPU, 2 * SMALL_OPERATIONS, {"run__cuda_graphs": "micro-batches"}, True, "run.cuda_graphs=micro-batches"),
        (GPU, 1.0, {"run__cuda_graphs": "none"}, False, "run.cuda_graphs=none"),
        (GPU, 1.0, {"dataset__reset_attention_mask": True}, False, "auto, with documents apart"),
        (GPU, 1.0, {"mixed_precision__bf16": False, "mixed_precision__fp16": True}, False, "auto, with a loss scale"),
        (GPU, 1.0, {"mixed_precision__bf16": False}, False, "auto, without native BF16"),
    ],
)
def test_choice(device, operations, changes, used, reason) -> None:
    chosen = choose_graphs(configured(**changes), device, Mesh(), operations)
    assert chosen.on is used
    assert chosen.reason.startswith(reason)


def test_what_is_asked_for_and_does_not_work_is_an_error() -> None:
    config = configured(run__cuda_graphs="micro-batches")
    with pytest.raises(UserError, match="does not work with several processes"):
        choose_graphs(config, GPU, Mesh(world=Axis(size=2)), 1.0)


class Again:
    """Stands for a graph: runs the job again, on the same tensors."""

    def __init__(self, job: Job, results: list[torch.Tensor]) -> None:
        self._job: Job | None = job
        self._results = results

    def replay(self) -> None:
        """Run the job, and fill what it returned the first time."""
        assert self._job is not None, "a graph that was dropped does not run"
        found = self._job()
        if not self._results:
            self._results += [torch.empty_like(tensor) for tensor in found]
        for kept, new in zip(self._results, found, strict=True):
            kept.copy_(new)

    def reset(self) -> None:
        """Drop the job."""
        self._job = None


def capture_again(job: Job) -> tuple[Again, list[torch.Tensor]]:
    """Stand for the capture of a job on a CPU."""
    results: list[torch.Tensor] = []
    return Again(job, results), results


def _steps(device: torch.device, graphs: bool, dtype: torch.dtype) -> tuple[list[StepResult], list[torch.Tensor]]:
    """Take steps of two micro-batches, with dropout; return what they found, and the weights."""
    low = dtype == torch.bfloat16
    config = configured(
        model__attention_dropout=0.1,
        model__hidden_dropout=0.1,
        mixed_precision__bf16=low,
        ddp__grad_reduce_in_fp32=True if low else None,
    )
    config.set("model.vocab_size", 64, Origin("python"))
    model = build_model(config.model, seed=1, params_dtype=dtype, device=device)
    optimizer = Optimizer(model, config)
    passes = WholePasses(model, DropoutStreams(1, device))
    capture = capture_again if device.type == "cpu" else None
    step = TrainStep(GraphedPasses(passes, optimizer.weights, capture) if graphs else passes, optimizer)
    results = []
    for number in range(4):
        tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(number))
        mask = torch.ones(4, 32)
        mask[number] = 0.0
        batch = Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), mask, torch.arange(32).repeat(4, 1)).to(device)
        results.append(step(batch, 2, 1e-2, 0.1))
    return results, [p.detach().clone() for p in model.parameters()]


def _assert_same(device: torch.device, dtype: torch.dtype) -> None:
    (plain, weights), (graphed, found) = (_steps(device, graphs, dtype) for graphs in (False, True))
    assert graphed == plain
    assert len({result.loss_sum for result in plain}) == 4
    for ours, theirs in zip(found, weights, strict=True):
        assert torch.equal(ours, theirs)


def test_steps_of_graphs_are_those_without() -> None:
    _assert_same(CPU, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_steps_of_captured_graphs_are_those_without() -> None:
    _assert_same(torch.device("cuda"), torch.bfloat16)
