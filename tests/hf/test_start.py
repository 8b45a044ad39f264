"""Runs that start from Hugging Face weights: directly, or from an imported checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli import main
from lockstep.config import resolve
from lockstep.errors import ConfigError
from lockstep.guard import USER_ERROR
from lockstep.megatron_lm.parser import parse_flags
from tests.hf.tiny import saved, with_tokenizer

FLAGS = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --mock-data --lr 1e-3 --eval-iters 0 "
    "--tokenizer-type NullTokenizer --vocab-size 69 --use-checkpoint-args --device cpu"
).split()


def trained(run: Path, *words: str) -> tuple[dict[str, Any], list[float]]:
    """Train and return what the record says of the run, and its losses."""
    assert main(["pretrain-gpt", *FLAGS, "--run-dir", str(run), *words]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "run.json").read_text()), [line["lm_loss"] for line in lines if "lm_loss" in line]


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "deepseek_v2"])
def test_a_run_starts_from_either_folder(family, tmp_path, capsys) -> None:
    source, ours = saved(tmp_path / "hf", family), str(tmp_path / "ours")
    assert main(["convert", "import", str(source), ours]) == 0
    dropout = ["--hidden-dropout", "0", "--attention-dropout", "0"]
    direct, losses = trained(tmp_path / "a", *dropout, "--pretrained-checkpoint", str(source))
    for name, words in (("b", ["--load", ours, "--finetune"]), ("c", ["--pretrained-checkpoint", ours])):
        run, same = trained(tmp_path / name, *dropout, *words)
        assert same == losses
        assert run["initial_weights"]["fingerprint"] == direct["initial_weights"]["fingerprint"]
    assert direct["resumed_from"]["checkpoint"] == str(source)
    assert "fine-tuning from iteration 0 with the weights of" in capsys.readouterr().out


def test_a_run_of_its_own_goes_before_pretrained_weights(tmp_path, capsys) -> None:
    source, saves = saved(tmp_path / "hf", "llama"), str(tmp_path / "saves")
    words = ["--pretrained-checkpoint", str(source), "--load", saves, "--save", saves, "--save-interval", "1"]
    _, first = trained(tmp_path / "a", *words, "--exit-interval", "1")
    assert "fine-tuning from iteration 0" in capsys.readouterr().out
    _, rest = trained(tmp_path / "b", *words)
    assert f"resuming from {saves} at iteration 1" in capsys.readouterr().out
    assert (len(first), len(rest)) == (1, 1)


def test_another_model_is_refused(tmp_path, capsys) -> None:
    source = saved(tmp_path / "hf", "llama")
    words = [word for word in FLAGS if word != "--use-checkpoint-args"]
    sizes = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"]
    assert main(["pretrain-gpt", *words, *sizes, "--pretrained-checkpoint", str(source)]) == USER_ERROR
    message = capsys.readouterr().err
    assert "normalization is LayerNorm, in config.json RMSNorm" in message
    small = ["--padded-vocab-size", "69", "--pretrained-checkpoint", str(source)]
    assert main(["pretrain-gpt", *FLAGS, *small]) == USER_ERROR
    assert "model.vocab_size = 69 is below the vocabulary of 70" in capsys.readouterr().err
    assert main(["pretrain-gpt", *words, *sizes, "--pretrained-checkpoint", str(tmp_path / "none")]) == USER_ERROR
    assert "there is no such folder" in capsys.readouterr().err


def test_the_tokenizer_of_the_pretrained_model_is_taken_where_none_is_named(tmp_path) -> None:
    source = with_tokenizer(saved(tmp_path / "hf", "llama"))
    assert main(["convert", "import", str(source), str(tmp_path / "ours")]) == 0
    sizes = "--num-layers 1 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8"
    flags = [*sizes.split(), "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1", "--mock-data"]
    flags += ["--tokenizer-type", "HuggingFaceTokenizer"]
    carried = tmp_path / "ours" / "iter_0000000" / "hf"
    for folder, expected in ((source, source), (tmp_path / "ours", carried)):
        config = resolve(parse_flags([*flags, "--pretrained-checkpoint", str(folder)]))
        assert config.tokenizer.tokenizer_model == str(expected)
        assert config.origin("tokenizer.tokenizer_model").kind == "checkpoint"
    named = ["--tokenizer-model", "mine", "--pretrained-checkpoint", str(source)]
    assert resolve(parse_flags([*flags, *named])).tokenizer.tokenizer_model == "mine"
    assert resolve(parse_flags(flags)).tokenizer.tokenizer_model is None
    with pytest.raises(ConfigError, match="none"):
        resolve(parse_flags([*flags, "--pretrained-checkpoint", str(tmp_path / "none")]))
