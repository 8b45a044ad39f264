import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.config.data import DatasetConfig
from lockstep.data.build import build_datasets
from lockstep.data.gpt_dataset import GPTDataset
from lockstep.data.mock import MockTokens
from lockstep.data.tokenizers import NullTokenizer


@pytest.fixture(scope="module")
def facts(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "facts" / "formats.json").read_text())["mock_dataset"]


def test_lengths(facts: dict[str, Any]) -> None:
    lengths = MockTokens(32000, 31999).sequence_lengths
    golden = facts["golden"]["mock_lengths"]
    assert lengths[:8].tolist() == golden["head"]
    assert int(lengths.sum()) == golden["sum"]
    assert (int(lengths.min()), int(lengths.max())) == (golden["min"], golden["max"])


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_splits_are_megatron_lms(facts: dict[str, Any], split: str) -> None:
    setup, golden = facts["golden_setup"], facts["golden"][f"mock_{split}"]
    counts = tuple(
        n if name == split else 0 for name, n in zip(("train", "valid", "test"), setup["requested"], strict=True)
    )
    built = build_datasets(
        DatasetConfig(mock=True, split="100,0,0"),
        seq_length=setup["sequence_length"],
        seed=setup["random_seed"],
        tokenizer=NullTokenizer(setup["vocab_size"], setup["eod"]),
        num_samples=counts,  # type: ignore[arg-type]
    )
    dataset = getattr(built, split)
    assert isinstance(dataset, GPTDataset)
    assert len(dataset) == golden["len"]
    described = dataset.describe()
    assert described["documents"] == [golden["first_doc"], golden["last_doc"] + 1]
    assert described["tokens_per_epoch"] == golden["tokens_per_epoch"]
    assert dataset.indices.document_index[:5].tolist() == golden["document_index_head"]
    assert dataset.indices.sample_index[:3].tolist() == golden["sample_index_head"]
    assert dataset.indices.shuffle_index[:8].tolist() == golden["shuffle_index_head"]
    assert dataset[0]["tokens"][:6].tolist() == golden["sample0_tokens_head"]
    sums = [int(dataset[i]["tokens"].sum()) for i in range(100)]
    assert sums[0] == golden["sample0_token_sum"]
    assert sums[1] == golden["sample1_token_sum"]
    assert sum(sums) == golden["first100_token_sum"]


def test_a_slice_is_part_of_the_whole_document() -> None:
    tokens = MockTokens(100, 99)
    whole = tokens.get(0)
    length = int(tokens.sequence_lengths[0])
    assert whole.tolist() == [*(np.arange(1, length) % 100).tolist(), 99]
    assert tokens.get(0, 7).tolist() == whole[7:].tolist()
    assert tokens.get(0, 7, 5).tolist() == whole[7:12].tolist()
    assert tokens.get(0, length - 1, 1).tolist() == [99]
