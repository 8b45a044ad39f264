"""Fine-tuning runs: the same through both doors, packed as alone, resumed, shared out, and what the record says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.config import ConfigContainer, resolve
from lockstep.data.sft.dataset import SFTDataset
from lockstep.errors import ConfigError, UserError
from lockstep.megatron_lm.door import main as flag_door
from lockstep.megatron_lm.parser import parse_flags
from lockstep.parallel import Axis
from lockstep.recipes.door import main as recipe_door
from lockstep.recipes.door import parse_recipe_args
from lockstep.training import Command, run
from lockstep.training.setup import _feed
from tests.data.sft.conftest import write_lines, write_tokenizer

_CLOCKED = ("seconds", "tokens_per_second", "memory_bytes")
SMALL = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 48 --max-position-embeddings 48 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 6 --lr 1e-2 --eval-iters 1 --eval-interval 3 "
    "--position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 --device cpu --log-interval 1 "
    "--tokenizer-type HuggingFaceTokenizer"
).split()
SFT = "--sft --dataloader-type batch --sft-packing --sft-prompt-column q --sft-completion-column a".split()
OVERRIDES = (
    "--recipe vanilla_gpt_pretrain_config model.num_layers=1 model.hidden_size=16 model.num_attention_heads=2 "
    "model.seq_length=48 model.max_position_embeddings=48 train.micro_batch_size=2 train.global_batch_size=4 "
    "train.train_iters=6 optimizer.lr=1e-2 validation.eval_iters=1 validation.eval_interval=3 "
    "model.position_embedding_type=rope model.hidden_dropout=0 model.attention_dropout=0 run.device=cpu "
    "logger.log_interval=1 tokenizer.tokenizer_type=HuggingFaceTokenizer model.ffn_hidden_size=64 "
    "optimizer.min_lr=0 optimizer.weight_decay=0.01 mixed_precision.bf16=false "
    "dataset.sft=true dataset.dataloader_type=batch dataset.preprocessing={prompt_column:q,completion_column:a} "
    "dataset.packed_sequence_specs.packed_sequence_size=48"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a question and an answer a line, of uneven lengths."""
    root = tmp_path_factory.mktemp("sft")
    write_tokenizer(root / "tokenizer")
    for name, count in (("training", 22), ("validation", 5), ("test", 5)):
        rows = [{"q": "how many?"[: i % 9], "a": str(7 * i) * (i % 3 + 1)} for i in range(count)]
        write_lines(root / f"{name}.jsonl", rows)
    return root


def words_of(folder: Path) -> list[str]:
    return [*SMALL, *SFT, "--tokenizer-model", str(folder / "tokenizer"), "--dataset-root", str(folder)]


def config_of(folder: Path, *more: str, without: tuple[str, ...] = (), **changes: Any) -> ConfigContainer:
    words = [word for word in words_of(folder) if word not in without]
    config = parse_flags([*words, *more])
    for path, value in changes.items():
        config.section(path.partition("__")[0]).assign(path.partition("__")[2], value, config.origin("run.dir"))
    return resolve(config)


def lines_of(config: ConfigContainer, run_dir: Path) -> list[dict[str, Any]]:
    config.run.dir = str(run_dir)
    run(config, door="python", command=Command(["test"]), name="sft")
    return read_lines(run_dir)


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _CLOCKED} for line in lines]


def test_both_doors_train_bit_by_bit_alike(folder: Path, tmp_path: Path) -> None:
    flag_door([*words_of(folder), "--run-dir", str(tmp_path / "flags")])
    named = [f"tokenizer.tokenizer_model={folder / 'tokenizer'}", f"dataset.dataset_root={folder}"]
    recipe = [*OVERRIDES, *named]
    flags, overrides = (
        resolve(config) for config in (parse_flags(words_of(folder)), parse_recipe_args(OVERRIDES + named))
    )
    assert flags.dataset.as_dict() | {"packed_sequence_size": 48} == overrides.dataset.as_dict()
    # What the recipe has otherwise is said anew, so that both trees are the same run.
    same = [
        f"{path}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
        for path in ("optimizer", "scheduler", "model", "ddp", "validation", "train", "mixed_precision", "rng")
        for path, value in _differing(flags, overrides, path)
    ]
    recipe_door([*recipe, *same, f"run.dir={tmp_path / 'recipe'}"])
    first = read_lines(tmp_path / "flags")
    assert [line["iteration"] for line in first if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert first[0]["lm_loss"] > first[-1]["lm_loss"] > 0
    assert read_lines(tmp_path / "recipe") == first


def _differing(flags: ConfigContainer, overrides: ConfigContainer, section: str) -> list[tuple[str, Any]]:
    return [
        (info.path, value)
        for info, value, origin in flags.section(section).items()
        if overrides.get(info.path) != value and origin.kind != "derived"
    ]


def test_packed_texts_have_the_loss_of_the_same_texts_alone(folder: Path, tmp_path: Path) -> None:
    """One batch of all texts, in packs or each alone: their mean loss per token is the same."""
    packs = SFTDataset.__len__(_train_set(config_of(folder, without=("--dataloader-type", "batch"))))
    found = []
    for name, batch, without in (("packed", packs, ()), ("alone", 22, ("--sft-packing",))):
        config = config_of(folder, without=("--dataloader-type", "batch", *without))
        config.train.micro_batch_size, config.train.global_batch_size, config.train.train_iters = 1, batch, 1
        config.model.calculate_per_token_loss = True
        config.validation.eval_iters = 0
        found.append(lines_of(config, tmp_path / name)[0])
    packed, alone = found
    assert packs < 8
    assert packed["valid_tokens"] == alone["valid_tokens"]
    assert packed["lm_loss"] == pytest.approx(alone["lm_loss"], rel=1e-6)
    assert packed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


def _train_set(config: ConfigContainer) -> SFTDataset:
    return _datasets(config, None)


def _datasets(config: ConfigContainer, samples: int | None) -> SFTDataset:
    from lockstep.data.build import build_datasets
    from lockstep.data.tokenizers import build_tokenizer

    found = build_datasets(
        config.dataset,
        seq_length=48,
        seed=config.rng.seed,
        tokenizer=build_tokenizer(config.tokenizer),
        num_samples=(samples, 0, 0),
    ).train
    assert isinstance(found, SFTDataset)
    return found


def test_the_record_counts_learned_tokens_and_describes_the_data(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    dataset = _datasets(config, 24)
    lines = lines_of(config, tmp_path / "run")
    trained = [line for line in lines if line["kind"] == "train"]
    for number, line in enumerate(trained):
        masks = [dataset[i]["loss_mask"].sum() for i in range(4 * number, 4 * number + 4)]
        assert line["valid_tokens"] == sum(masks)
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (data["train"]["texts"], data["train"]["sequences"]) == (22, dataset.num_sequences)
    masks = [dataset.sequence(number)["loss_mask"].sum() for number in range(dataset.num_sequences)]
    assert data["train"]["learned_tokens"] == sum(masks)
    assert {line["split"] for line in lines if line["kind"] == "evaluation"} == {"valid", "test"}


def test_the_batch_hash_tells_what_is_learned(folder: Path, tmp_path: Path) -> None:
    hashes = {}
    for mode in ("completion", "all"):
        lines = lines_of(config_of(folder, "--sft-loss-mode", mode, "--eval-iters", "0"), tmp_path / mode)
        hashes[mode] = [line["batch_hash"] for line in lines]
        assert len(set(hashes[mode])) == 6
    assert not set(hashes["completion"]) & set(hashes["all"])


@pytest.mark.parametrize("more", [[], ["--sft-packing"]])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(folder: Path, tmp_path: Path, more: list[str]) -> None:
    """Ten iterations and ten more, over the end of several epochs."""
    small = ("--sft-packing",)

    def configured(**changes: Any) -> ConfigContainer:
        return config_of(folder, *more, "--train-iters", "20", "--eval-interval", "5", without=small, **changes)

    whole = lines_of(configured(), tmp_path / "whole")
    root = str(tmp_path / "checkpoints")
    saving = {"checkpoint__save": root, "checkpoint__save_interval": 10}
    first = lines_of(configured(**saving, train__exit_interval=10), tmp_path / "first")
    second = lines_of(configured(checkpoint__load=root), tmp_path / "second")
    assert first + second == whole
    assert len({line["batch_hash"] for line in whole if line["kind"] == "train"}) > 15


@pytest.mark.parametrize("longest", [False, True])
@pytest.mark.parametrize("kind", ["single", "batch"])
def test_data_parallel_processes_share_out_what_one_takes(folder: Path, kind: Any, longest: bool) -> None:
    config = config_of(folder, without=("--sft-packing", "--dataloader-type", "batch"))
    config.dataset.dataloader_type, config.dataset.pad_to_max_length = kind, not longest
    dataset = _datasets(config, 64)

    class Mesh:
        def __init__(self, rank: int, size: int) -> None:
            self.dp = Axis(size, rank)

    def batches(rank: int, size: int) -> list[Any]:
        feed = _feed(config, dataset, "train", 2, Mesh(rank, size))  # type: ignore[arg-type]  # dp is all it takes
        feed.seek(8)
        return [feed.next(4 // size) for _ in range(5)]

    shapes = set()
    for one, first, second in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        shared = torch.stack([first.tokens.unflatten(0, (-1, 2)), second.tokens.unflatten(0, (-1, 2))], dim=1)
        assert torch.equal(one.tokens, shared.flatten(0, 2))
        assert torch.equal(one.loss_mask.sum(), first.loss_mask.sum() + second.loss_mask.sum())
        shapes.add(one.tokens.shape[1])
    assert shapes <= {16, 32} if longest else shapes == {48}


def test_padding_to_the_longest_changes_no_loss(folder: Path, tmp_path: Path) -> None:
    """Padding has no loss and nobody attends to it; sums over rows of another length round otherwise."""
    without = ("--sft-packing",)
    full = lines_of(config_of(folder, without=without), tmp_path / "full")
    short = lines_of(config_of(folder, "--sft-pad-to-longest", without=without), tmp_path / "short")
    for one, other in zip(full, short, strict=True):
        assert other["lm_loss"] == pytest.approx(one["lm_loss"], rel=1e-5)
        assert other.get("valid_tokens") == one.get("valid_tokens")


def test_the_two_ways_of_averaging_uneven_answers_differ(folder: Path, tmp_path: Path) -> None:
    norms = []
    for per_token in (False, True):
        config = config_of(folder, "--eval-iters", "0", without=("--sft-packing",))
        config.model.calculate_per_token_loss = per_token
        norms.append(lines_of(config, tmp_path / str(per_token))[0])
    assert norms[0]["lm_loss"] == norms[1]["lm_loss"], "the loss that is reported is the mean over tokens either way"
    assert norms[0]["grad_norm"] != pytest.approx(norms[1]["grad_norm"], rel=1e-3)


def test_validation_can_be_left_out_and_missing_data_is_said(folder: Path, tmp_path: Path) -> None:
    lines = lines_of(config_of(folder, "--sft-no-validation"), tmp_path / "run")
    assert [line["split"] for line in lines if line["kind"] == "evaluation"] == ["test"]
    config = config_of(folder, "--sft-no-test", "--sft-no-validation")
    assert all(line["kind"] == "train" for line in lines_of(config, tmp_path / "none"))
    words = [*SMALL, *SFT, "--tokenizer-model", str(folder / "tokenizer"), "--train-data-path"]
    config = resolve(parse_flags([*words, str(folder / "training.jsonl")]))
    with pytest.raises(UserError, match=r"the validation split has no data for fine-tuning.*do_validation=false"):
        lines_of(config, tmp_path / "missing")


def test_samples_are_shown_through_both_doors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flag_door([*words_of(folder), "--show-samples", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].startswith("train: 22 texts of 22 rows, packed into ")
    assert [line[:13] for line in shown.splitlines() if line.startswith("---")] == ["--- sample 0:", "--- sample 1:"]
    assert "<eos>]]" in shown
    named = [f"tokenizer.tokenizer_model={folder / 'tokenizer'}", f"dataset.dataset_root={folder}"]
    assert recipe_door([*OVERRIDES, *named, "--show-samples", "2"]) == 0
    assert capsys.readouterr().out == shown
    with pytest.raises(UserError, match=r"add dataset.sft \(--sft\)"):
        flag_door([*SMALL, "--mock-data", "--show-samples", "2", "--tokenizer-model", str(folder / "tokenizer")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sft-packed-sequence-size", "32"], "--sft-packed-sequence-size = 32 is not --seq-length = 48"),
        (["--data-path", "x"], "--dataset-root and --data-path exclude each other"),
        (["--sft-prompt-template", "x"], r"--sft-prompt-template = 'x' has no \{prompt\}"),
        (["--sft-pad-to-longest"], "--sft-pad-to-longest has no effect on packed sequences"),
        (["--reset-position-ids"], "--reset-position-ids has no effect on fine-tuning data"),
        (["--hf-validation-proportion", "1.5"], "--hf-validation-proportion = 1.5: give a share"),
        (["--hf-dataset-name", "squad"], "data sets of the Hugging Face hub are not downloaded"),
        (["--sft-max-single-sequence-length", "49"], "--sft-max-single-sequence-length = 49: give 2 to"),
        (["--sft-pad-seq-to-mult", "0"], "--sft-pad-seq-to-mult = 0: give 1 or more"),
        (["--tokenizer-type", "SFTTokenizer"], "nemotron-h-aligned: NVIDIA's templates are not part of Lockstep"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder: Path, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(parse_flags([*words_of(folder), *more]))


def test_settings_of_fine_tuning_need_it(folder: Path) -> None:
    words = [word for word in words_of(folder) if word != "--sft"]
    with pytest.raises(ConfigError) as caught:
        resolve(parse_flags(words))
    text = str(caught.value)
    for flag in ("--dataset-root", "--sft-packing", "--sft-prompt-column"):
        assert f"{flag} has no effect without dataset.sft (--sft)" in text
    assert "--dataloader-type = batch is the order of fine-tuning data" in text
    config = parse_recipe_args([*OVERRIDES])
    with pytest.raises(ConfigError, match="no data for fine-tuning is named"):
        resolve(config)
