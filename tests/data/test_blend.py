import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.config.data import DatasetConfig
from lockstep.data import blend as blend_module
from lockstep.data.blend import Blend, BlendedDataset, blending_indices, exhaustive_indices, parse_blend, read_plan
from lockstep.data.splits import normalize
from lockstep.errors import UserError
from tests.data.helpers import rules, toy_documents, whole, write_dataset


def test_golden_order(shared: Path) -> None:
    golden = json.loads((shared / "facts" / "formats.json").read_text())["gpt_dataset"]["golden"]["blend_0.5_0.3_0.2"]
    datasets, samples = blending_indices([0.5, 0.3, 0.2], 12)
    assert datasets.tolist() == golden["dataset_index"]
    assert samples.tolist() == golden["dataset_sample_index"]
    assert (datasets.dtype, samples.dtype) == (np.int16, np.int64)


def naive(weights: list[float], size: int) -> list[tuple[int, int]]:
    counts = [0] * len(weights)
    drawn = []
    for i in range(size):
        behind = [weight * max(float(i), 1.0) - count for weight, count in zip(weights, counts, strict=True)]
        best = behind.index(max(behind))
        drawn.append((best, counts[best]))
        counts[best] += 1
    return drawn


weight_lists = st.lists(st.floats(0.01, 100), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(weight_lists, st.integers(0, 120))
def test_order_equals_the_definition(weights: list[float], size: int) -> None:
    shares = normalize(weights)
    datasets, samples = blending_indices(shares, size)
    assert list(zip(datasets.tolist(), samples.tolist(), strict=True)) == naive(shares, size)


@settings(max_examples=30, deadline=None)
@given(weight_lists)
def test_few_and_many_datasets_are_drawn_alike(weights: list[float]) -> None:
    shares = normalize(weights)
    assert np.array_equal(blend_module._draw_scalar(shares, 90), blend_module._draw_vector(shares, 90))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_exhaustive_order_takes_everything_once(sizes: list[int]) -> None:
    datasets, samples = exhaustive_indices(sizes)
    drawn = sorted(zip(datasets.tolist(), samples.tolist(), strict=True))
    assert drawn == [(d, i) for d, size in enumerate(sizes) for i in range(size)]


def test_exhaustive_order_is_mixed() -> None:
    assert exhaustive_indices([4, 2])[0].tolist() == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["a"], Blend(["a"], None)),
        (["a", "b"], Blend(["a", "b"], None)),
        (["1", "a"], Blend(["a"], [1.0])),
        (["0.3", "a", "7", " b "], Blend(["a", "b"], [0.3, 7.0])),
        (["1", "a", "b"], Blend(["1", "a", "b"], None)),
    ],
)
def test_parse(parts: list[str], expected: Blend) -> None:
    assert parse_blend(parts, "--data-path") == expected


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "--data-path is empty"),
        (["1", "a", "b", "c"], "expected a weight, got 'b'"),
        (["0", "a", "1", "b"], "weight 0 is not above 0"),
        (["-1", "a", "1", "b"], "weight -1 is not above 0"),
        (["nan", "a"], "weight nan is not above 0"),
    ],
)
def test_parse_refuses(parts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_blend(parts, "--data-path")


def test_sizes_round_up_twice() -> None:
    blend = Blend(["a", "b", "c"], [1.0, 1.0, 1.0])
    assert blend.sizes(100) == [34, 34, 34]
    assert blend.sizes(100, 0.005) == [math.ceil(34 * 1.005)] * 3 == [35, 35, 35]


def test_a_blend_that_takes_too_much_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", toy_documents())
    part = whole(tmp_path / "d", None, rules(16))
    with pytest.raises(
        UserError, match=r"takes 20 samples of dataset 1, which has 18; raise --mid-level-dataset-surplus"
    ):
        BlendedDataset([part, part], [1.0, 1.0], 40)


def test_description_names_the_parts(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", toy_documents())
    part = whole(tmp_path / "d", None, rules(16))
    described = BlendedDataset([part, part], [3.0, 1.0], 8).describe()
    assert described["weights"] == [0.75, 0.25]
    assert described["num_samples"] == 8
    assert [d["source"]["prefix"] for d in described["datasets"]] == [str(tmp_path / "d")] * 2
    json.dumps(described)


def test_plans_from_files(tmp_path: Path) -> None:
    listing = tmp_path / "paths.txt"
    listing.write_text("0.3 a\n0.7 b\n")
    assert read_plan(DatasetConfig(data_args_path=str(listing))).common == Blend(["a", "b"], [0.3, 0.7])
    per_split = tmp_path / "paths.json"
    per_split.write_text(json.dumps({"train": ["1", "a", "2", "b"], "valid": "c d e", "test": None}))
    plan = read_plan(DatasetConfig(per_split_data_args_path=str(per_split)))
    assert plan.per_split == {"train": Blend(["a", "b"], [1.0, 2.0]), "valid": Blend(["c", "d", "e"], None)}


def test_plan_of_paths_by_split() -> None:
    plan = read_plan(DatasetConfig(train_data_path=["2", "a", "1", "b"], test_data_path=["c"]))
    assert plan.per_split == {"train": Blend(["a", "b"], [2.0, 1.0]), "test": Blend(["c"], None)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DatasetConfig(), "no data: give --data-path"),
        (DatasetConfig(mock=True, data_path=["a"]), "--mock-data and --data-path are given together"),
        (DatasetConfig(data_path=["a"], data_args_path="b"), "--data-path and --data-args-path are given together"),
        (DatasetConfig(train_data_path=["a"], split="1,1,1"), "drop --split"),
        (DatasetConfig(data_args_path="missing.txt"), "--data-args-path: cannot read missing.txt"),
        (DatasetConfig(per_split_data_args_path="missing.json"), "cannot read missing.json"),
    ],
)
def test_plans_refused(config: DatasetConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_plan(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a mapping"),
        ('{"trian": ["a"]}', "unknown key trian. Did you mean train"),
        ('{"train": 3}', "train in .* must be a list of prefixes, got 3"),
    ],
)
def test_per_split_files_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "paths.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_plan(DatasetConfig(per_split_data_args_path=str(path)))
