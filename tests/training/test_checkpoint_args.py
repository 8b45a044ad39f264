"""Settings taken from a checkpoint: which, over what, and that the record says where they come from."""

import json
from pathlib import Path

import pytest

from lockstep.config import ConfigContainer, resolve
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags
from lockstep.recipes.door import parse_recipe_args
from lockstep.training import Command, run

_RUN = (
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 4 --eval-iters 0 --mock-data --lr 1e-2 "
    "--log-interval 1 --device cpu"
).split()
_MODEL = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 24 --seq-length 64 "
    "--max-position-embeddings 128 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0.1 "
    "--tokenizer-type NullTokenizer --vocab-size 50 --make-vocab-size-divisible-by 16"
).split()


def _train(config: ConfigContainer, run_dir: Path) -> None:
    config.run.dir = str(run_dir)
    run(resolve(config), door="python", command=Command(["prog"]), name="tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of checkpoints, beside the record, of a run of 4 iterations that stopped after 2."""
    root = tmp_path_factory.mktemp("saved")
    saving = ["--save", str(root / "ckpt"), "--save-interval", "2", "--exit-interval", "2"]
    _train(parse_flags([*_RUN, *_MODEL, *saving]), root / "run")
    return root / "ckpt"


def _taking(saved: Path, *words: str) -> ConfigContainer:
    return parse_flags([*_RUN, "--load", str(saved), "--use-checkpoint-args", *words])


def test_a_run_resumes_without_a_word_on_its_model(saved, tmp_path, capsys) -> None:
    _train(parse_flags([*_RUN, *_MODEL]), tmp_path / "whole")
    capsys.readouterr()
    _train(_taking(saved), tmp_path / "run")
    whole, rest = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "run"))
    losses = [[json.loads(line)["lm_loss"] for line in lines] for lines in (whole[2:], rest)]
    assert losses[0] == losses[1]
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.endswith(f"; resuming from {saved} at iteration 2")
    assert second.startswith("settings of the checkpoint: ")
    assert "model.num_layers = 1" in second
    assert "model.normalization = RMSNorm" in second
    assert "tokenizer.tokenizer_type = NullTokenizer" in second
    origins = json.loads((tmp_path / "run" / "run.json").read_text())["origins"]
    assert origins["model.hidden_size"] == "checkpoint (iter_0000002)"
    assert origins["train.micro_batch_size"] == "command line (--micro-batch-size)"


def test_given_sizes_stay_and_what_else_is_given_gives_way_aloud(saved, tmp_path, capsys) -> None:
    words = ["--seq-length", "32", "--attention-dropout", "0.3", "--no-load-optim"]
    config = resolve(_taking(saved, *words))
    assert (config.model.seq_length, config.model.max_position_embeddings) == (32, 128)
    assert config.model.attention_dropout == 0.1
    with pytest.raises(ValueError, match=r"model\.seq_length is 32, in the checkpoint 64"):
        _train(_taking(saved, *words), tmp_path / "refused")
    capsys.readouterr()
    _train(_taking(saved, "--attention-dropout", "0.3"), tmp_path / "run")
    replaced = "model.attention_dropout = 0.1 of the checkpoint replaces --attention-dropout = 0.3"
    assert replaced in capsys.readouterr().out.splitlines()


def test_a_recipe_gives_way(saved) -> None:
    words = ["--recipe", "vanilla_gpt_pretrain_config", "--load_dir", str(saved), "checkpoint.use_checkpoint_args=true"]
    config = resolve(parse_recipe_args(words))
    assert config.model.hidden_size == 16
    assert config.origin("model.hidden_size").kind == "checkpoint"


def test_the_layout_and_the_tokenizer_are_taken_when_asked(saved) -> None:
    assert resolve(_taking(saved, "--tensor-model-parallel-size", "2"), 2).model.tensor_model_parallel_size == 2
    layout = ["--tensor-model-parallel-size", "2", "--use-mp-args-from-checkpoint-args"]
    assert resolve(_taking(saved, *layout), 2).model.tensor_model_parallel_size == 1
    assert resolve(_taking(saved)).tokenizer.tokenizer_type == "NullTokenizer"
    words = ["--no-use-tokenizer-model-from-checkpoint-args"]
    assert resolve(_taking(saved, *words)).tokenizer.tokenizer_type == "GPT2BPETokenizer"


def test_what_cannot_be_taken_is_said_before_the_run(saved, tmp_path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        resolve(_taking(tmp_path / "nowhere"))
    with pytest.raises(ConfigError) as caught:
        resolve(parse_flags([*_RUN, *_MODEL, "--use-checkpoint-args"]))
    assert "--use-checkpoint-args has no effect without checkpoint.load (--load)" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        resolve(parse_flags([*_RUN, *_MODEL, "--use-mp-args-from-checkpoint-args"]))
    text = "--use-mp-args-from-checkpoint-args has no effect without checkpoint.use_checkpoint_args"
    assert text in str(caught.value)
