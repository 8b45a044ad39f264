from pathlib import Path

import numpy as np
import pytest

from lockstep.config.data import DatasetConfig
from lockstep.data.build import sample_rules
from lockstep.data.gpt_dataset import GPTDataset
from lockstep.data.indexed import IndexedDataset
from lockstep.data.tokenizers import NullTokenizer
from lockstep.errors import UserError
from tests.data.helpers import rules, toy_documents, whole, write_dataset

EOD = 7
PAD = 3


def one_sample(tmp_path: Path, tokens: list[int], **how: bool | int) -> dict[str, list[float]]:
    """The only sample of a corpus of one document."""
    write_dataset(tmp_path / "d", [tokens])
    dataset = whole(tmp_path / "d", None, rules(len(tokens) - 1, eod=EOD, **how))  # type: ignore[arg-type]
    sample = dataset[0]
    return {name: values.tolist() for name, values in sample.items()}  # type: ignore[attr-defined]


def test_labels_are_the_next_tokens(tmp_path: Path) -> None:
    sample = one_sample(tmp_path, [1, 2, EOD, 4, 5])
    assert sample["tokens"] == [1, 2, EOD, 4]
    assert sample["labels"] == [2, EOD, 4, 5]
    assert sample["loss_mask"] == [1, 1, 1, 1]
    assert sample["position_ids"] == [0, 1, 2, 3]
    assert "document_ids" not in sample


def test_types(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [[1, 2, 3]])
    sample = whole(tmp_path / "d", None, rules(2, reset_attention_mask=True))[0]
    kinds = {name: values.dtype.name for name, values in sample.items()}  # type: ignore[attr-defined]
    assert kinds == {
        "tokens": "int64",
        "labels": "int64",
        "loss_mask": "float32",
        "position_ids": "int64",
        "document_ids": "int64",
    }


def test_eod_mask_loss(tmp_path: Path) -> None:
    assert one_sample(tmp_path, [1, EOD, 2, EOD, 5], eod_mask_loss=True)["loss_mask"] == [1, 0, 1, 0]


def test_positions_restart_after_an_end_of_document(tmp_path: Path) -> None:
    tokens = [1, EOD, 2, 4, EOD, EOD, 6, 1]
    assert one_sample(tmp_path, tokens, reset_position_ids=True)["position_ids"] == [0, 1, 0, 1, 2, 0, 0]


def test_document_ids_count_ends_before_a_token(tmp_path: Path) -> None:
    tokens = [EOD, 1, EOD, 2, 4, EOD, 1]
    assert one_sample(tmp_path, tokens, reset_attention_mask=True)["document_ids"] == [0, 1, 1, 2, 2, 2]


def test_padding_has_no_loss_and_becomes_0(tmp_path: Path) -> None:
    sample = one_sample(tmp_path, [1, 2, PAD, PAD, 5], pad=PAD)
    assert sample["tokens"] == [1, 2, 0, 0]
    assert sample["labels"] == [2, 0, 0, 5]
    assert sample["loss_mask"] == [1, 0, 0, 1]


def test_the_first_mask_read_stays_as_in_megatron_lm(tmp_path: Path) -> None:
    documents = [[1, PAD, 1, 1, 1], [1, 1, 1, PAD, 1]]
    write_dataset(tmp_path / "d", documents)

    def masks(order: list[int], eod_mask_loss: bool) -> list[list[float]]:
        dataset = whole(tmp_path / "d", 2, rules(4, pad=PAD, eod=EOD, eod_mask_loss=eod_mask_loss))
        return [dataset[i]["loss_mask"].tolist() for i in order]

    alone = {0: masks([0], False)[0], 1: masks([1], False)[0]}
    assert alone[0] != alone[1]
    both = np.minimum(alone[0], alone[1]).tolist()
    assert masks([0, 1, 0], False) == [alone[0], both, alone[0]]
    assert masks([1, 0], False) == [alone[1], both]
    assert masks([0, 1], True) == [alone[0], alone[1]]


@pytest.mark.parametrize(("pad", "allow", "expected"), [(3, False, 3), (9, False, -1), (9, True, 9), (-1, False, -1)])
def test_a_pad_that_is_the_end_of_document_masks_nothing(pad: int, allow: bool, expected: int) -> None:
    config = DatasetConfig(mock=True, allow_ambiguous_pad_tokens=allow)
    assert sample_rules(config, 8, NullTokenizer(10, 9, pad)).pad == expected


def test_samples_do_not_share_memory_with_the_file(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [[1, 2, 3, 4]])
    dataset = whole(tmp_path / "d", None, rules(3))
    dataset[0]["tokens"][:] = 0
    assert dataset[0]["tokens"].tolist() == [1, 2, 3]


def test_an_id_beyond_the_vocabulary_is_named_when_read(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [[1, 2, 50, 4]])
    with pytest.raises(UserError, match=r"d holds token id 50, the vocabulary has 50 tokens \(0 to 49\); use the tok"):
        whole(tmp_path / "d", None, rules(3, vocab_size=50))[0]


def test_there_is_no_sample_beyond_the_last_or_before_the_first(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", toy_documents())
    dataset = whole(tmp_path / "d", None, rules(16))
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize("num_samples", [None, 5])
def test_a_split_without_documents_is_refused(tmp_path: Path, num_samples: int | None) -> None:
    write_dataset(tmp_path / "d", toy_documents())
    with pytest.raises(UserError, match=r"the valid split of .*d has no documents \(0 of 20\).*--split"):
        GPTDataset(
            IndexedDataset(tmp_path / "d"),
            np.arange(0, dtype=np.int32),
            split="valid",
            num_samples=num_samples,
            rules=rules(16),
            seed=1,
        )


@pytest.mark.parametrize(("documents", "num_samples"), [([[], []], 5), ([[1]], 5), ([[1, 2, 3]], None)])
def test_too_few_tokens_are_refused(tmp_path: Path, documents: list[list[int]], num_samples: int | None) -> None:
    write_dataset(tmp_path / "d", documents)
    with pytest.raises(UserError, match=r"the train split of .*d has too few tokens for a sample of 16: \d in"):
        whole(tmp_path / "d", num_samples, rules(16))
