from pathlib import Path

import pytest

from lockstep.config import all_fields, resolve
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags
from lockstep.recipes.catalog import describe_recipes, get_recipe
from lockstep.recipes.door import parse_recipe_args
from tests.commands import FLAGS, RECIPE

VANILLA = ["--recipe", "vanilla_gpt_pretrain_config"]


def problem(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe_args([*VANILLA, *words])
    return str(caught.value)


def test_the_reference_pair_differs_in_warmup_alone() -> None:
    flags, recipe = resolve(parse_flags(FLAGS)), resolve(parse_recipe_args(RECIPE))
    differing = {path for path in all_fields() if flags.get(path) != recipe.get(path)}
    assert differing == {"scheduler.lr_warmup_iters", "scheduler.lr_warmup_init", "model.use_mcore_models"}
    assert recipe.scheduler.lr_warmup_init == recipe.optimizer.lr == 3e-4


def test_every_recipe_builds_offline_and_describes_itself() -> None:
    names = [name for name, _ in describe_recipes()]
    assert "vanilla_gpt_pretrain_config" in names
    for name, summary in describe_recipes():
        assert summary
        assert any(origin.detail == name for _, _, origin in get_recipe(name).items())


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe vanila_gpt_pretrain\. Did you mean vanilla_gpt_pretrain_c"):
        parse_recipe_args(["--recipe", "vanila_gpt_pretrain"])


def test_model_stem_and_convenience_options_yield_to_overrides() -> None:
    config = parse_recipe_args(
        ["--model", "vanilla_gpt", "-gb", "64", "--lr", "1e-3", "-sl", "256", "train.global_batch_size=16"]
    )
    assert (config.train.global_batch_size, config.optimizer.lr, config.model.seq_length) == (16, 1e-3, 256)


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("+model.num_layers=2", "model.num_layers", 2),
        ("++model.num_layers=2", "model.num_layers", 2),
        ("dataset.split=9,1,0", "dataset.split", "9,1,0"),
        ("dataset.split='9,1,0'", "dataset.split", "9,1,0"),
        ("dataset.data_path=[0.5,a,0.5,b]", "dataset.data_path", None),
        ("dataset.data_path=/data/a", "dataset.data_path", ["/data/a"]),
        ("dataset.data_path='0.5 /a 0.5 /b'", "dataset.data_path", ["0.5", "/a", "0.5", "/b"]),
        ("mixed_precision=fp16-mixed", "mixed_precision.fp16", True),
        ("mixed_precision=bf16_with_fp8_current_scaling_mixed", "mixed_precision.fp8", "hybrid"),
        ("mixed_precision=bf16-with-fp8-current-scaling-mixed", "mixed_precision.first_last_layers_bf16", True),
        ("train.eval_iters=3", "validation.eval_iters", 3),
        ("scheduler.lr_warmup_init=0.0", "scheduler.lr_warmup_init", 0.0),
        ("optimizer.lr=null", "optimizer.lr", None),
        ("model.recompute_modules=[mlp,layernorm]", "model.recompute_modules", ["mlp", "layernorm"]),
    ],
)
def test_overrides_follow_the_grammar(word: str, path: str, value: object) -> None:
    if value is None and "data_path" in word:
        assert "expected str" in problem(word)
    else:
        assert parse_recipe_args([*VANILLA, word]).get(path) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.num_layer=2"], "unknown key model.num_layer. Did you mean model.num_layers"),
        (["+model.nmu_layers=2"], "unknown key model.nmu_layers"),
        (["model.num_layers=two"], "model.num_layers: expected int or null, got 'two'"),
        (["train.train_iters=1,2"], "a comma makes a sweep"),
        (["~model.num_layers"], "cannot be deleted"),
        (["model.num_layers"], "write key=value"),
        (["mixed_precision=bf16_with_mxfp8_mixed"], "is not supported; use bf16_mixed, fp16_mixed or, of FP8"),
        (["mixed_precision=int8"], "unknown preset"),
        (["run.dir=12"], "quote it"),
        (
            ["dataset.sequence_length=256", "model.seq_length=512"],
            "dataset.sequence_length=256 and model.seq_length=512",
        ),
        (
            ["--mode", "sft"],
            "recipe vanilla_gpt_pretrain_config is one of pretrain; give --model vanilla_gpt --mode sft",
        ),
        (["--unknown-option", "3"], "unknown option --unknown-option"),
        (["--dataset", "squad"], "use mock or megatron-indexed"),
        (["-gb", "many"], "--global_batch_size: expected int, got 'many'"),
        (["--step-func", "llm_step"], "only gpt_step"),
        (["model.num_layers=[1"], "not in the override grammar"),
    ],
)
def test_bad_words_give_one_message(words: list[str], message: str) -> None:
    assert message in problem(*words)


def test_equal_spellings_of_one_key_may_repeat_and_the_last_of_one_spelling_wins() -> None:
    config = parse_recipe_args([*VANILLA, "dataset.seq_length=64", "model.seq_length=64", "rng.seed=1", "rng.seed=2"])
    assert (config.model.seq_length, config.rng.seed) == (64, 2)


def test_yaml_is_strict_and_weaker_than_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  num_layers: 2\noptimizer:\n  lr: 1e-3\nscheduler:\n  lr_warmup_init: ${optimizer.lr}\n")
    config = parse_recipe_args([*VANILLA, "--config", str(file), "model.num_layers=4"])
    assert (config.model.num_layers, config.optimizer.lr) == (4, 1e-3)
    assert resolve_lr(config) == 1e-3
    file.write_text("model:\n  num_layers: 2\n  num_layers: 3\n")
    assert "duplicate key" in problem("--config", str(file))
    file.write_text("model:\n  num_layer: 2\n")
    assert f"{file}: unknown key model.num_layer." in problem("--config", str(file))
    file.write_text("- a\n")
    assert "expected sections" in problem("--config", str(file))
    assert "no such file" in problem("--config", str(tmp_path / "none.yaml"))


def resolve_lr(config: object) -> object:
    from lockstep.config import ConfigContainer

    assert isinstance(config, ConfigContainer)
    config.model.hidden_size, config.model.num_attention_heads = 8, 2
    return resolve(config).scheduler.lr_warmup_init


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ('model.moe_layer_freq="([0]*3+[1]*2)"', "model.moe_layer_freq", "([0]*3+[1]*2)"),
        ("model.moe_layer_freq=2", "model.moe_layer_freq", 2),
        ("model.moe_aux_loss_coeff=0.01", "model.moe_aux_loss_coeff", [0.01]),
        ("checkpoint.save=${OUT}", "checkpoint.save", "${OUT}"),
        ("checkpoint.save=${oc.env:LOCKSTEP_OUT,/tmp}/x", "checkpoint.save", "/tmp/x"),
        ("rng.seed=${oc.env:LOCKSTEP_SEED,7}", "rng.seed", 7),
        (r'logger.wandb_project="a\b"', "logger.wandb_project", r"a\b"),
    ],
)
def test_values_with_more_than_one_form(override: str, path: str, value: object) -> None:
    assert parse_recipe_args(["--recipe", "vanilla_gpt_pretrain_config", override]).get(path) == value
