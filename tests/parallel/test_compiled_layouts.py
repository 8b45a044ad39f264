"""Compiled layers in every layout that has them: one graph each, and what one process finds without compilation."""

from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from lockstep.models import GPTModel
from lockstep.models.decoder import head
from lockstep.parallel.mesh import Mesh
from lockstep.training.attention import Choice, use_attention
from lockstep.training.compiling import compile_blocks
from tests.parallel import sweep
from tests.parallel.spawn import on_processes

_NAMES = (
    "FSDP2",
    "FSDP2, recomputation",
    "FSDP2 of gradients",
    "sharded DP2, overlap",
    "TP2+SP",
    "TP2",
    "CP2",
    "CP2, recomputation",
    "PP2 interleaved",
)


def _play(name: str, fault: bool = False) -> tuple[sweep.Row, int]:
    """Run a layout with compiled layers; return how it compares with one process, and the number of graphs."""
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    def compile_layers(model: GPTModel, *_: Any) -> None:
        use_attention(model, Choice("sdpa", "test"))
        compile_blocks(model, backend)
        if fault:
            model.head = head

    torch._dynamo.reset()
    case = next(case for case in sweep.CASES if case.name == name)
    changes = {**sweep.KINDS["Llama-like"], **case.changes}
    expected = sweep.play(sweep.configure(sweep.KINDS["Llama-like"], 1), Mesh())
    found = sweep.play(sweep.configure(changes, case.processes), sweep.mesh_of(case), sabotage=compile_layers)
    return sweep.compare("Llama-like", name, found, expected), graphs


def _all() -> dict[str, Any]:
    return {**{name: _play(name) for name in _NAMES}, "fault": _play("TP2+SP", fault=True)}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_processes(_all, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", _NAMES)
def test_compiled_layers_find_what_one_process_finds_without(results, name: str) -> None:
    for found in results:
        row, graphs = found[name]
        assert row.passes, row
        assert graphs == 1  # all layers share it


@pytest.mark.slow
def test_a_loss_over_part_of_the_vocabulary_alone_is_seen(results) -> None:
    assert not any(found["fault"][0].passes for found in results)
