"""Datasets of a run: sources by split, samples, order, and a cache that cannot be stale."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.cli import main
from lockstep.config.data import DatasetConfig
from lockstep.data.build import Datasets, build_datasets
from lockstep.data.sft import store
from lockstep.data.sft.build import divided
from lockstep.data.sft.dataset import SFTDataset
from lockstep.data.tokenizers import NullTokenizer, Tokenizer
from lockstep.errors import UserError
from tests.data.sft.conftest import load, write_lines, write_tokenizer

EOS, PAD = 0, 2


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"input": "q" * (i % 5), "output": f"{i:04d}"} for i in range(first, first + count)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, count, first in (("training", 20, 0), ("validation", 6, 100), ("test", 4, 200)):
        write_lines(tmp_path / f"{name}.jsonl", rows(count, first))
    return tmp_path


def build(
    tokenizer: Tokenizer,
    samples: tuple[int | None, int | None, int | None] = (20, 6, 4),
    length: int = 12,
    **fields: Any,
) -> Datasets:
    config = DatasetConfig(sft=True, **fields)
    return build_datasets(config, seq_length=length, seed=5, tokenizer=tokenizer, num_samples=samples)


def dataset_of(tokenizer: Tokenizer, samples: int | None = 20, length: int = 12, **fields: Any) -> SFTDataset:
    found = build(tokenizer, (samples, 0, 0), length, **fields).train
    assert isinstance(found, SFTDataset)
    return found


def completions(tokenizer: Tokenizer, dataset: Any, count: int | None = None) -> list[str]:
    """Return what is learned in each sample, as text."""
    samples = [dataset[i] for i in range(len(dataset) if count is None else count)]
    return [tokenizer.detokenize(s["labels"][s["loss_mask"] > 0].tolist()) for s in samples]


def test_a_sample_is_the_text_shifted_by_one_and_padded(tokenizer: Tokenizer, root: Path) -> None:
    sample = dataset_of(tokenizer, dataset_root=str(root))[2]
    text = [*tokenizer.tokenize_alone("qq 0002"), EOS]
    assert sample["tokens"].tolist() == [*text[:-1], *[PAD] * 5]
    assert sample["labels"].tolist() == [*text[1:], *[PAD] * 5]
    assert sample["loss_mask"].tolist() == [0, *[1] * 6, *[0] * 5]
    assert sample["position_ids"].tolist() == list(range(12))
    assert "document_ids" not in sample
    assert "rotary_positions" not in sample
    assert (sample["tokens"].dtype, sample["loss_mask"].dtype) == (np.int64, np.float32)


def test_a_pack_restarts_positions_and_numbers_its_texts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_lines(tmp_path / "training.jsonl", [{"input": "a", "output": "b"}, {"input": "cd", "output": "e"}])
    packed: dict[str, Any] = {"dataset_root": str(tmp_path), "enable_offline_packing": True}
    dataset = dataset_of(tokenizer, packing_algorithm="first_fit_decreasing", **packed)
    assert (len(dataset), dataset.num_sequences) == (20, 1)
    sample = dataset[0]
    assert tokenizer.detokenize(sample["tokens"].tolist()) == "cd ea b" + "<pad>" * 5
    assert tokenizer.detokenize(sample["labels"].tolist()) == "d e<eos> b<eos>" + "<pad>" * 5
    assert sample["loss_mask"].tolist() == [0, 1, 1, 1, 1, 1, 1, *[0] * 5]
    assert sample["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]
    assert sample["rotary_positions"].tolist() == sample["position_ids"].tolist()
    assert sample["document_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert dataset.filled == 7 / 12
    spaced = dataset_of(tokenizer, packing_algorithm="first_fit_decreasing", pad_seq_to_mult=4, **packed)[0]
    assert tokenizer.detokenize(spaced["tokens"].tolist()) == "a b<pad>cd e" + "<pad>" * 4
    assert spaced["document_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert spaced["position_ids"].tolist() == [0, 1, 2, 3] * 3


def test_packing_loses_and_changes_no_text(tokenizer: Tokenizer, root: Path) -> None:
    alone = completions(tokenizer, dataset_of(tokenizer, dataset_root=str(root)))
    dataset = dataset_of(tokenizer, None, 40, dataset_root=str(root), enable_offline_packing=True)
    together = completions(tokenizer, dataset)
    assert len(together) < 10
    pieces = [piece.strip() for text in together for piece in text.split("<eos>") if piece]
    assert sorted(pieces) == sorted(text.strip().removesuffix("<eos>") for text in alone)


def test_orders(tokenizer: Tokenizer, root: Path) -> None:
    """Rows in their order, over and over; shuffled anew each time; or each once for the cyclic sampler."""
    given = [f"{i:04d}" for i in range(20)]

    def order(kind: str, samples: int = 50) -> list[str]:
        dataset = dataset_of(tokenizer, samples, dataset_root=str(root), dataloader_type=kind)
        return [text.strip().removesuffix("<eos>") for text in completions(tokenizer, dataset)]

    assert order("single") == [*given, *given, *given[:10]]
    assert order("cyclic") == given
    shuffled = order("batch")
    assert len(shuffled) == 50
    assert sorted(shuffled[:20]) == sorted(shuffled[20:40]) == given
    assert given != shuffled[:20] != shuffled[20:40] != given
    assert order("batch", 90)[:50] == shuffled, "a longer run begins with the same samples"


def test_an_order_can_be_entered_anywhere(tokenizer: Tokenizer, root: Path) -> None:
    fields: dict[str, Any] = {"dataset_root": str(root), "dataloader_type": "batch"}
    one, other = (dataset_of(tokenizer, 60, **fields) for _ in range(2))
    forward = [one[i]["labels"].tolist() for i in range(60)]
    assert [other[i]["labels"].tolist() for i in reversed(range(60))] == forward[::-1]


def test_a_root_has_a_file_for_each_split(tokenizer: Tokenizer, root: Path) -> None:
    built = build(tokenizer, dataset_root=str(root))
    assert completions(tokenizer, built.valid, 1) == ["0100<eos>"]
    assert completions(tokenizer, built.test, 1) == ["0200<eos>"]
    without = build(tokenizer, dataset_root=str(root), do_validation=False, do_test=False)
    assert (without.valid, without.test) == (None, None)
    (root / "test.jsonl").unlink()
    assert build(tokenizer, dataset_root=str(root)).test is None
    (root / "training.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no training.jsonl; put training.jsonl, validation.jsonl, test.jsonl"):
        build(tokenizer, dataset_root=str(root))


def test_one_source_is_divided(tokenizer: Tokenizer, root: Path) -> None:
    path = str(root / "training.jsonl")
    built = build(tokenizer, (None, None, None), data_path=[path], split="80,10,10", dataloader_type="cyclic")
    assert [len(d) for d in (built.train, built.valid, built.test) if d] == [16, 2, 2]
    assert completions(tokenizer, built.valid) == [" 0016<eos>", " 0017<eos>"]
    built = build(tokenizer, (None, None, None), train_data_path=[path], hf_validation_proportion=0.2)
    assert built.train is not None
    assert built.valid is not None
    assert built.test is None
    train, valid = completions(tokenizer, built.train), completions(tokenizer, built.valid)
    assert (len(train), len(valid)) == (16, 4)
    everything = completions(tokenizer, dataset_of(tokenizer, train_data_path=[path]))
    assert sorted(train + valid) == sorted(everything)
    assert valid != everything[-4:]
    assert valid != everything[:4]
    with pytest.raises(UserError, match=r"the valid split of .* has none of 20 texts; give more data"):
        build(tokenizer, train_data_path=[path], hf_validation_proportion=0.01)


def test_a_division_does_not_depend_on_the_number_of_calls() -> None:
    first, again, other = (divided(50, 0.3, seed)["valid"].tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert divided(50, 0, 1).keys() == {"train"}
    assert sorted([*first, *divided(50, 0.3, 1)["train"].tolist()]) == list(range(50))


def test_a_saved_data_set_brings_its_splits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list(rows(5, 10 * i)) for i, name in enumerate(("train", "validation"))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    built = build(tokenizer, hf_dataset_path=str(tmp_path / "set"), hf_validation_proportion=0.5)
    assert completions(tokenizer, built.valid, 1) == ["0010<eos>"]
    assert isinstance(built.train, SFTDataset)
    assert built.train.num_sequences == 5
    one = build(
        tokenizer,
        hf_dataset_path=str(tmp_path / "set"),
        hf_dataset_split="validation",
        hf_validation_proportion=0.4,
    )
    assert isinstance(one.train, SFTDataset)
    assert isinstance(one.valid, SFTDataset)
    assert (one.train.num_sequences, one.valid.num_sequences) == (3, 2)


def test_rows_with_nothing_to_learn_are_counted_and_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    given = [
        *rows(3),
        {"input": "a", "output": " "},
        {"input": "a" * 30, "output": "b"},
        {"input": "", "output": "c" * 30},
    ]
    write_lines(tmp_path / "training.jsonl", given)
    dataset = dataset_of(tokenizer, dataset_root=str(tmp_path), truncation_field="completion")
    counts = dataset.store.counts
    assert (counts.rows, counts.kept, counts.without_completion, counts.completion_cut_away) == (6, 4, 1, 1)
    assert dataset.summary() == (
        "train: 4 texts of 6 rows, 1 left out without a completion, 1 left out because their completion does not fit, "
        f"1 shortened, in 4 sequences of 12 tokens, {dataset.filled:.1%} full"
    )
    assert dataset.store.rows.tolist() == [1, 2, 3, 6]
    assert dataset.describe()["rows"]["completion_cut_away"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "training.jsonl has no rows; give a file with at least one"),
        (
            [{"input": "a", "output": ""}] * 2,
            "nothing to learn in 2 rows: 2 without a completion or an answer, 0 whose",
        ),
    ],
)
def test_data_without_anything_to_learn_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, given: list[Any], message: str
) -> None:
    write_lines(tmp_path / "training.jsonl", given)
    with pytest.raises(UserError, match=message):
        build(tokenizer, dataset_root=str(tmp_path))


def test_weights_and_missing_data_are_refused(tokenizer: Tokenizer, root: Path) -> None:
    with pytest.raises(UserError, match=r"data of fine-tuning is not weighted: 0.5 in 0.5 x"):
        build(tokenizer, data_path=["0.5", "x"])
    with pytest.raises(UserError, match="no data for fine-tuning is named"):
        build(tokenizer)
    config = DatasetConfig(sft=True, dataset_root=str(root))
    with pytest.raises(UserError, match="holds token id"):
        build_datasets(config, seq_length=12, seed=1, tokenizer=tokenizer, num_samples=(1, 0, 0), vocab_size=20)


def test_generated_texts_need_no_files() -> None:
    built = build(NullTokenizer(50), length=64, mock=True, enable_offline_packing=True)
    assert isinstance(built.train, SFTDataset)
    assert isinstance(built.valid, SFTDataset)
    assert built.train.filled > 0.9
    sample = built.train[0]
    assert sample["loss_mask"].sum() > 10
    assert sample["tokens"].max() < 50
    assert not np.array_equal(sample["tokens"], built.valid[0]["tokens"])


def test_the_longest_of_a_range_is_found_over_epochs(tokenizer: Tokenizer, root: Path) -> None:
    dataset = dataset_of(tokenizer, 60, dataset_root=str(root), dataloader_type="batch")
    for start, stop in ((0, 4), (17, 25), (39, 41)):
        ends = [int(np.flatnonzero(dataset[i]["loss_mask"])[-1]) + 1 for i in range(start, stop)]
        assert dataset.longest(start, stop) == max(ends)


_CHANGES: dict[str, dict[str, Any]] = {
    "column": {"prompt_column": "output"},
    "template": {"prompt_template": "x{prompt}"},
    "separator": {"separator": "-"},
    "loss": {"loss_mode": "all"},
    "whitespace": {"strip_whitespace": False},
    "bos": {"add_bos": True},
    "sep": {"add_sep": True},
    "eos": {"add_eos": False},
    "end": {"truncation_method": "left"},
    "field": {"truncation_field": "completion"},
    "length": {"max_single_sequence_length": 7},
    "format": {"sft_format": "prompt"},
}


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the name of what is read instead of taken from the cache."""
    found: list[str] = []
    honest = store.read_texts

    def watched(*arguments: Any) -> store.Store:
        found.append(arguments[1])
        return honest(*arguments)

    monkeypatch.setattr(store, "read_texts", watched)
    return found


def test_a_cache_serves_what_it_was_made_of_and_nothing_else(
    tokenizer: Tokenizer, root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = reads(monkeypatch)

    def run(of: Tokenizer = tokenizer, **fields: Any) -> list[list[int]]:
        dataset = dataset_of(of, dataset_root=str(root), **fields)
        return [dataset[i]["tokens"].tolist() + dataset[i]["loss_mask"].tolist() for i in range(3)]

    first = run()
    assert len(seen) == 1
    assert run() == run(enable_offline_packing=False, do_test=False) == first
    assert len(seen) == 1
    for number, change in enumerate(_CHANGES.values(), start=2):
        run(**change)
        assert len(seen) == number, change
    count = len(seen)
    other = load(write_tokenizer(tmp_path_factory.mktemp("other"), ("00",)))
    assert run(other) != first
    templated = load(write_tokenizer(tmp_path_factory.mktemp("templated"), (), "{{ messages }}"))
    run(templated)
    assert len(seen) == count + 2
    text = (root / "training.jsonl").read_text()
    (root / "training.jsonl").write_text(text.replace("0001", "1001"))
    assert run() != first
    monkeypatch.setattr(store, "_VERSION", 2)
    run()
    assert len(seen) == count + 4


def test_a_damaged_cache_is_made_anew(tokenizer: Tokenizer, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "kept"
    fields: dict[str, Any] = {"dataset_root": str(root), "path_to_cache": str(folder)}
    whole = dataset_of(tokenizer, **fields)[0]["tokens"].tolist()
    seen = reads(monkeypatch)
    tokens = next(folder.glob("*-tokens.npy"))
    tokens.write_bytes(tokens.read_bytes()[:-4] + b"\1\1\1\1")
    assert dataset_of(tokenizer, **fields)[0]["tokens"].tolist() == whole
    assert len(seen) == 1


def test_data_show_marks_what_is_learned(root: Path, characters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain text into a pipe, from a folder of three files and from one file."""
    words = ["--seq-length", "20", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(characters)]
    assert main(["data", "show", str(root), "--samples", "2", *words]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 20 texts of 20 rows, in 20 sequences of 20 tokens, 35.0% full",
        "--- sample 0: 1 text, 5 of 20 places filled, 5 tokens learned",
        "- row 1",
        " [[0000<eos>]]",
        "--- sample 1: 1 text, 6 of 20 places filled, 6 tokens learned",
        "- row 2",
        "q[[ 0001<eos>]]",
    ]
    assert main(["data", "show", str(root / "training.jsonl"), "--sft-packing", "--sft-loss-mode", "all", *words]) == 0
    packed = capsys.readouterr().out
    assert packed.count("--- sample ") == 3
    assert "q[[q 0002<eos>]]" in packed or "q[[qq 0003<eos>]]" in packed
