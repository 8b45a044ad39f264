"""Settings that foreign runs print, and verdicts over them."""

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.config import all_fields
from lockstep.config.resolve import resolve
from lockstep.errors import UserError
from lockstep.lab.compare import Comparison, compare_paths
from lockstep.lab.config_diff import Stated, stated_differences
from lockstep.lab.foreign.settings import HUGGING_FACE, TORCHTITAN, Collector
from lockstep.lab.foreign.trace import Settings
from lockstep.lab.side import load_side
from lockstep.megatron_lm.parser import parse_flags
from lockstep.record.schema import encode
from tests.commands import FLAGS
from tests.lab.foreign.writers import bridge, megatron, smooth, torchtitan, trainer_state
from tests.lab.synthetic import write


def record(folder: Path, **changes: Any) -> Path:
    """A record of the reference pair, resolved as its run would be."""
    config = resolve(parse_flags(FLAGS))
    tree = config.as_dict()
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    origins = {info.path: str(origin) for info, _, origin in config.items() if origin.kind != "default"}
    return write(folder / "run", tree=tree, train=smooth(), evaluations=[], origins=origins)


PAIR = {
    "adam_beta1": "0.9",
    "adam_beta2": "0.999",
    "add_bias_linear": "True",
    "attention_backend": "AttnBackend.auto",
    "bf16": "True",
    "clip_grad": "1.0",
    "data_parallel_size": "1",
    "deprecated_use_mcore_models": "True",
    "eval_interval": "10",
    "eval_iters": "2",
    "ffn_hidden_size": "1024",
    "global_batch_size": "32",
    "group_query_attention": "False",
    "hidden_size": "256",
    "kv_channels": "64",
    "lr": "0.0003",
    "lr_decay_iters": "None",
    "lr_warmup_iters": "0",
    "log_interval": "1",
    "masked_softmax_fusion": "False",
    "max_position_embeddings": "512",
    "micro_batch_size": "4",
    "min_lr": "3e-05",
    "mock_data": "True",
    "num_attention_heads": "4",
    "num_layers": "2",
    "num_query_groups": "1",
    "params_dtype": "torch.bfloat16",
    "seed": "1234",
    "seq_length": "512",
    "swiglu": "False",
    "tensorboard_dir": "None",
    "tokenizer_type": "NullTokenizer",
    "train_iters": "10",
    "transformer_impl": "local",
    "untie_embeddings_and_output_weights": "False",
    "vocab_size": "32000",
    "weight_decay": "0.01",
    "window_size": "None",
}


def arguments(**changes: str) -> str:
    """The block that Megatron-LM prints for the reference pair, or a part of it, in its order and spelling."""
    lines = [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in {**PAIR, **changes}.items()]
    return "\n".join(
        [
            "------------------------ arguments ------------------------",
            *lines,
            "-------------------- end of arguments ---------------------",
            "",
        ]
    )


def headed(log: Path, head: str) -> Path:
    log.write_text(head + log.read_text())
    return log


def read(text: str) -> Settings:
    collector = Collector()
    for line in text.splitlines():
        collector.line(line)
    found = collector.settings()
    assert found
    return found


def against(folder: Path, text: str, **changes: Any) -> Comparison:
    return compare_paths(record(folder, **changes), headed(megatron(folder / "log", smooth()), text))


def test_arguments_of_megatron_lm_equal_those_of_the_same_run(tmp_path: Path):
    found = against(tmp_path, arguments())
    assert found.findings.differences == []
    assert found.decision.verdict == "identical"
    assert found.stages[0].detail == "every setting that both tell is equal"
    note = next(note for note in found.notes if "settings are read" in note)
    assert note.endswith("without a counterpart in the tree: data_parallel_size, params_dtype")


def test_setting_that_differs_in_a_foreign_log_is_the_cause(tmp_path: Path):
    lines = smooth()
    for line in lines[4:]:
        line["lm_loss"] += 0.3
    log = headed(megatron(tmp_path / "log", lines), arguments(adam_beta2="0.95", swiglu="True"))
    found = compare_paths(record(tmp_path), log)
    assert found.decision.verdict == "config"
    assert "optimizer.adam_beta2 (0.999 against 0.95)" in found.decision.cause
    assert {d.path for d in found.findings.active} == {
        "optimizer.adam_beta2",
        "model.gated_linear_unit",
        "model.activation_func",
    }
    assert found.findings.active[0].origin_b == "arguments in the log"


def test_two_foreign_logs_are_compared_by_what_both_print(tmp_path: Path):
    a = headed(megatron(tmp_path / "a", smooth()), arguments())
    b = headed(megatron(tmp_path / "b", smooth()), arguments(weight_decay="0.1", num_layers="4"))
    found = compare_paths(a, b)
    assert [d.path for d in found.findings.active] == ["model.num_layers", "optimizer.weight_decay"]
    assert (found.decision.verdict, found.stages[0].state) == ("identical", "differs")


def test_logs_with_settings_never_claim_that_the_whole_config_is_equal(tmp_path: Path):
    lines = smooth()
    lines[6]["lm_loss"] += 0.3
    log = headed(megatron(tmp_path / "log", lines), arguments())
    found = compare_paths(record(tmp_path), log)
    assert found.decision.verdict == "cannot tell"
    assert "the rest of the config, data and initial weights cannot be compared" in found.decision.cause


@pytest.mark.parametrize(
    ("name", "text", "path", "value"),
    [
        ("untie_embeddings_and_output_weights", "True", "model.share_embeddings_and_output_weights", False),
        ("add_bias_linear", "False", "model.add_bias_linear", False),
        ("num_experts", "8", "model.num_moe_experts", 8),
        ("norm_epsilon", "1e-06", "model.layernorm_epsilon", 1e-06),
        ("attention_backend", "AttnBackend.flash", "model.attention_backend", "flash"),
        ("data_path", "['0.3', 'a', '0.7', 'b']", "dataset.data_path", ["0.3", "a", "0.7", "b"]),
    ],
)
def test_names_of_megatron_lms_namespace(name: str, text: str, path: str, value: Any):
    assert read(arguments(**{name: text})).values[path] == value


def test_value_that_the_tree_cannot_hold_is_listed(tmp_path: Path):
    found = read(arguments(lr_decay_style="exotic"))
    assert found.unmapped["lr_decay_style"] == "exotic"
    assert "scheduler.lr_decay_style" not in found.values


def test_groups_count_only_with_grouped_queries():
    assert "model.num_query_groups" not in read(arguments()).values
    assert read(arguments(group_query_attention="True", num_query_groups="2")).values["model.num_query_groups"] == 2


SUMMARY = """
======================================================================
Configuration Summary (Non-Default Values vs Megatron Core)
======================================================================

[optimizer] Non-default values (vs Mcore OptimizerConfig):
  adam_beta2: 0.95  (Mcore default: 0.999)
  lr: 0.0003  (Mcore default: None)

[model] Non-default values (vs Mcore TransformerConfig):
  attention_backend: <AttnBackend.auto: 5>  (Mcore default: <AttnBackend.auto: 5>)
  num_layers: 2  (Mcore default: 0)
  something_new: 3  (Mcore default: 0)

----------------------------------------------------------------------
Other Configuration Values:
----------------------------------------------------------------------

[train]:
  global_batch_size: 32
  train_iters: 10

======================================================================
"""


def test_summary_of_bridge(tmp_path: Path):
    found = read(SUMMARY)
    assert found.values["optimizer.adam_beta2"] == 0.95
    assert (found.values["model.num_layers"], found.values["train.train_iters"]) == (2, 10)
    assert found.unmapped == {"model.something_new": "3"}
    log = headed(bridge(tmp_path / "log", smooth()), SUMMARY)
    assert [d.path for d in compare_paths(record(tmp_path), log).findings.active] == ["optimizer.adam_beta2"]


def test_run_config_yaml_beside_a_log_of_bridge(tmp_path: Path):
    log = bridge(tmp_path / "log", smooth())
    (tmp_path / "run_config.yaml").write_text(
        "_target_: megatron.bridge.training.config.ConfigContainer\nmodel:\n  num_layers: 2\n  _target_: x.GPT\n"
        "optimizer:\n  weight_decay: 0.033\n  odd: [1]\ndataset:\n  seq_length: 512\n"
    )
    settings = load_side(log, "B").settings
    assert settings
    assert settings.values == {"model.num_layers": 2, "optimizer.weight_decay": 0.033, "model.seq_length": 512}
    assert settings.unmapped == {"optimizer.odd": "[1]"}
    (tmp_path / "run_config.yaml").write_text("model: {num_layers: 2")
    with pytest.raises(UserError, match=r"run_config.yaml is cut off or damaged"):
        load_side(log, "B")


TITAN = {
    "training": {"steps": 10, "seq_len": 512, "global_batch_size": -1, "max_norm": 1.0},
    "optimizer": {"name": "AdamW", "lr": 3e-4, "beta2": 0.95},
}


@pytest.mark.parametrize("text", [json.dumps(TITAN, indent=2), json.dumps(TITAN), str(TITAN)])
def test_configuration_of_torchtitan(text: str, tmp_path: Path):
    head = f"[titan] 2026-01-02 03:04:05,678 - root - INFO - Running with args: {text}\n"
    settings = load_side(headed(torchtitan(tmp_path / "log", smooth()), head), "B").settings
    assert settings
    assert settings.values["optimizer.adam_beta2"] == 0.95
    assert settings.values["train.train_iters"] == 10
    assert settings.unmapped == {"training.global_batch_size": "-1", "optimizer.name": "AdamW"}


def test_settings_of_a_trainer_folder(tmp_path: Path):
    model = {"model_type": "gpt2", "n_layer": 2, "n_embd": 256, "n_head": 4, "n_positions": 512, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps({**model, "architectures": ["GPT2LMHeadModel"]}))
    settings = load_side(trainer_state(tmp_path / "trainer_state.json", smooth()), "B").settings
    assert settings
    assert (settings.values["model.num_layers"], settings.values["train.train_iters"]) == (2, 10)
    assert "model.seq_length" not in settings.values
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    settings = load_side(tmp_path / "trainer_state.json", "B").settings
    assert settings
    assert "unheard-of" in settings.unmapped["config.json"]


def test_training_arguments_in_a_log():
    text = (
        "TrainingArguments(\n_n_gpu=0,\nlearning_rate=0.0003,\nlr_scheduler_type=SchedulerType.COSINE,\nmax_steps=-1,\n"
    )
    found = read(f"INFO - Training/evaluation parameters\n{text}seed=42,\n)\n")
    assert found.values == {"optimizer.lr": 3e-4, "scheduler.lr_decay_style": "cosine", "rng.seed": 42}
    assert found.unmapped == {"_n_gpu": "0", "max_steps": "-1"}


@pytest.mark.parametrize("path", [*TORCHTITAN.values(), *HUGGING_FACE.values()])
def test_mapped_paths_are_in_the_tree(path: str):
    assert path in all_fields()


def test_block_that_is_cut_off_gives_no_settings():
    collector = Collector()
    for line in arguments().splitlines()[:10]:
        collector.line(line)
    assert collector.settings() is None


def test_every_argument_that_megatron_lm_prints_says_what_the_same_run_says(shared: Path):
    """Its whole namespace with the effective values of the reference pair: nothing differs, little is not mapped."""
    facts = json.loads((shared / "facts" / "flags.json").read_text())["flags"]
    printed = {entry["dest"]: str(entry.get("effective_default", entry["default"])) for entry in facts}
    known = {name: value for name, value in printed.items() if value != "computed"}
    found = read(arguments(**known | PAIR))
    config = resolve(parse_flags(FLAGS))
    whole = {info.path: encode(value) for info, value, _ in config.items()}
    origins = {info.path: str(origin) for info, _, origin in config.items() if origin.kind != "default"}
    differing = stated_differences(Stated(whole, origins), Stated(found.values, {}, partial=True))
    assert [(d.path, d.role) for d in differing] == [("dataset.split", "dormant")], "generated data are split otherwise"
    assert len(found.values) > 450
    assert len(found.unmapped) < 20
