import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.data.sampling import build_indices, build_sample_index, plan_epochs
from tests.data.helpers import rules, toy_documents, whole, write_dataset


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "facts" / "formats.json").read_text())["gpt_dataset"]["golden"]


@pytest.mark.parametrize("name", ["toy_ns100", "toy_ns30", "toy_ns38"])
def test_toy_orders_are_megatron_lms(golden: dict[str, Any], tmp_path: Path, name: str) -> None:
    expected = golden[name]
    write_dataset(tmp_path / "toy", toy_documents())
    plan = plan_epochs(290, expected["num_samples"], expected["seq_length"])
    assert plan.num_epochs == expected["num_epochs"]
    assert plan.separate_final_epoch == expected["separate_final_epoch"]
    dataset = whole(tmp_path / "toy", expected["num_samples"], rules(expected["seq_length"]))
    indices = dataset.indices
    assert len(dataset) == expected["len"]
    assert indices.document_index[:25].tolist() == expected["document_index"]
    assert indices.sample_index[:5].tolist() == expected["sample_index_head"]
    assert indices.shuffle_index[:12].tolist() == expected["shuffle_index_head"]
    assert dataset[0]["tokens"].tolist() == expected["sample0"]


def naive_sample_index(lengths: list[int], seq_length: int) -> list[list[int]]:
    """Walk token by token: a sample starts at every seq_length-th token that is not the last."""
    places = [[position, offset] for position, length in enumerate(lengths) for offset in range(length)]
    starts = places[0 : len(places) : seq_length]
    starts = starts[: (len(places) - 1) // seq_length + 1] if places else []
    return [[0, 0], *starts[1:]]


@given(st.lists(st.integers(0, 9), max_size=25), st.integers(1, 12))
def test_sample_index_equals_a_walk(lengths: list[int], seq_length: int) -> None:
    index = build_sample_index(np.array(lengths, np.int32), seq_length)
    assert index.tolist() == naive_sample_index(lengths, seq_length)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 9), st.integers(1, 80), st.integers(0, 9))
def test_samples_cover_the_corpus_in_order_of_rows(
    lengths: list[int], seq_length: int, num_samples: int, seed: int
) -> None:
    if sum(lengths) < 2:
        return
    sizes = np.array(lengths, np.int32)
    documents = np.arange(len(lengths), dtype=np.int32)
    order = build_indices(sizes, documents, num_samples=num_samples, seq_length=seq_length, seed=seed)
    count = len(order.shuffle_index)
    assert count >= num_samples
    assert sorted(order.shuffle_index.tolist()) == list(range(count))
    epochs = len(order.document_index) // len(lengths)
    assert np.array_equal(np.bincount(order.document_index, minlength=len(lengths)), np.full(len(lengths), epochs))
    assert (epochs - 1) * sum(lengths) < num_samples * seq_length + 1 <= epochs * sum(lengths)


def test_separate_final_epoch_is_drawn_last() -> None:
    sizes = np.full(10, 17, np.int32)
    order = build_indices(sizes, np.arange(10, dtype=np.int32), num_samples=12, seq_length=16, seed=1)
    plan = plan_epochs(170, 12, 16)
    assert plan.separate_final_epoch
    assert plan.rows_before_final == 10
    assert sorted(order.document_index[:10].tolist()) == list(range(10))
    assert set(order.shuffle_index[:10].tolist()) == set(range(10))


def test_both_parts_of_a_separate_final_epoch_are_shuffled() -> None:
    sizes = np.full(100, 17, np.int32)
    order = build_indices(sizes, np.arange(100, dtype=np.int32), num_samples=150, seq_length=16, seed=1)
    first = plan_epochs(1700, 150, 16).rows_before_final
    for part in (order.shuffle_index[:first], order.shuffle_index[first:]):
        assert sorted(part.tolist()) != part.tolist()
        assert sorted(part.tolist()) == list(range(int(part.min()), int(part.max()) + 1))


def test_final_epoch_is_mixed_in_when_most_of_it_is_needed() -> None:
    per_epoch = 100
    assert plan_epochs(1601, per_epoch + 79, 16).separate_final_epoch
    assert not plan_epochs(1601, per_epoch + 80, 16).separate_final_epoch
    assert plan_epochs(170, None, 16).num_epochs == 1


def test_indices_are_as_wide_as_megatron_lms() -> None:
    order = build_indices(np.full(4, 50, np.int32), np.arange(4, dtype=np.int32), num_samples=5, seq_length=8, seed=1)
    assert order.document_index.dtype == np.int32
    assert order.sample_index.dtype == np.int32
    assert order.shuffle_index.dtype == np.uint32
