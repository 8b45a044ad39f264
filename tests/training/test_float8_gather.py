"""Sharded weights that travel in float8: what is computed with them, how much travels, and what is refused."""

import contextlib
from functools import partial
from typing import Any

import pytest
import torch

from lockstep.config import resolve
from lockstep.errors import ConfigError, UserError
from lockstep.megatron_lm.parser import parse_flags
from lockstep.models.layers import Linear
from lockstep.parallel.fsdp import own_weights
from lockstep.parallel.mesh import Axis, Mesh
from lockstep.training import float8_gather, setup
from lockstep.training.attention import Choice, use_attention
from lockstep.training.compiling import compile_blocks
from lockstep.training.float8 import describe_float8, use_float8
from lockstep.training.float8_gather import float8_storage
from lockstep.training.optimizer import Optimizer
from lockstep.training.setup import build_parallel_model, build_passes
from lockstep.training.step import TrainStep
from tests.config.test_sharding import JOB
from tests.parallel import sweep
from tests.parallel.spawn import on_processes
from tests.parallel.test_gradient_sync import Collectives

CPU = torch.device("cpu")
_FLOAT8 = {
    **sweep.KINDS["Llama-like"],
    "mixed_precision.bf16": True,
    "mixed_precision.fp8": "hybrid",
    "mixed_precision.fp8_recipe": "tensorwise",
    "dist.use_torch_fsdp2": True,
}
_GATHER = {"mixed_precision.fp8_param_gather": True}
_STEPS = 3
FLAGS = "--bf16 --fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather"


def _train(
    changes: dict[str, Any], mesh: Mesh, compiled: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, int]:
    """Take steps; return losses and norms, this process's weights, and the bytes gathered in the last step."""
    config = sweep.configure({**_FLOAT8, **changes, "train.micro_batch_size": 1}, 2)
    model, spans, _ = build_parallel_model(config, mesh, CPU, dtype)
    use_attention(model, Choice("sdpa", "test"))
    if compiled:
        compile_blocks(model, "aot_eager")
    optimizer = Optimizer(model, config, mesh)
    step = TrainStep(build_passes(config, model, spans, mesh, CPU), optimizer, per_token=True, dp=mesh.dp)
    found = []
    for number in range(_STEPS):
        collectives = Collectives()
        with collectives if not compiled else contextlib.nullcontext():  # the compiler takes no such mode
            result = step(sweep.share(sweep.global_batch(config, number), 1, mesh.dp), 1, 1e-2, 0.01)
        found += [result.lm_loss, result.grad_norm]
    weights = {name: rows.clone() for name, (rows, _) in own_weights(model, lambda _: mesh.shards).items()}
    return found, weights, collectives.gathered_bytes


def _equal(a: tuple[Any, Any, int], b: tuple[Any, Any, int]) -> bool:
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in b[1])


def _everything() -> dict[str, Any]:
    torch._dynamo.reset()
    mesh = sweep.mesh_of(next(case for case in sweep.CASES if case.name == "FSDP2"))
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setup, "use_float8", partial(use_float8, emulate=True))
        patched.setattr(setup, "float8_storage", partial(float8_storage, emulate=True))
        jobs: dict[str, dict[str, Any]] = {
            "weights": {},
            "weights, once a step": {"run.gradient_sync": "step"},
            "gradients": {"ddp.torch_fsdp2_reshard_after_forward": False},
        }
        for name, changes in jobs.items():
            plain, gathered = _train(changes, mesh), _train({**changes, **_GATHER}, mesh)
            found[name] = _equal(gathered, plain)
            found[f"bytes of {name}"] = gathered[2] / plain[2]
        expected = _train({}, mesh)
        found["low"] = [_train(changes, mesh, dtype=torch.bfloat16)[0] for changes in (jobs["weights"], _GATHER)]
        found["compiled"] = _equal(_train(_GATHER, mesh, compiled=True), _train({}, mesh, compiled=True))
        patched.setattr(Axis, "highest_", lambda self, tensor: tensor)
        found["scales of this process"] = _equal(_train(_GATHER, mesh), expected)
        patched.undo()
        patched.setattr(setup, "use_float8", partial(use_float8, emulate=True))
        patched.setattr(setup, "float8_storage", partial(float8_storage, emulate=True))
        patched.setattr(float8_gather, "_set_scales", _once(float8_gather._set_scales))
        found["scales of the first step"] = _equal(_train(_GATHER, mesh), expected)
    return found


def _once(job: Any) -> Any:
    called: list[None] = []

    def call(*arguments: Any) -> None:
        if not called:
            called.append(None)
            job(*arguments)

    return call


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    pytest.importorskip("torchao", reason="torchao, which computes in float8, is not installed")
    return on_processes(_everything, 2)


@pytest.mark.parametrize("name", ["weights", "weights, once a step", "gradients", "compiled"])
def test_weights_that_travel_in_float8_are_those_that_are_rounded_on_arrival(results, name: str) -> None:
    assert all(found[name] for found in results)  # in FP32, where nothing is rounded before


def test_in_bf16_they_differ_by_one_rounding(results) -> None:
    for found in results:
        plain, gathered = found["low"]
        assert plain != gathered
        assert plain == pytest.approx(gathered, rel=2e-2)  # e4m3 keeps three digits after the first, BF16 seven


@pytest.mark.parametrize("name", ["weights", "gradients"])
def test_fewer_bytes_travel(results, name: str) -> None:
    for found in results:
        assert found[f"bytes of {name}"] < 0.6  # a quarter, but for embedding, output layer and norms


@pytest.mark.parametrize("fault", ["scales of this process", "scales of the first step"])
def test_a_planted_fault_is_seen(results, fault: str) -> None:
    assert not any(found[fault] for found in results)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--use-torch-fsdp2 --bf16 --fp8-param-gather", "has no effect without mixed_precision.fp8"),
        (FLAGS, "is for sharded weights (--use-torch-fsdp2); whole ones travel in BF16"),
        (f"{FLAGS} --use-distributed-optimizer", "is for sharded weights"),
        (f"{FLAGS} --use-torch-fsdp2 --num-distributed-optimizer-instances 4", "where one process has all weights"),
        (
            "--use-torch-fsdp2 --bf16 --fp8-format e4m3 --fp8-recipe rowwise --fp8-param-gather",
            "rowwise: the two products of a weight scale it along different rows",
        ),
    ],
)
def test_where_it_does_not_work_is_an_error(flags: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(parse_flags([*JOB, *flags.split()]), world_size=4)
    assert part in str(caught.value)


def test_it_is_named_in_the_features() -> None:
    config = sweep.configure({**_FLOAT8, **_GATHER}, 2)
    assert describe_float8(config).endswith("weights are kept in FP32 and gathered in e4m3 (torchao)")


def test_rows_that_cannot_be_shared_out_evenly_are_an_error() -> None:
    pytest.importorskip("torchao", reason="torchao, which computes in float8, is not installed")
    kept = float8_storage(sweep.configure({**_FLOAT8, **_GATHER}, 2), Axis(3, 0), emulate=True)
    linear = Linear(16, 16, bias=False, dtype=torch.float32, device=CPU)
    with pytest.raises(UserError, match="has 16 rows, which 3 processes cannot share out evenly"):
        kept(linear, "decoder.layers.0.mlp.linear_fc1.weight", linear.weight.detach())
    assert kept(linear, "output_layer.weight", linear.weight) is linear.weight
