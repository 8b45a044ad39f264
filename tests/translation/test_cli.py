"""The command: what goes where, exit codes, forms of the output, both directions."""

import json
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from lockstep.cli import main
from lockstep.config import all_fields
from lockstep.megatron_lm.parser import parse_flags
from lockstep.recipes.door import parse_recipe_args
from tests.commands import FLAGS, RECIPE
from tests.translation.common import RECIPE as NAME
from tests.translation.common import SIZES, effective

ARGS = shlex.join(SIZES)


def translate(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["translate", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_overrides_on_stdout_and_reasons_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = translate(capsys, "--args", ARGS)
    assert code == 0
    expected = effective(parse_flags(SIZES))
    assert effective(parse_recipe_args(["--recipe", NAME, *shlex.split(out)])) == expected
    assert err.startswith("mapped ")
    assert "differing defaults, written out:" in err
    assert "scheduler.lr_warmup_init: 0.0 here, ${optimizer.lr} there" in err


def test_a_blocking_option_is_exit_code_1_and_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = translate(capsys, "--args", f"{ARGS} --fim-data")
    assert code == 1
    assert "blocked by --fim-data: fill in the middle: rewrites the samples" in err.splitlines()[-1]
    code, _, err = translate(capsys, "--args", f"{ARGS} --fim-data", "--waive", "--fim-data")
    assert code == 0
    assert "waived by the user" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--args", "--num-layer 2"], "unknown flag --num-layer. Did you mean --num-layers"),
        (["--args", "--save 'x"], "close the quote"),
        ([], 'give one of --args "...", --yaml FILE and --script FILE'),
        (["--args", "--bf16", "--yaml", "x"], "give one of"),
        (
            ["--args", ARGS, "--recipe", "vanila_gpt"],
            "unknown recipe vanila_gpt. Did you mean vanilla_gpt_pretrain_config",
        ),
        (["--args", ARGS, "--for", "megatron-bridge", "--recipe", "x"], "values of Bridge's recipe x are not known"),
        (["--args", ARGS, "--waive", "--fim-data"], "--waive --fim-data: it is not among the options"),
        (["--args", ARGS, "--world-size", "0"], "--world-size 0: give 1 or more"),
        (["--args", ARGS, "--define", "X"], "--define X: write NAME=VALUE"),
        (["--args", ARGS, "--emit", "recipe", "--recipe-name", "a-b"], "give a name that Python takes"),
        (["--script", "none.sh"], "none.sh: cannot be read"),
        (["--reverse", "--args", "model.nmu_layers=2"], "unknown key model.nmu_layers. Did you mean model.num_layers"),
        (["--reverse", "--args", "model.num_layers=two"], "model.num_layers: expected int or null, got 'two'"),
        (["--reverse", "--args", "model.num_layers"], "is not an override; write key=value"),
        (["--reverse", "--emit", "recipe"], "flags are no recipe"),
        (["--reverse", "--script", "x"], "drop one of them"),
        (["--args", "--micro-batch-size 1", "--for", "megatron-bridge"], "give --world-size"),
    ],
)
def test_the_users_mistakes_are_one_message_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, out, err = translate(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_the_report_has_every_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    translate(capsys, "--args", f"{ARGS} --clip-grad 0.5 --one-logger-async", "--report", str(report))
    written = json.loads(report.read_text())
    options = {option["option"]: option for option in written["options"]}
    assert list(options) == [word for word in [*SIZES, "--clip-grad", "--one-logger-async"] if word.startswith("--")]
    assert options["--clip-grad"]["class"] == "mapped"
    assert options["--clip-grad"]["here"] == {"optimizer.clip_grad": 0.5}
    assert options["--clip-grad"]["there"] == {"optimizer.clip_grad": 0.5}
    assert options["--one-logger-async"]["class"] == "waived"
    assert sum(written["counts"][kind] for kind in ("mapped", "default", "waived", "blocking")) == len(options)
    assert all(entry["reason"] for entry in written["differing"])
    assert "optimizer.clip_grad=0.5" in written["output"]


def test_the_output_goes_to_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "out.txt"
    _, out, _ = translate(capsys, "--args", ARGS, "-o", str(file))
    assert out == ""
    assert "model.num_layers=2" in file.read_text().splitlines()
    code, _, err = translate(capsys, "--args", ARGS, "-o", str(tmp_path / "none" / "x"))
    assert code == 2
    assert "cannot be written" in err


def test_the_command_is_one_that_the_recipe_door_takes(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = translate(capsys, "--args", ARGS, "--emit", "command", "--world-size", "2")
    words = shlex.split(out.replace("\\\n", " "))
    assert words[:4] == ["python", "-m", "torch.distributed.run", "--nproc_per_node=2"]
    assert words[4] == "scripts/training/run_recipe.py"
    assert effective(parse_recipe_args(words[5:])) == effective(parse_flags(SIZES))


def test_yaml_is_one_that_the_recipe_door_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    args = f"{ARGS} --seed ${{REPEAT}} --save ${{OUT:-/tmp}}/x"
    translate(capsys, "--args", args, "--emit", "yaml", "-o", str(file))
    monkeypatch.setenv("REPEAT", "7")
    config = parse_recipe_args(["--recipe", NAME, "--config", str(file)])
    assert (config.rng.seed, config.checkpoint.save) == (7, "/tmp/x")
    expected = effective(parse_flags([*SIZES, "--seed", "7", "--save", "/tmp/x"]))
    assert effective(config) == expected
    monkeypatch.delenv("REPEAT")
    with pytest.raises(ValueError, match=r"rng\.seed: the environment has no REPEAT"):
        parse_recipe_args(["--recipe", NAME, "--config", str(file)])


def test_a_recipe_is_one_that_python_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lockstep.recipes.registry import RECIPES

    file = tmp_path / "mine.py"
    args = f"{ARGS} --seed ${{REPEAT:-5}} --wandb-project 'a {{b}} ${{X}}'"
    translate(capsys, "--args", args, "--emit", "recipe", "--recipe-name", "mine_config", "-o", str(file))
    monkeypatch.setenv("X", 'y"z')
    try:
        config = runpy.run_path(str(file))["mine_config"]()
    finally:
        RECIPES.pop("mine_config", None)
    words = [*SIZES, "--seed", "5", "--wandb-project", 'a {b} y"z']
    assert effective(config) == effective(parse_flags(words))
    assert "# not set by the flags: changes the learning rate that warm-up starts from" in file.read_text()


def test_a_recipe_of_bridge_creates_what_overrides_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    args = f"{ARGS} --bf16 --fp8-format hybrid --hybrid-layer-pattern M-M*"
    _, out, _ = translate(capsys, "--args", args, "--for", "megatron-bridge", "--emit", "recipe")
    compile(out, "recipe", "exec")
    lines = [line.strip() for line in out.splitlines()]
    assert lines.index("config.model = HybridModelProvider()") < lines.index(
        'config.model.hybrid_layer_pattern = "M-M*"'
    )
    created = lines.index("config.mixed_precision = get_mixed_precision_config(config.mixed_precision)")
    assert created < lines.index('config.mixed_precision.fp8 = "hybrid"')


def test_variables_of_the_shell_stay_ones(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = translate(capsys, "--args", f"{ARGS} --save '${{OUT}}/a b' --seed $REPEAT")
    lines = out.splitlines()
    assert "\"checkpoint.save='${OUT}/a b'\"" in lines
    assert '"rng.seed=$REPEAT"' in lines
    _, out, _ = translate(capsys, "--args", f"{ARGS} --seed $REPEAT", "--define", "REPEAT=9")
    assert "rng.seed=9" in out.splitlines()


def test_a_blend_in_a_variable_is_split_into_its_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word for word in SIZES if word != "--mock-data"]
    _, out, _ = translate(capsys, "--args", f"{shlex.join(words)} --data-path $BLEND")
    assert "\"dataset.data_path='$BLEND'\"" in out.splitlines()
    expanded = [word.replace("$BLEND", "0.3 a 0.7 b") for word in shlex.split(out)]
    assert parse_recipe_args(["--recipe", NAME, *expanded]).dataset.data_path == ["0.3", "a", "0.7", "b"]
    assert parse_recipe_args(["--recipe", NAME, *shlex.split(out)]).dataset.data_path == ["$BLEND"]


def test_a_script_and_a_yaml_file_say_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script, file = tmp_path / "run.sh", tmp_path / "args.yaml"
    script.write_text(f"A=({ARGS})\ntorchrun --nproc_per_node 2 pretrain_gpt.py ${{A[@]}}\n")
    pairs = dict(zip(SIZES[0:-1:2], SIZES[1::2], strict=True)) | {"--mock-data": True}
    file.write_text(yaml.safe_dump({"MODEL_ARGS": pairs}))
    outputs = [translate(capsys, *words)[1] for words in (["--script", str(script)], ["--yaml", str(file)])]
    assert (
        set(outputs[0].splitlines())
        == set(outputs[1].splitlines())
        == set(translate(capsys, "--args", ARGS)[1].splitlines())
    )


def test_the_reference_recipe_comes_back_with_its_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [word for word in RECIPE if "=" in word]
    code, out, _ = translate(capsys, "--reverse", "--recipe", NAME, "--args", shlex.join(overrides))
    assert code == 0
    lines = out.splitlines()
    assert "--lr-warmup-iters 1" in lines
    assert "--lr-warmup-init 0.0003" in lines
    assert effective(parse_flags(shlex.split(out))) == effective(parse_recipe_args(RECIPE))


def test_the_reference_flags_give_overrides_of_the_same_tree(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = translate(capsys, "--args", shlex.join(FLAGS))
    assert effective(parse_recipe_args(["--recipe", NAME, *shlex.split(out)])) == effective(parse_flags(FLAGS))


def test_back_from_yaml_of_bridge(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bridge.yaml"
    file.write_text("model:\n  num_layers: 2\n  softmax_scale: 0.5\ntrain:\n  train_iters: 3\n")
    code, out, err = translate(capsys, "--reverse", "--for", "megatron-bridge", "--yaml", str(file), "--emit", "yaml")
    assert code == 1
    assert "blocked by model.softmax_scale" in err
    arguments = yaml.safe_load(out)["MODEL_ARGS"]
    assert (arguments["--num-layers"], arguments["--train-iters"], arguments["--bf16"]) == ("2", "3", True)
    assert arguments["--weight-decay"] == "0.033"
    assert "replaces optimizer.weight_decay = 0.1 at every step" in err


def test_what_no_flag_says_blocks_on_the_way_back(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--reverse", "--args", "dataset.random_seed=7"]
    code, _, err = translate(capsys, *words)
    assert code == 1
    assert "blocked by dataset.random_seed" in err
    assert translate(capsys, *words, "--waive", "dataset.random_seed")[0] == 0


def test_fine_tuning_goes_to_a_recipe_of_fine_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ARGS.replace("--tokenizer-type NullTokenizer --vocab-size 64 --mock-data", "")
    words = f"{sizes} --sft --tokenizer-type SFTTokenizer --tokenizer-model t --sft-tokenizer-prompt-format default"
    to_bridge = ("--for", "megatron-bridge", "--args")
    code, _, err = translate(capsys, *to_bridge, f"{words} --dataset-root d")
    assert code == 1
    assert "dataset.sft needs a recipe whose data is a GPTSFTDatasetConfig, such as llama32_1b_sft_config" in err
    recipe = ("--recipe", "llama32_1b_sft_config")
    code, out, err = translate(capsys, *recipe, *to_bridge, f"{words} --dataset-root d --sft-prompt-column q")
    assert code == 0
    assert {"dataset.dataset_root=d", "dataset.preprocessing.prompt_column=q"} <= set(out.split())
    assert "--sft: the recipe's data is a GPTSFTDatasetConfig" in err
    code, out, err = translate(capsys, *recipe, *to_bridge, f"{words} --data-path x.jsonl")
    assert (code, "dataset.data_path" in out, "dataset.split" in err) == (1, False, False)
    assert "blocked by --data-path" in err


_OF_BRIDGES_FINE_TUNING = (  # refused, or without effect
    "dataset.hf_dataset_subset",
    "dataset.hf_dataset_load_kwargs",
    "dataset.hf_dataset_schema_adapter",
    "dataset.hf_dataset_adapter_kwargs",
    "dataset.hf_validation_dataset",
    "dataset.hf_test_dataset",
    "dataset.pad_cu_seqlens",
    "dataset.packing_tokenizer_model_name",
    "dataset.num_tokenizer_workers",
    "dataset.packed_train_data_path",
    "dataset.packed_val_data_path",
    "dataset.packed_metadata_path",
)


def test_every_path_of_the_tree_has_a_place_on_the_way_back() -> None:
    assert [p for p, info in all_fields().items() if not info.spec.flags] == [
        "model.gated_linear_unit",
        "model.activation_func",
        *_OF_BRIDGES_FINE_TUNING,
        "dataset.random_seed",
        "dataset.data_sharding",
        "dataset.pin_memory",
        "dataset.persistent_workers",
        "checkpoint.most_recent_k",
    ]
