"""The lenient reader: everything Megatron-LM takes, and what it does not take."""

import json
from pathlib import Path

import pytest

from lockstep.errors import ConfigError
from lockstep.translation.flags import known_flags, read_flags
from lockstep.translation.spellings import GONE
from lockstep.translation.words import plain


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_flags(plain(words))
    return caught.value.problems


def test_every_flag_of_the_facts_is_read_with_its_arity(shared: Path) -> None:
    facts = json.loads((shared / "facts/flags.json").read_text())
    known = known_flags()
    for fact in facts["flags"]:
        for flag in [fact["flag"], *fact.get("aliases", [])]:
            switch = fact["action"] in ("store_true", "store_false")
            assert (known[flag] == "0") == switch, flag
            several = fact["type"].startswith("list[") and "window_size" not in fact["dest"]
            assert (known[flag] in ("*", "3")) == several, flag
    assert {fact["flag"] for fact in facts["translator_only_flags"]} <= {
        "--layernorm-epsilon",
        "--grad-reduce-in-fp32",
        "--virtual-pipeline-model-parallel-size",
    }


def test_options_that_lockstep_refuses_are_read() -> None:
    config = read_flags(plain("--mtp-num-layers 1 --fp8-format hybrid --hybrid-layer-pattern M-M*".split())).config
    assert (config.model.mtp_num_layers, config.mixed_precision.fp8) == (1, "hybrid")
    assert config.model.hybrid_layer_pattern == "M-M*"


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--window-size", "5,6"], "model.window_size", [5, 6]),
        (["--window-size=(5,6)"], "model.window_size", [5, 6]),
        (["--recompute-modules", "[moe_act core_attn]"], "model.recompute_modules", ["moe_act", "core_attn"]),
        (["--recompute-modules", "moe_act", "core_attn"], "model.recompute_modules", ["moe_act", "core_attn"]),
        (["--moe-layer-freq", "([0]*1+[1]*2)"], "model.moe_layer_freq", "([0]*1+[1]*2)"),
        (["--data-path", "0.3", "a", "0.7", "b"], "dataset.data_path", ["0.3", "a", "0.7", "b"]),
        (["--null-tokenizer-eod-id", "-1"], "tokenizer.null_tokenizer_eod_id", -1),
        (["--encoder-num-layers", "3"], "model.num_layers", 3),
        (["--enable-cuda-graph"], "model.cuda_graph_impl", "local"),
        (["--no-weight-decay-cond-type", "apply_wd_to_qk_layernorm"], "optimizer.apply_wd_to_qk_layernorm", True),
        (["--swiglu"], "model.activation_func", "silu"),
        (["--group-query-attention"], "model.num_query_groups", 1),
        (["--num-query-groups", "2"], "model.num_query_groups", None),
        (["--use-flash-attn", "--attention-backend", "fused"], "model.attention_backend", "fused"),
        (["--save", "${OUT}/x"], "checkpoint.save", "${OUT}/x"),
    ],
)
def test_values_are_read_as_megatron_lm_reads_them(words: list[str], path: str, value: object) -> None:
    assert read_flags(plain(words)).config.get(path) == value


def test_layers_of_a_virtual_stage_become_stages() -> None:
    words = "--num-layers-per-virtual-pipeline-stage 2 --num-layers 12 --pipeline-model-parallel-size 3".split()
    assert read_flags(plain(words)).config.model.virtual_pipeline_model_parallel_size == 2


def test_a_variable_in_place_of_a_number_stays_one() -> None:
    reading = read_flags(plain(["--seed", "${REPEAT}", "--tokenizer-type", "$TYPE"]))
    assert reading.deferred == {"rng.seed": "${REPEAT}", "tokenizer.tokenizer_type": "$TYPE"}


def test_a_flag_given_twice_with_one_value_counts_once() -> None:
    reading = read_flags(plain("--save-interval 5 --persistent-save-interval 5 --bf16 --bf16".split()))
    assert [option.written.flag for option in reading.options] == ["--save-interval", "--bf16"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num-layer 2", "unknown flag --num-layer. Did you mean --num-layers"),
        ("--num-layers 2 --num-layers 3", "--num-layers 2 and --num-layers 3 are both given"),
        ("--save-interval 2 --persistent-save-interval 3", "--save-interval 2 and --persistent-save-interval 3 are"),
        ("--num-layers two", "--num-layers: expected int, got 'two'"),
        ("--lr fast", "--lr: expected float, got 'fast'"),
        ("--normalization Batch", "--normalization: expected one of LayerNorm, RMSNorm, got 'Batch'"),
        ("--num-layers", "--num-layers needs a value"),
        ("--num-layers 2 3", "unexpected word '3'; flags start with --"),
        ("--bf16=true", "--bf16 takes no value; drop 'true'"),
        ("--rampup-batch-size 1 2", "--rampup-batch-size needs 3 values, got 2"),
        ("--bf16 --fp16", "--fp16 and --bf16 exclude each other; drop one"),
        ("--train-iters 3 --train-samples 4", "--train-iters and --train-samples exclude each other"),
        ("--swiglu --squared-relu", "contradict each other; drop one"),
        ("--mock-data --data-path x", "--mock-data and --data-path exclude each other"),
        ("--no-weight-decay-cond-type none", "Megatron-LM takes apply_wd_to_qk_layernorm alone, got none"),
        ("train.train_iters=3", "unexpected word 'train.train_iters=3'"),
    ],
)
def test_mistakes_are_named_with_their_remedy(words: str, said: str) -> None:
    assert any(said in problem for problem in problems(*words.split()))


@pytest.mark.parametrize("flag", GONE)
def test_flags_that_megatron_lm_dropped_name_their_successor(flag: str) -> None:
    assert problems(flag, "3") == [f"{flag}: {GONE[flag]}"]


def test_all_mistakes_come_at_once() -> None:
    assert len(problems("--nmu-layers", "2", "--lr", "x", "--bf16", "--fp16")) == 3
