"""When gradients cross the processes: collectives are counted, and what they add up is that of whole weights."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.config import resolve
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags
from lockstep.parallel import fsdp
from lockstep.parallel.mesh import Mesh
from lockstep.training import gradient_sync, passes
from lockstep.training.gradient_sync import choose_gradient_sync
from lockstep.training.optimizer import Optimizer
from lockstep.training.setup import build_parallel_model, build_passes
from lockstep.training.step import TrainStep
from tests.config.test_sharding import JOB
from tests.parallel import sweep
from tests.parallel.spawn import on_processes

CPU = torch.device("cpu")
LAYERS, MICRO_BATCHES = 4, 4
_BUCKETS = {"ddp.bucket_size": 5000}
_ONCE = {"run.gradient_sync": "step"}
_FSDP = {"dist.use_torch_fsdp2": True}
_OF_GRADIENTS = {"dist.use_megatron_fsdp": True, "ddp.data_parallel_sharding_strategy": "optim_grads"}
_OVERLAP = {**_BUCKETS, "ddp.overlap_grad_reduce": True}
_OPTIMIZER = {"ddp.use_distributed_optimizer": True}
WHOLE: dict[str, dict[str, Any]] = {
    "all-reduce": _BUCKETS,
    "all-reduce, overlap": _OVERLAP,
    "sharded optimizer": {**_OPTIMIZER, **_BUCKETS},
    "sharded optimizer, overlap": {**_OPTIMIZER, **_OVERLAP, "ddp.overlap_param_gather": True},
}
# Reduce-scatters and all-gathers of a step: of the layers, and of what is left.
SHARDED: dict[str, tuple[dict[str, Any], int, int]] = {
    "weights": (_FSDP, MICRO_BATCHES * (LAYERS + 1), 1 + MICRO_BATCHES * (2 * LAYERS - 1)),
    "weights, once a step": ({**_FSDP, **_ONCE}, LAYERS + 1, 1 + MICRO_BATCHES * (2 * LAYERS - 1)),
    "gradients": (_OF_GRADIENTS, MICRO_BATCHES * (LAYERS + 1), LAYERS + 1),
    "gradients, once a step": ({**_OF_GRADIENTS, **_ONCE}, LAYERS + 1, LAYERS + 1),
}
_SINGLE = {"train.micro_batch_size": 1, "optimizer.clip_grad": 1e9}
_LOW = {**_SINGLE, "mixed_precision.bf16": True}


class Collectives(TorchDispatchMode):
    """Counts the collectives that begin within it, by their names, bytes that gathers leave and elements reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.gathered_bytes = 0
        self.reduced: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
            if func.overloadpacket.__name__ == "_allgather_base_":
                self.gathered_bytes += args[0].nbytes
            if func.overloadpacket.__name__ == "_reduce_scatter_base_":
                self.reduced.append(args[1].numel())
        return func(*args, **(kwargs or {}))


def counted(changes: dict[str, Any], micro_batches: int, mesh: Mesh) -> dict[str, int]:
    """Return the collectives of the second step of a job with two data-parallel processes, by their names."""
    config = sweep.configure({**changes, "train.micro_batch_size": 4 // micro_batches}, mesh.world.size)
    model, spans, _ = build_parallel_model(config, mesh, CPU, torch.float64)
    optimizer = Optimizer(model, config, mesh)
    step = TrainStep(build_passes(config, model, spans, mesh, CPU), optimizer, dp=mesh.dp)
    micro = config.train.micro_batch_size or 1
    for number in range(2):
        with Collectives() as collectives:
            step(sweep.share(sweep.global_batch(config, number), micro, mesh.dp), micro, 1e-2, 0.01)
    return dict(collectives.counts)


def _everything() -> dict[str, Any]:
    mesh = sweep.mesh_of(next(case for case in sweep.CASES if case.name == "DP2"))
    found: dict[str, Any] = {
        name: [counted(changes, n, mesh) for n in (1, MICRO_BATCHES)] for name, changes in WHOLE.items()
    }
    found |= {name: counted(changes, MICRO_BATCHES, mesh) for name, (changes, *_) in SHARDED.items()}
    found["equal"] = {
        (name, str(dtype)): _equal(*(sweep.play(sweep.configure({**job, **c}, 2), mesh, dtype) for c in (changes, {})))
        for name, (changes, *_) in SHARDED.items()
        for job, dtype in ((_SINGLE, torch.float32), (_LOW, torch.bfloat16))
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passes, "add_up_gradients", lambda *_: None)
        found["without the rule"] = counted({**_FSDP, **_ONCE}, MICRO_BATCHES, mesh)
        patched.setattr(passes, "add_up_gradients", lambda model, _: fsdp.add_up_gradients(model, False))
        found["never"] = counted({**_FSDP, **_ONCE}, MICRO_BATCHES, mesh)
    return found


def _equal(run: sweep.Outcome, expected: sweep.Outcome) -> bool:
    """Tell whether a run found the gradients, losses and weights of another, bit for bit."""
    return run.losses == expected.losses and all(
        torch.equal(x[name].to(y[name].dtype), y[name])
        for x, y in ((run.grads, expected.grads), (run.weights, expected.weights))
        for name in y
    )


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_processes(_everything, 2)


@pytest.mark.parametrize("name", WHOLE)
def test_gradients_of_whole_weights_cross_once_a_step(results, name: str) -> None:
    for found in results:
        of_one, of_several = found[name]
        assert of_one == of_several
        assert of_several.get("_reduce_scatter_base_", 0) + of_several["allreduce_"] > LAYERS


@pytest.mark.parametrize("name", SHARDED)
def test_collectives_of_sharded_weights(results, name: str) -> None:
    _, reductions, gathers = SHARDED[name]
    for found in results:
        assert found[name]["_reduce_scatter_base_"] == reductions
        assert found[name]["_allgather_base_"] == gathers + 1  # and the sums of all micro-batches


def test_without_the_rule_there_are_more(results) -> None:
    for found in results:
        assert found["without the rule"]["_reduce_scatter_base_"] == MICRO_BATCHES * (LAYERS + 1)
        assert "_reduce_scatter_base_" not in found["never"]


def test_once_a_step_adds_up_as_whole_weights_do(results) -> None:
    for found in results:
        equal = found["equal"]
        for dtype in ("torch.float32", "torch.bfloat16"):
            assert equal["weights, once a step", dtype]
            assert equal["gradients, once a step", dtype]
        assert not equal["weights", "torch.float32"]  # each micro-batch's sum over processes first: another order


class _Sharded(nn.Module):
    """Stands for a sharded model of 2**30 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16).expand(2**30))


@pytest.mark.parametrize(
    ("changes", "memory_gib", "once", "reason"),
    [
        ({}, None, False, "auto, on a CPU"),
        ({}, 40, True, "auto, whole gradients take 4.0 GiB, at most a tenth of 40.0 GiB"),
        ({}, 39, False, "auto, whole gradients take 4.0 GiB, more than a tenth of 39.0 GiB"),
        ({"ddp.grad_reduce_in_fp32": False}, 20, True, "auto, whole gradients take 2.0 GiB"),
        ({"run.gradient_sync": "step"}, 1, True, "run.gradient_sync=step"),
        ({"run.gradient_sync": "micro-batch"}, 400, False, "run.gradient_sync=micro-batch"),
    ],
)
def test_choice(monkeypatch, changes, memory_gib, once, reason) -> None:
    monkeypatch.setattr(gradient_sync, "is_sharded", lambda _: True)
    config = sweep.configure({**_FSDP, **changes}, 2)
    memory = None if memory_gib is None else memory_gib * 2**30
    chosen = choose_gradient_sync(config, _Sharded(), Mesh(), memory)
    assert chosen.once_a_step is once
    assert chosen.reason.startswith(reason)


def test_whole_weights_have_no_choice() -> None:
    model, _, _ = build_parallel_model(sweep.configure({}, 1), Mesh(), CPU, torch.float32)
    assert (
        str(choose_gradient_sync(sweep.configure(_ONCE, 1), model, Mesh(), None)) == "once a step (weights are whole)"
    )
    with pytest.raises(ConfigError, match=r"--gradient-sync = micro-batch is for sharded weights"):
        resolve(parse_flags([*JOB, "--gradient-sync", "micro-batch"]), world_size=4)
