from typing import Any

import pytest

from lockstep.config import ConfigContainer
from lockstep.plan.advice import Advice, advise
from lockstep.plan.gpus import Gpu
from lockstep.plan.layouts import layout_of
from lockstep.plan.measure import Memory, part_of
from lockstep.plan.planner import Planner
from tests.plan.test_measure import config_of

_BATCH: dict[str, Any] = {"train.micro_batch_size": 4, "train.global_batch_size": 64}

_FULL: dict[str, Any] = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}


class _Tight(Planner):
    """GPUs that have so much room for the peak."""

    def __init__(self, changes: dict[str, Any], room: int) -> None:
        super().__init__(config_of({**_BATCH, **changes}), Gpu("small", 1 << 40, 0))
        self.room = room

    def _room(self, gpus: int) -> int:
        return self.room


def advised(changes: dict[str, Any], gpus: int, room: float) -> Advice | None:
    """Advise for GPUs that have room for a share of what is asked for; check that the advice is true and needed."""
    changes = {"model.num_layers": 2, **changes}
    asked = Planner(config_of({**_BATCH, **changes}), Gpu("small", 1 << 40, 0)).ask(gpus).memory.peak_bytes
    limit = int(asked * room)
    found = advise(_Tight(changes, limit), gpus)
    if found is not None:
        again = _Tight({**changes, **found.changes}, limit).ask(found.gpus)
        assert again.fits
        assert again.memory == found.answer.memory
    return found


def changes_of(found: Advice | None) -> dict[str, Any]:
    assert found is not None
    return found.changes


def test_what_costs_nothing_comes_first() -> None:
    assert changes_of(advised({}, 4, 0.99)) == {"ddp.use_distributed_optimizer": True}
    tensor = {"model.tensor_model_parallel_size": 2}
    assert changes_of(advised(tensor, 2, 0.99)) == {"model.sequence_parallel": True}


def test_then_recomputation_then_smaller_micro_batches() -> None:
    four = {"model.num_layers": 4}
    assert changes_of(advised(four, 1, 0.8)) == {"model.recompute_granularity": "selective"}
    assert changes_of(advised(four, 1, 0.6)) == _FULL
    assert changes_of(advised(four, 1, 0.45)) == {**_FULL, "train.micro_batch_size": 2}
    other = {"model.recompute_granularity": "selective", "model.recompute_modules": ["layernorm"]}
    assert changes_of(advised(other, 1, 0.8)) == {**_FULL, "model.recompute_modules": None}


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    assert changes_of(advised(_FULL, 1, 0.9)) == {"train.micro_batch_size": 2}
    assert changes_of(advised(_FULL, 1, 0.65)) == {"train.micro_batch_size": 1}


def test_then_other_layouts_then_more_gpus() -> None:
    found = advised({}, 2, 0.3)
    assert found is not None
    assert found.gpus == 2
    assert found.answer.layout.model_parallel == 2
    more = advised({"train.micro_batch_size": 1, **_FULL}, 1, 0.8)
    assert more is not None
    assert more.gpus == 2


def test_there_may_be_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.plan.advice._MOST_GPUS", 2)
    assert advised({}, 1, 0.001) is None


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Spare the layouts from being measured; a peak of 1 where the test sets no other by the layout's name."""
    found: dict[str, int] = {}

    def measured(config: ConfigContainer, processes: int, gpu: Gpu) -> Memory:
        return Memory(0, {"weights": found.get(str(layout_of(config, processes)), 1)}, {}, "", 0, 0)

    monkeypatch.setattr("lockstep.plan.planner.measure", measured)
    return found


def names_of(changes: dict[str, Any]) -> list[str]:
    return [str(answer.layout) for answer in _Tight(changes, 5).layouts(4)]


def test_a_layout_forgets_how_another_shared_out_its_layers(peaks: dict[str, int]) -> None:
    uneven = {"model.pipeline_model_parallel_size": 2, "model.num_layers_in_first_pipeline_stage": 1}
    expected = {"sharded DP4", "TP4+SP", "PP4", "PP2 x sharded DP2", "TP2+SP x PP2", "TP2+SP x sharded DP2"}
    expected |= {"sharded CP4", "sharded CP2 x DP2", "PP2 x sharded CP2", "TP2+SP x sharded CP2"}
    assert set(names_of(uneven)) == expected
    interleaved = {"model.pipeline_model_parallel_size": 2, "model.virtual_pipeline_model_parallel_size": 2}
    assert "PP2 interleaved (2) x sharded DP2" in names_of(interleaved)
    assert "PP4" in names_of(interleaved)


def test_layouts_that_cannot_be_are_left_out(peaks: dict[str, int]) -> None:
    assert not any("PP" in name for name in names_of({"model.num_layers": 3}))
    assert "PP2 x sharded DP2" in names_of({"model.num_layers": 2})
    assert "TP4+SP" not in names_of({"model.num_attention_heads": 2})
    small = {"train.global_batch_size": 8, "model.tensor_model_parallel_size": 2}
    assert "sharded DP4" not in names_of(small)
    assert "TP2+SP x sharded DP2" in names_of(small)


def test_layouts_that_fit_come_first_with_least_model_parallelism(peaks: dict[str, int]) -> None:
    peaks |= {"sharded DP4": 9, "PP2 x sharded DP2": 8, "TP2+SP x sharded DP2": 4}
    names = names_of({})
    assert names[0] == "TP2+SP x sharded DP2"
    assert names[-2:] == ["PP2 x sharded DP2", "sharded DP4"]
    assert len(names) == 10


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.experts.linear_fc1.weight", "a.experts.0.weight"])
def test_experts_are_a_part_of_their_own(name: str) -> None:
    assert part_of(name, "weights") == "experts"
    assert part_of("decoder.layers.0.mlp.linear_fc1.weight", "gradients") == "gradients"
