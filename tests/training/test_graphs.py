"""CUDA graphs: when they are chosen or refused, and that a step of graphs is a step."""

import contextlib
import gc
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from lockstep.config import Origin
from lockstep.errors import UserError
from lockstep.models import DropoutStreams, build_model
from lockstep.models.layers import required
from lockstep.parallel import Mesh
from lockstep.parallel import mesh as mesh_module
from lockstep.parallel.mesh import Axis
from lockstep.training import graphs
from lockstep.training.attention import Choice, use_attention
from lockstep.training.compiling import compile_blocks
from lockstep.training.feed import Batch
from lockstep.training.graphs import SMALL_OPERATIONS, GraphedPasses, choose_graphs
from lockstep.training.optimizer import Optimizer
from lockstep.training.passes import WholePasses
from lockstep.training.setup import graphed
from lockstep.training.step import StepResult, TrainStep
from lockstep.training.switch import Switch
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


_EXPERTS: dict[str, Any] = {
    "model__num_moe_experts": 4,
    "model__moe_ffn_hidden_size": 16,
    "model__add_bias_linear": False,
}
_RECOMPUTATION = {
    "model__recompute_granularity": "full",
    "model__recompute_method": "uniform",
    "model__recompute_num_layers": 1,
}
_TWO = Axis(size=2)
_ASKED: dict[str, Any] = {"run__cuda_graphs": "micro-batches"}


@pytest.mark.parametrize(
    ("changes", "mesh", "reason"),
    [
        (_EXPERTS, Mesh(), "auto, micro-batches are small: 1.0e+00 operations"),
        ({}, Mesh(world=_TWO, replicas=_TWO), "auto, not measured on several processes without experts"),
        ({**_EXPERTS, **_RECOMPUTATION, **_ASKED}, Mesh(), "run.cuda_graphs=micro-batches"),
        ({**_EXPERTS, **_ASKED}, Mesh(world=_TWO, replicas=_TWO, ep=_TWO), "run.cuda_graphs=micro-batches"),
        (_ASKED, Mesh(world=_TWO, tp=_TWO), "run.cuda_graphs=micro-batches"),
        (
            {**_ASKED, "ddp__overlap_grad_reduce": True},
            Mesh(world=_TWO, replicas=_TWO),
            "run.cuda_graphs=micro-batches; gradients and weights cross the processes between steps only",
        ),
    ],
)
def test_choice_with_experts_and_on_several_processes(changes, mesh, reason) -> None:
    chosen = choose_graphs(configured(**changes), GPU, mesh, 1.0)
    assert chosen.reason == reason
    assert chosen.on is ("not measured" not in reason)


def test_auto_takes_what_was_measured() -> None:
    config, mesh = configured(**_EXPERTS), Mesh(world=_TWO, replicas=_TWO, ep=_TWO)
    most = graphs.SMALL_LAYER_WITH_EXPERTS * required(config.model.num_layers)
    assert choose_graphs(config, GPU, mesh, 0.9 * most).on
    assert not choose_graphs(config, GPU, mesh, 1.1 * most).on
    assert not choose_graphs(configured(), GPU, Mesh(), 0.9 * most).on
    config.model.moe_token_dispatcher_type = "alltoall"
    assert "moe_token_dispatcher_type=alltoall" in choose_graphs(config, GPU, mesh, 0.9 * most).reason


@pytest.mark.parametrize(
    ("changes", "mesh", "reason"),
    [
        ({}, Mesh(world=_TWO, pp=_TWO), "with a pipeline"),
        ({}, Mesh(world=_TWO, cp=_TWO, replicas=_TWO), "with context parallelism"),
        ({"dist__use_torch_fsdp2": True}, Mesh(world=_TWO, shards=_TWO), "with sharded weights"),
        ({**_RECOMPUTATION, "model__hidden_dropout": 0.1}, Mesh(), "with recomputation of dropout"),
        ({"dataset__pad_to_max_length": False}, Mesh(), "with samples of several lengths"),
        (
            {**_EXPERTS, "model__moe_token_dispatcher_type": "alltoall"},
            Mesh(world=_TWO, replicas=_TWO, ep=_TWO),
            "with model.moe_token_dispatcher_type=alltoall, where the host is told how many tokens travel",
        ),
        (
            {**_EXPERTS, "model__moe_router_load_balancing_type": ["sinkhorn"]},
            Mesh(),
            "with sinkhorn routing, where the host is told when to end",
        ),
        (
            {**_EXPERTS, "model__moe_router_force_load_balancing": True},
            Mesh(),
            "with model.moe_router_force_load_balancing",
        ),
        ({**_EXPERTS, "model__moe_ffn_hidden_size": 12}, Mesh(), "where experts have no grouped products"),
        ({**_EXPERTS, "model__add_bias_linear": True}, Mesh(), "where experts have no grouped products"),
        (_EXPERTS, Mesh(world=_TWO, tp=Axis(size=4)), "where experts have no grouped products"),
    ],
)
def test_what_is_asked_for_and_does_not_work_is_an_error(changes, mesh, reason) -> None:
    config = configured(**_ASKED)
    for name, value in changes.items():
        config.set(name.replace("__", "."), value, Origin("python"))
    with pytest.raises(UserError, match=f"does not work {re.escape(reason)}; use run.cuda_graphs=none"):
        choose_graphs(config, GPU, mesh, 1.0)


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


_DROPOUT = {"model__attention_dropout": 0.1, "model__hidden_dropout": 0.1}
_ROUTED = {
    **_EXPERTS,
    **_RECOMPUTATION,
    "model__attention_backend": "unfused",
    "model__moe_router_score_function": "sigmoid",
    "model__moe_router_enable_expert_bias": True,
    "model__moe_router_load_balancing_type": ["seq_aux_loss"],
    "model__moe_aux_loss_coeff": [0.1],
    "model__moe_z_loss_coeff": 0.1,
}


def _steps(
    device: torch.device, graphs: bool, dtype: torch.dtype, changes: dict[str, Any]
) -> tuple[list[StepResult], list[torch.Tensor]]:
    """Take steps of two micro-batches; return what they found, and the weights with the biases of experts."""
    low = dtype == torch.bfloat16
    config = configured(mixed_precision__bf16=low, ddp__grad_reduce_in_fp32=True if low else None, **changes)
    config.set("model.vocab_size", 64, Origin("python"))
    model = build_model(config.model, seed=1, params_dtype=dtype, device=device)
    optimizer = Optimizer(model, config)
    passes = WholePasses(model, DropoutStreams(1, device))
    capture = capture_again if device.type == "cpu" else None
    step = TrainStep(GraphedPasses(passes, optimizer.weights, capture) if graphs else passes, optimizer)
    results = [step(_batch(number).to(device), 2, 1e-2, 0.1) for number in range(4)]
    return results, [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def _batch(number: int) -> Batch:
    tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(number))
    mask = torch.ones(4, 32)
    mask[number] = 0.0
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), mask, torch.arange(32).repeat(4, 1))


def _assert_same(device: torch.device, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    (plain, weights), (graphed, found) = (_steps(device, graphs, dtype, changes) for graphs in (False, True))
    assert graphed == plain
    assert len({result.loss_sum for result in plain}) == 4
    for ours, theirs in zip(found, weights, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("changes", [_DROPOUT, _ROUTED], ids=["dropout", "experts"])
def test_steps_of_graphs_are_those_without(changes) -> None:
    _assert_same(CPU, torch.float32, changes)


class _Seen(TrainStep):
    """Steps of a model with experts, recomputation and compiled parts, whose graphs may not do what captures refuse."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        job = {**_EXPERTS, **_RECOMPUTATION, "mixed_precision__bf16": False, "model__gated_linear_unit": True}
        config = configured(**job, model__normalization="RMSNorm", model__activation_func="silu")
        config.set("model.vocab_size", 64, Origin("python"))
        self.model = build_model(config.model, seed=1, params_dtype=torch.float32, device=CPU)
        use_attention(self.model, Choice("sdpa", "test"))
        compile_blocks(self.model, self._backend)
        self.compiled, self.in_graph, self.pasts = 0, 0, set[int]()
        get_state = DropoutStreams.state_dict

        def state(streams: DropoutStreams) -> dict[str, torch.Tensor]:
            assert not self.in_graph, "no capture tells the state of a random stream"
            return get_state(streams)

        monkeypatch.setattr(DropoutStreams, "state_dict", state)
        optimizer = Optimizer(self.model, config)
        super().__init__(
            GraphedPasses(WholePasses(self.model, DropoutStreams(1, CPU)), optimizer.weights, self._capture), optimizer
        )

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.compiled += 1
        return aot_eager(graph, inputs)

    def _capture(self, job: Job) -> tuple[Again, list[torch.Tensor]]:
        gc.collect()

        def watched() -> Sequence[torch.Tensor]:
            assert not any(node.metadata for node in accumulators(self.model)), "a node of the first step is left"
            self.in_graph += 1
            found = job()
            self.in_graph -= 1
            return found

        return capture_again(watched)


def accumulators(model: torch.nn.Module) -> list[Any]:
    """Return the autograd nodes that set the gradients of the parameters; they are made where there are none."""
    nodes = [param.expand_as(param).grad_fn for param in model.parameters()]
    return [node.next_functions[0][0] for node in nodes if node is not None]


def test_graphs_do_nothing_that_a_capture_refuses(monkeypatch) -> None:
    step = _Seen(monkeypatch)
    marked: list[int] = []

    def mark(*_: Any) -> None:
        if not step.in_graph:
            for node in accumulators(step.model):
                node.metadata["first"] = True
                marked.append(1)

    assert step.model.decoder.final_layernorm is not None
    step.model.decoder.final_layernorm.register_forward_hook(mark)
    compiled = []
    for number in range(3):
        step(_batch(number), 2, 1e-2, 0.1)
        compiled.append(step.compiled)
    assert marked
    assert compiled[0] > 0
    assert compiled == [compiled[0]] * 3


def test_graphs_go_before_the_process_groups(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(mesh_module.dist, "rendezvous", lambda *_, **__: iter([(_Store(), 0, 2)]))
    monkeypatch.setattr(mesh_module.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(mesh_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(mesh_module.dist, "destroy_process_group", lambda: seen.append("groups"))
    monkeypatch.setattr(mesh_module, "join", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(mesh_module, "build_mesh", lambda *_: Mesh())
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    config = configured()
    config.set("model.vocab_size", 64, Origin("python"))
    model = build_model(config.model, seed=1, params_dtype=torch.float32, device=CPU)
    passes = WholePasses(model, DropoutStreams(1, CPU))
    monkeypatch.setattr(GraphedPasses, "release", lambda _: seen.append("graphs"))
    monkeypatch.setattr(graphs, "CudaCapture", lambda _: capture_again)
    with mesh_module.start_processes(config, CPU) as mesh:
        graphed(passes, Optimizer(model, config), Switch(True, "micro-batches", "test"), mesh)
        assert not seen
    assert seen == ["graphs", "groups"]


class _Store:
    def set_timeout(self, timeout: object) -> None:
        """Take the time that is waited for other processes."""


def test_what_was_captured_is_dropped() -> None:
    config = configured(mixed_precision__bf16=False)
    config.set("model.vocab_size", 64, Origin("python"))
    model = build_model(config.model, seed=1, params_dtype=torch.float32, device=CPU)
    optimizer, captured = Optimizer(model, config), []

    def capture(job: Job) -> tuple[Again, list[torch.Tensor]]:
        captured.append(capture_again(job))
        return captured[-1]

    passes = GraphedPasses(WholePasses(model), optimizer.weights, capture)
    step = TrainStep(passes, optimizer)
    for number in range(2):
        step(_batch(number), 2, 1e-2, 0.1)
    passes.release()
    assert len(captured) == 2
    for graph, _ in captured:
        with pytest.raises(AssertionError, match="dropped"):
            graph.replay()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("changes", [_DROPOUT, _ROUTED], ids=["dropout", "experts"])
def test_steps_of_captured_graphs_are_those_without(changes) -> None:
    _assert_same(torch.device("cuda"), torch.bfloat16, changes)
