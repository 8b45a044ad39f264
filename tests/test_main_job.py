"""The main job at a tiny size, from the command line to the verdict, and mistakes about data and folders."""

import json
from pathlib import Path

import numpy as np
import pytest

from lockstep.cli import main
from lockstep.data.indexed import IndexedDatasetWriter
from lockstep.guard import USER_ERROR
from lockstep.megatron_lm.parser import parse_flags
from lockstep.recipes.translate import overrides_from_config

SIZES = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 256 --micro-batch-size 2 "
    "--global-batch-size 4 --train-iters 4 --eval-iters 1 --eval-interval 2 --lr 1e-3 --bf16 --log-interval 1 "
    "--tokenizer-type NullTokenizer --vocab-size 64 --device cpu"
).split()
MOCK = [*SIZES, "--mock-data"]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Write a token file of 20 documents with ids below 60; return its prefix."""
    prefix = str(tmp_path / "corpus")
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(20):
            writer.add_document(generator.integers(1, 60, size=1000))
        writer.finalize()
    return prefix


def flags(run_dir: Path, *words: str) -> int:
    return main(["pretrain-gpt", *words, "--run-dir", str(run_dir)])


def recipe(run_dir: Path, words: list[str], *more: str) -> int:
    overrides = overrides_from_config(parse_flags(words))
    return main(["train", "--recipe", "vanilla_gpt_pretrain_config", *overrides, *more, f'run.dir="{run_dir}"'])


def verdict(tmp_path: Path) -> tuple[int, dict]:
    code = main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "report")])
    return code, json.loads((tmp_path / "report/report.json").read_text())


@pytest.mark.parametrize("data", ["mock", "real"])
def test_both_doors_train_the_same_run_to_the_last_bit(tmp_path: Path, corpus: str, data: str) -> None:
    words = MOCK if data == "mock" else [*SIZES, "--data-path", corpus, "--split", "70,15,15"]
    assert flags(tmp_path / "a", *words) == 0
    assert recipe(tmp_path / "b", words) == 0
    code, report = verdict(tmp_path)
    assert (code, report["verdict"]) == (0, "identical")
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("train") == 4
    assert [line["kind"] for line in lines].count("evaluation") == 4


def test_a_warmup_on_one_side_is_named_as_the_cause(tmp_path: Path) -> None:
    assert flags(tmp_path / "a", *MOCK) == 0
    assert recipe(tmp_path / "b", MOCK, "scheduler.lr_warmup_iters=1", "scheduler.lr_warmup_init=${optimizer.lr}") == 0
    code, report = verdict(tmp_path)
    assert (code, report["verdict"]) == (1, "config")
    assert report["cause"].startswith("scheduler.lr_warmup_iters (0 against 1) differs: losses are equal through")


def test_another_seed_is_named_as_the_cause(tmp_path: Path) -> None:
    assert flags(tmp_path / "a", *MOCK) == 0
    assert flags(tmp_path / "b", *MOCK, "--seed", "7") == 0
    code, report = verdict(tmp_path)
    assert (code, report["verdict"]) == (1, "config")
    assert "rng.seed (1234 against 7)" in report["cause"]


def message(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == USER_ERROR
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flags(tmp_path / "a", *MOCK, "--skip-train") == 0
    before = (tmp_path / "a/run.json").read_bytes()
    assert str(tmp_path / "a") in message(capsys, flags(tmp_path / "a", *MOCK))
    assert (tmp_path / "a/run.json").read_bytes() == before


def test_bad_data_is_one_message_and_leaves_no_run_behind(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def problem(prefix: str, *words: str) -> str:
        text = message(capsys, flags(tmp_path / "a", *SIZES, "--data-path", prefix, *words))
        assert not (tmp_path / "a").exists()
        return text

    assert f"{tmp_path}/none" in problem(f"{tmp_path}/none")
    assert "split" in problem(corpus, "--split", "99,0.5,0.5")
    small_vocabulary = problem(corpus, "--split", "70,15,15", "--vocab-size", "32")
    assert corpus in small_vocabulary
    assert "32" in small_vocabulary
    index = Path(f"{corpus}.idx")
    index.write_bytes(index.read_bytes()[:-5])
    assert str(index) in problem(corpus)
