"""YAML files and quoted command lines as sources."""

from pathlib import Path

import pytest

from lockstep.errors import ConfigError
from lockstep.translation.nemo import RECIPE, read_nemo
from lockstep.translation.sources import define, split_args, yaml_flags, yaml_overrides
from lockstep.translation.words import plain


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "model_config.yaml"
    file.write_text(text)
    return file


def test_model_args_become_words_as_megatron_lm_makes_them(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
ENV_VARS: {NCCL_ALGO: Ring}
COMMON: &common
  --num-layers: 2
  --lr: 1e-5
MODEL_ARGS:
  <<: *common
  --bf16: true
  --lr: 2e-5
  --offload-modules: [expert_fc1 moe_act]
  --recompute-modules: "[moe_act]"
  --moe-layer-freq: ([0]*3+[1]*2)
  --data-path: ${DATA_PATH}/a b
  --empty: ""
""",
    )
    words = [word.text for word in yaml_flags(file)]
    assert words[words.index("--lr") + 1] == "2e-5"
    assert words.count("--lr") == 1
    joined = " ".join(words)
    for expected in (
        "--num-layers 2",
        "--bf16",
        "--offload-modules expert_fc1 moe_act",
        "--recompute-modules moe_act",
        "--moe-layer-freq ([0]*3+[1]*2)",
    ):
        assert expected in joined
    assert "${DATA_PATH}/a b" in words
    assert "--empty" not in words
    assert "true" not in words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MODEL_ARGS:\n  --a: 1\n  --a: 2\n", "line 3: --a is repeated"),
        ("MODEL_ARGS: [\n", "line 2: "),
        ("- 1\n", "expected a mapping"),
        ("model:\n  num_layers: 2\n", "no MODEL_ARGS section"),
        ("MODEL_ARGS:\n  --bf16: false\n", "--bf16: false: a switch is true or left out"),
    ],
)
def test_yaml_that_cannot_be_taken(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        yaml_flags(written(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_yaml_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot be read: No such file"):
        yaml_flags(tmp_path / "no.yaml")


def test_bridges_yaml_is_flattened(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "model:\n  _target_: x.Y\n  num_layers: 2\ntraining:\n  train_iters: 3\nmixed_precision: bf16_mixed\n",
    )
    assert yaml_overrides(file) == [
        ("model.num_layers", 2),
        ("train.train_iters", 3),
        ("mixed_precision", "bf16_mixed"),
    ]


def test_quoted_words() -> None:
    words = [word.text for word in split_args("python pretrain_gpt.py --save 'a b' \\\n --bf16")]
    assert words == ["--save", "a b", "--bf16"]
    with pytest.raises(ConfigError, match="--args: no closing quotation; close the quote"):
        split_args("--save 'x")


def test_definitions_replace_references() -> None:
    words = define(plain(["--seed", "${REPEAT:-3}", "--save", "$OUT/x", "${OTHER}"]), {"REPEAT": "7", "OUT": "/o"})
    assert [word.text for word in words] == ["--seed", "7", "--save", "/o/x", "${OTHER}"]


def test_options_of_nemo() -> None:
    reading = read_nemo(
        plain(
            "trainer.devices 8 trainer.max_steps 50 trainer.strategy.sequence_parallel data.seq_length 512 "
            "model.config.moe_aux_loss_coeff 1e-2 log.log_dir ${OUT} trainer.other 1".split()
        )
    )
    assert (reading.config.train.train_iters, reading.config.model.seq_length) == (50, 512)
    assert reading.config.model.sequence_parallel
    families = {o.written.flag: o.elsewhere.family.verdict for o in reading.options if o.elsewhere}
    assert families == {
        "trainer.devices": "waived",
        "log.log_dir": "waived",
        "trainer.other": "blocking",
        RECIPE: "blocking",
    }
    with pytest.raises(ConfigError, match=r"trainer\.max_steps many: not a value of train\.train_iters"):
        read_nemo(plain(["trainer.max_steps", "many"]))
