import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.config.data import DatasetConfig, TokenizerConfig
from lockstep.data.build import Datasets, batch_hash, build_datasets, collate
from lockstep.data.gpt_dataset import Dataset
from lockstep.data.tokenizers import NullTokenizer, Tokenizer, build_tokenizer
from lockstep.errors import UserError
from tests.data.helpers import blend_documents, toy_documents, write_dataset

SPLITS = ("train", "valid", "test")


def reference(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "reference" / "sample_order.json").read_text())[name]


def hash_of(dataset: Dataset, count: int) -> str:
    samples = [dataset[i] for i in range(min(len(dataset), count))]
    return batch_hash(np.stack([s["tokens"] for s in samples]), np.stack([s["labels"] for s in samples]))


def check_reference(built: Datasets, expected: dict[str, Any]) -> None:
    for split in SPLITS:
        dataset, golden = getattr(built, split), expected[split]
        assert len(dataset) == golden["length"]
        assert dataset[0]["tokens"][:16].tolist() == golden["first_tokens"]
        samples = [dataset[i] for i in range(len(golden["sha16"]))]
        hashes = [batch_hash(s["tokens"][None], s["labels"][None]) for s in samples]
        assert hashes == golden["sha16"]
        assert [int(s["loss_mask"].sum()) for s in samples[:8]] == golden["loss_tokens"]


def test_mock_samples_are_megatron_lms(shared: Path) -> None:
    built = build_datasets(
        DatasetConfig(mock=True),
        seq_length=512,
        seed=1234,
        tokenizer=NullTokenizer(32000),
        num_samples=(320, 64, 64),
    )
    check_reference(built, reference(shared, "mock_seq512_seed1234_vocab32000"))


def test_real_samples_are_megatron_lms(shared: Path, tinyshakespeare: Path) -> None:
    model = str(shared / "data" / "tokenizer_bpe4096")
    built = build_datasets(
        DatasetConfig(data_path=[str(tinyshakespeare)]),
        seq_length=512,
        seed=1234,
        tokenizer=build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model)),
        num_samples=(2000, 64, 16),
    )
    check_reference(built, reference(shared, "tinyshakespeare_split_969_30_1_seq512_seed1234"))


@pytest.fixture
def blend(tmp_path: Path) -> list[str]:
    prefixes = []
    for number, count in enumerate((40, 30, 50)):
        prefixes.append(str(tmp_path / f"d{number}"))
        write_dataset(tmp_path / f"d{number}", blend_documents(number, count))
    return prefixes


def build(config: DatasetConfig, *counts: int | None, tokenizer: Tokenizer | None = None) -> Datasets:
    return build_datasets(
        config,
        seq_length=16,
        seed=1234,
        tokenizer=tokenizer or NullTokenizer(500),
        num_samples=counts,  # type: ignore[arg-type]
    )


def weighted(prefixes: list[str]) -> list[str]:
    return [word for pair in zip(("0.5", "0.3", "2"), prefixes, strict=True) for word in pair]


def config_of(kind: str, prefixes: list[str]) -> tuple[DatasetConfig, tuple[int, int, int]]:
    split = "90,5,5"
    return {
        "weights": (DatasetConfig(data_path=weighted(prefixes), split=split), (300, 40, 20)),
        "no weights": (DatasetConfig(data_path=prefixes, split=split), (150, 500, 20)),
        "one with weight": (DatasetConfig(data_path=["3", prefixes[0]], split=split), (100, 20, 10)),
        "one": (DatasetConfig(data_path=[prefixes[0]], split=split), (100, 20, 10)),
        "per split": (
            DatasetConfig(
                train_data_path=weighted(prefixes), valid_data_path=["7", prefixes[1]], test_data_path=prefixes
            ),
            (300, 40, 60),
        ),
    }[kind]


MEGATRON_LM_BLENDS = {
    "weights": [(302, "29bf914b7f9e011c"), (42, "faaa038a114414dc"), (22, "c9cefb865a9d0431")],
    "no weights": [(150, "5bfc05b7f32de5f4"), (18, "710a215859bbef4b"), (13, "6afb6e8999b7c1a5")],
    "one with weight": [(100, "13b0fe6666021425"), (20, "96b1cdbfc9b891d3"), (10, "320a2638d89742cb")],
    "one": [(101, "f2688dddbcf41102"), (20, "41cea6f04d3c24a8"), (10, "320a2638d89742cb")],
    "per split": [(302, "49a66d996923b0f3"), (73, "4232d8024793e1e1"), (60, "4c80f34313c7ea0d")],
}
"""Lengths, and hashes of the first 200 samples, as Megatron-LM's own builder gave them for the same files."""


@pytest.mark.parametrize("kind", MEGATRON_LM_BLENDS)
def test_blends_are_megatron_lms(blend: list[str], kind: str) -> None:
    config, counts = config_of(kind, blend)
    built = build(config, *counts)
    found = [(len(d), hash_of(d, 200)) for d in (built.train, built.valid, built.test) if d is not None]
    assert found == MEGATRON_LM_BLENDS[kind]


@pytest.mark.parametrize("kind", ["weights", "no weights"])
def test_cached_order_is_the_same(blend: list[str], tmp_path: Path, kind: str) -> None:
    config, counts = config_of(kind, blend)
    config.path_to_cache = str(tmp_path / "cache")
    for _ in range(2):
        built = build(config, *counts)
        assert built.train is not None
        assert (len(built.train), hash_of(built.train, 200)) == MEGATRON_LM_BLENDS[kind][0]
    assert list((tmp_path / "cache").glob("*-Blend-train-dataset_index.npy"))
    assert not (tmp_path / "d0").exists()


def test_the_default_cache_lies_beside_the_data(blend: list[str]) -> None:
    build(DatasetConfig(data_path=blend[:1]), 10, 0, 0)
    assert len(list((Path(blend[0]) / "cache" / "GPTDataset_indices").glob("*.json"))) == 1


def test_read_only_data_needs_no_cache(blend: list[str], tmp_path: Path) -> None:
    (tmp_path / "d0").write_text("the folder of the cache cannot be made here")
    built = build(DatasetConfig(data_path=blend[:1]), 10, 0, 0)
    assert built.train is not None


def test_a_cache_of_other_data_under_the_same_name_is_not_used(tmp_path: Path) -> None:
    config = DatasetConfig(data_path=[str(tmp_path / "d")], split="1")
    write_dataset(tmp_path / "d", [[1] * 40, [2] * 40])
    build(config, 3, 0, 0)
    write_dataset(tmp_path / "d", [[3] * 20, [4] * 50, [5] * 10])
    after = build(config, 3, 0, 0)
    assert after.train is not None
    assert set(after.train[0]["tokens"].tolist()) <= {3, 4, 5}


def test_splits_that_nobody_asks_for_are_not_built(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", toy_documents())
    built = build(DatasetConfig(data_path=[str(tmp_path / "d")], split="100,0,0"), 5, 5, 0)
    assert built.train is not None
    assert built.valid is None
    assert built.test is None


def test_a_split_that_is_asked_for_and_has_no_documents_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", toy_documents())
    with pytest.raises(UserError, match=r"the test split of .*d has no documents \(0 of 20\), but 8 sample"):
        build(DatasetConfig(data_path=[str(tmp_path / "d")]), 5, 5, 8)


def test_ids_beyond_the_vocabulary_are_found_before_training(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", toy_documents())
    config = DatasetConfig(data_path=[str(tmp_path / "d")], split="100")
    with pytest.raises(UserError, match=r"d\.bin holds token id 289, the vocabulary has 289 tokens"):
        build(config, 5, 0, 0, tokenizer=NullTokenizer(289))
    assert build(config, 5, 0, 0, tokenizer=NullTokenizer(290)).train is not None


def test_a_full_pass_needs_no_weights(blend: list[str]) -> None:
    with pytest.raises(UserError, match="a full pass over the valid split needs datasets without weights"):
        build(DatasetConfig(data_path=weighted(blend), split="90,5,5"), 10, None, 0)
    built = build(DatasetConfig(data_path=blend, split="90,5,5"), 10, None, 0)
    assert built.valid is not None
    assert len(built.valid) == 18


def test_dataset_seed_wins_over_the_runs(blend: list[str]) -> None:
    def first(random_seed: int | None, seed: int) -> list[int]:
        config = DatasetConfig(data_path=blend[:1], random_seed=random_seed)
        built = build_datasets(config, seq_length=16, seed=seed, tokenizer=NullTokenizer(500), num_samples=(50, 0, 0))
        assert built.train is not None
        return built.train[0]["tokens"].tolist()

    assert first(7, 1) == first(7, 2) == first(None, 7)
    assert first(None, 1) != first(None, 7)


def test_description_is_plain_and_names_the_files(blend: list[str]) -> None:
    described = build(DatasetConfig(data_path=weighted(blend), split="90,5,5"), 100, 20, 0).describe()
    json.dumps(described)
    assert list(described) == ["train", "valid"]
    part = described["train"]["datasets"][0]
    assert part["source"]["prefix"] == os.path.abspath(blend[0])
    assert len(part["source"]["idx_sha256"]) == 64
    assert part["documents"] == [0, 36]


def test_collate_stacks_every_array(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", toy_documents())
    config = DatasetConfig(data_path=[str(tmp_path / "d")], split="100", reset_attention_mask=True)
    dataset = build(config, 5, 0, 0).train
    assert dataset is not None
    batch = collate([dataset[0], dataset[1]])
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "tokens": ((2, 16), torch.int64),
        "labels": ((2, 16), torch.int64),
        "loss_mask": ((2, 16), torch.float32),
        "position_ids": ((2, 16), torch.int64),
        "document_ids": ((2, 16), torch.int64),
    }
    assert batch["tokens"][1].tolist() == dataset[1]["tokens"].tolist()
    assert batch_hash(batch["tokens"], batch["labels"]) == hash_of(dataset, 2)


def test_mock_data_is_built_quickly() -> None:
    start = time.process_time()
    build_datasets(
        DatasetConfig(mock=True), seq_length=512, seed=1, tokenizer=NullTokenizer(32000), num_samples=(1000, 100, 50)
    )
    assert time.process_time() - start < 1
