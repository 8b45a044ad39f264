"""Which class an option falls in, and what is written for what nobody set."""

import pytest

from lockstep.recipes.registry import RECIPES
from lockstep.translation.flags import read_flags
from lockstep.translation.translate import Translation, to_bridge, to_lockstep
from lockstep.translation.words import plain
from tests.translation.common import RECIPE, SIZES


def lockstep(*words: str, **options: object) -> Translation:
    return to_lockstep(read_flags(plain([*SIZES, *words])), RECIPE, **options)  # type: ignore[arg-type]


def bridged(*words: str, version: str = "0.6") -> Translation:
    return to_bridge(read_flags(plain([*SIZES, *words])), RECIPE, version)


def verdict(translation: Translation, flag: str) -> tuple[str, str]:
    found = [v for v in translation.verdicts if v.option.written.flag == flag]
    assert len(found) == 1, flag
    return found[0].kind, found[0].reason


@pytest.mark.parametrize(
    ("words", "kind", "reason"),
    [
        ("--clip-grad 0.5", "mapped", ""),
        ("--clip-grad 1.0", "default", "optimizer.clip_grad = 1.0"),
        ("--num-query-groups 2", "default", "Megatron-LM ignores it without --group-query-attention"),
        ("--no-bias-swiglu-fusion", "waived", "changes speed only"),
        ("--inference-max-requests 4", "waived", "read by inference only"),
        ("--one-logger-project mine", "waived", "telemetry"),
        ("--mask-prob 0.15", "default", "Megatron-LM's default"),
        ("--fim-data", "blocking", "rewrites the samples"),
        ("--perform-rl-step", "blocking", "reinforcement learning"),
        ("--use-dist-ckpt", "default", "Megatron-LM does nothing with it"),
        ("--mtp-num-layers 1", "mapped", "Lockstep does not train with it"),
        ("--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec", "default", "layer pattern"),
        ("--spec mine.layers my_spec", "blocking", "builds the model from code"),
    ],
)
def test_one_class_each_for_lockstep(words: str, kind: str, reason: str) -> None:
    found = verdict(lockstep(*words.split()), words.split()[0])
    assert found[0] == kind
    assert reason in found[1]


@pytest.mark.parametrize(
    ("words", "kind", "reason"),
    [
        ("--bf16", "default", "mixed_precision = bf16_mixed"),
        ("--fp16", "mapped", ""),
        ("--openai-gelu", "blocking", "Megatron Bridge has no counterpart"),
        ("--use-mcore-models", "default", "builds its models from Megatron Core"),
        ("--max-position-embeddings 16", "default", "follows from the sequence length"),
        ("--max-position-embeddings 32", "blocking", "no counterpart"),
        ("--position-embedding-type rope --max-position-embeddings 32", "mapped", ""),
        ("--transformer-impl local", "waived", "changes speed only"),
        ("--fault-injector-seed 3", "blocking", "no counterpart"),
        ("--hybrid-layer-pattern M-M*", "mapped", ""),
        ("--mtp-num-layers 1", "mapped", ""),
    ],
)
def test_one_class_each_for_bridge(words: str, kind: str, reason: str) -> None:
    found = verdict(bridged(*words.split()), words.split()[0])
    assert found[0] == kind
    assert reason in found[1]


def test_waiving_by_name_turns_blocking_into_waived() -> None:
    translation = lockstep("--fim-data", waived=["--fim-data"])
    assert verdict(translation, "--fim-data")[0] == "waived"
    assert translation.counts()["blocking"] == 0


def test_what_the_trainer_refuses_is_left_out_on_request() -> None:
    words = ("--log-energy", "--mtp-num-layers", "1")
    kept = lockstep(*words)
    assert kept.assignments["logger.log_energy"] is True
    dropped = lockstep(*words, waive_refused=True)
    assert "logger.log_energy" not in dropped.assignments
    assert verdict(dropped, "--log-energy")[0] == "waived"
    assert dropped.assignments["model.mtp_num_layers"] == 1
    named = lockstep(*words, waived=["--mtp-num-layers"])
    assert "model.mtp_num_layers" not in named.assignments


def test_bridge_gets_every_default_that_differs() -> None:
    translation = bridged("--seed", "7", "--num-experts", "4", "--lr-decay-style", "linear")
    differing = {d.path: (d.here, d.there) for d in translation.differing}
    assert differing["optimizer.adam_beta2"] == (0.999, 0.95)
    assert differing["scheduler.start_weight_decay"] == (0.01, 0.033)
    assert differing["scheduler.lr_warmup_iters"] == (0, 500)
    assert differing["tokenizer.pad_vocab_size"] == (True, False)
    assert differing["dataset.random_seed"] == (7, 1234)
    assert differing["model.bias_activation_fusion"] == (True, False)
    assert "scheduler.lr_decay_style" not in differing
    assert "optimizer.muon_momentum" not in differing
    for path in differing:
        assert path in translation.assignments or path.startswith(("model.seq", "mixed_precision")), path
    assert all(d.reason for d in translation.differing)


def test_precision_is_one_preset_for_bridge() -> None:
    assert bridged("--fp16").assignments["mixed_precision"] == "fp16_mixed"
    full = bridged().assignments
    assert (full["mixed_precision"], full["optimizer.bf16"]) == (None, False)


def test_keys_follow_the_version_of_bridge() -> None:
    words = ("--seq-length", "16", "--eval-iters", "3", "--tokenizer-special-tokens", "<a>")
    sizes = [w for w in SIZES if w not in ("--seq-length", "16")]
    old = to_bridge(read_flags(plain([*sizes, *words])), RECIPE, "0.2").assignments
    new = to_bridge(read_flags(plain([*sizes, *words])), RECIPE, "0.6").assignments
    assert {"dataset.sequence_length", "train.eval_iters", "tokenizer.tiktoken_special_tokens"} <= set(old)
    assert {"dataset.seq_length", "validation.eval_iters", "tokenizer.special_tokens"} <= set(new)
    assert to_bridge(read_flags(plain(SIZES)), RECIPE, "0.5").recipe == RECIPE
    assert to_bridge(read_flags(plain(SIZES)), RECIPE, "0.6").recipe == "vanilla_gpt_pretrain_1gpu_h100_bf16_config"


def test_blends_and_patterns_take_bridges_form() -> None:
    sizes = [word for word in SIZES if word != "--mock-data"]
    words = [*sizes, "--train-data-path", "0.3", "a", "0.7", "b", "--valid-data-path", "c"]
    blend = to_bridge(read_flags(plain(words)), RECIPE, "0.6").assignments["dataset.blend_per_split"]
    assert blend == [[["a", "b"], [0.3, 0.7]], [["c"], None], None]
    assert bridged("--moe-layer-freq", "([0]*1+[1]*2)").assignments["model.moe_layer_freq"] == [0, 1, 1]
    assert bridged("--moe-aux-loss-coeff", "1e-2").assignments["model.moe_aux_loss_coeff"] == 0.01


def test_what_overrides_cannot_carry_is_said() -> None:
    notes = " ".join(bridged("--hybrid-layer-pattern", "M-M*", "--fp8-format", "hybrid").notes)
    assert "HybridModelProvider" in notes
    assert "mixed_precision.fp8" in notes


def test_values_and_settings_that_bridge_has_not() -> None:
    found = bridged("--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "rowwise", "--gradient-sync", "step")
    verdicts = {verdict.option.written.flag: verdict for verdict in found.verdicts}
    assert verdicts["--fp8-recipe"].kind == "blocking"
    assert verdicts["--fp8-recipe"].reason == "changes the run, and Megatron Bridge has no counterpart"
    assert verdicts["--gradient-sync"].kind == "waived"
    assert "run.gradient_sync" not in found.assignments
    assert verdict(bridged("--bf16", "--fp8-recipe", "tensorwise"), "--fp8-recipe")[0] != "blocking"


def test_a_missing_size_keeps_the_recipes() -> None:
    translation = to_lockstep(read_flags(plain("--num-layers 2 --hidden-size 8".split())), RECIPE)
    assert "train.micro_batch_size" not in translation.assignments
    assert any("--micro-batch-size is not given" in note for note in translation.notes)


def test_a_value_that_follows_another_in_the_recipe_is_written_out() -> None:
    translation = lockstep("--lr-warmup-init", "0.0003")
    assert translation.assignments["scheduler.lr_warmup_init"] == 0.0003
    assert RECIPE in RECIPES
