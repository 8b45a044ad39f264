"""The record: what is written is read back digit for digit; damage is one short error."""

import argparse
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import UserError
from lockstep.record import RunWriter, create_run_dir, load_run
from lockstep.record import cli as record_cli
from lockstep.record.environment import code_version, device_facts, environment_variables, package_versions

FACTS: dict[str, Any] = {
    "door": "megatron_lm",
    "name": "pretrain_gpt",
    "command": {"argv": ["--lr", "1"], "flags": "--lr 1", "overrides": "optimizer.lr=1"},
    "config": {"optimizer": {"lr": 1.0, "min_lr": 0.0}, "dataset": {"mock": True}},
    "origins": {"optimizer.lr": "command line (--lr)"},
    "seeds": {"model": 1234},
    "initial_weights": {"fingerprint": "ab", "parameters": {"w": {"shape": [1], "sha256": "cd"}}},
}


def write_run(run_dir: Path, iterations: int = 3) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    writer = RunWriter(run_dir)
    writer.start(**FACTS)
    for i in range(1, iterations + 1):
        writer.metrics({"kind": "train", "iteration": i, "lm_loss": 10 / 3 + i, "lr": 0.1 + 0.2, "batch_hash": "nan"})
    writer.metrics({"kind": "evaluation", "iteration": iterations, "split": "valid", "final": True, "lm_loss": 2.0})
    writer.finish("finished", summary={"seconds": 1.5})
    return run_dir


def damage(run_dir: Path, name: str, old: str, new: str) -> Path:
    file = run_dir / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return run_dir


def test_every_digit_comes_back(tmp_path: Path):
    run = load_run(write_run(tmp_path / "run"))
    assert [line.lm_loss for line in run.train] == [10 / 3 + i for i in (1, 2, 3)]
    assert run.train[0].lr == 0.1 + 0.2
    assert run.train[0].batch_hash == "nan"
    assert run.status == "finished"
    assert run.config["optimizer.lr"] == 1.0
    assert run.evaluations[0].split == "valid"
    assert run.facts["summary"] == {"seconds": 1.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_each_value_that_is_not_finite_comes_back_alone(tmp_path: Path, value: float):
    writer = RunWriter(tmp_path)
    writer.start(**FACTS)
    writer.metrics({"kind": "train", "iteration": 1, "lm_loss": 2.0, "ledger": {"grad_norms": {"mlp": value}}})
    (line,) = load_run(tmp_path).train
    assert line.ledger is not None
    assert repr(line.ledger["grad_norms"]["mlp"]) == repr(value)


def test_not_finite_values_stay_valid_json(tmp_path: Path):
    writer = RunWriter(tmp_path)
    writer.start(**FACTS)
    writer.metrics({"kind": "train", "iteration": 1, "lm_loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["lm_loss"] == "nan"
    line = load_run(tmp_path).train[0]
    assert math.isnan(line.lm_loss or 0.0)
    assert (line.grad_norm, line.lr) == (math.inf, -math.inf)


def test_lines_are_on_disk_at_once_and_status_follows(tmp_path: Path):
    writer = RunWriter(tmp_path)
    writer.start(**FACTS)
    writer.metrics({"kind": "train", "iteration": 1, "lm_loss": 1.0})
    assert load_run(tmp_path).status == "running"
    assert len(load_run(tmp_path).train) == 1
    writer.update(features={"attention": "unfused"})
    assert load_run(tmp_path).facts["features"] == {"attention": "unfused"}
    writer.finish("failed")
    assert load_run(tmp_path).status == "failed"
    assert load_run(tmp_path).facts["finished"]


def test_writer_refuses_what_the_schema_lacks(tmp_path: Path):
    writer = RunWriter(tmp_path)
    with pytest.raises(ValueError, match="no entry colour"):
        writer.start(colour="red")
    writer.start(**FACTS)
    with pytest.raises(ValueError, match="no key los"):
        writer.metrics({"kind": "train", "iteration": 1, "los": 1.0})
    with pytest.raises(ValueError, match="unknown kind"):
        writer.metrics({"iteration": 1})
    with pytest.raises(ValueError, match="door"):
        writer.update(door="window")
    with pytest.raises(ValueError, match="lacks its fingerprint"):
        writer.update(initial_weights={"w": {"sha256": "cd"}})
    with pytest.raises(FileExistsError):
        RunWriter(tmp_path).start(**FACTS)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("run.json", '"schema": 2', '"schema": 3', "has schema 3, this Lockstep reads schemas 1 and 2"),
        ("run.json", '"name"', '"nom"', "the entry name is missing"),
        ("run.json", '"seeds": {', '"colour": 1, "seeds": {', "no entry colour"),
        ("run.json", '"fingerprint"', '"print"', "lacks its fingerprint"),
        ("run.json", '"finished",', '"dreaming",', "status is 'dreaming'"),
        ("metrics.jsonl", '"iteration": 2', '"iteration": 1', r"metrics.jsonl:2: iteration 1 is there twice"),
        ("metrics.jsonl", '"iteration": 2', '"iteration": "two"', r":2: iteration has the value 'two'"),
        ("metrics.jsonl", '"lm_loss": 2.0}', '"lm_l', r":4: not a line of JSON"),
        ("metrics.jsonl", '"lm_loss": 2.0}\n', '"lm_l', r":4: the last line is cut off"),
        ("metrics.jsonl", '"kind": "evaluation"', '"kind": "guess"', "has 'guess'"),
        ("metrics.jsonl", '"split": "valid", ', "", "the key split is missing"),
        ("metrics.jsonl", '"split"', '"spilt"', "no key spilt"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, old: str, new: str, message: str):
    run_dir = damage(write_run(tmp_path / "run"), name, old, new)
    with pytest.raises(UserError, match=message):
        load_run(run_dir)


def test_truncated_run_json(tmp_path: Path):
    run_dir = write_run(tmp_path / "run")
    text = (run_dir / "run.json").read_text()
    (run_dir / "run.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="cut off or damaged"):
        load_run(run_dir)


def test_not_a_run(tmp_path: Path):
    with pytest.raises(UserError, match="no such directory"):
        load_run(tmp_path / "absent")
    with pytest.raises(UserError, match=r"it has no run\.json"):
        load_run(tmp_path)


def test_unfinished_last_line_of_a_live_run_is_left_out(tmp_path: Path):
    writer = RunWriter(tmp_path)
    writer.start(**FACTS)
    writer.metrics({"kind": "train", "iteration": 1, "lm_loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "itera')
    assert [line.iteration for line in load_run(tmp_path).train] == [1]


def test_fresh_directories_are_never_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(create_run_dir(None, "gpt"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8
    assert all(path.parent == tmp_path / "nemo_experiments" / "gpt" for path in made)
    assert sorted(path.name for path in made[0].iterdir()) == ["checkpoints", "tb_logs"]


def test_explicit_directory_must_be_new_or_empty(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert create_run_dir(str(tmp_path / "empty"), "gpt") == tmp_path / "empty"
    with pytest.raises(UserError, match="already holds a run"):
        create_run_dir(str(write_run(tmp_path / "run")), "gpt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"not empty \(it holds thesis.tex\)"):
        create_run_dir(str(tmp_path / "other"), "gpt")
    with pytest.raises(UserError, match="is a file"):
        create_run_dir(str(tmp_path / "other" / "thesis.tex"), "gpt")
    with pytest.raises(UserError, match="cannot name a folder"):
        create_run_dir(None, "../up")


def test_environment_is_described(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert environment_variables()["OMP_NUM_THREADS"] == "2"
    assert "SECRET_TOKEN" not in environment_variables()
    assert package_versions()["numpy"]
    monkeypatch.setenv("PATH", "")
    assert code_version() == {"commit": None, "dirty": None, "core": "main"}


def test_device_is_described():
    facts = device_facts("cpu")
    assert facts["type"] == "cpu"
    assert facts["threads"] >= 1
    assert facts["name"]


def run_inspect(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    record_cli.register(parser.add_subparsers())
    arguments = parser.parse_args(["inspect", *argv])
    return arguments.func(arguments)


def test_inspect_shows_both_spellings_settings_and_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = write_run(tmp_path / "run", iterations=30)
    assert run_inspect(str(run_dir)) == 0
    shown = capsys.readouterr().out
    for text in (
        "--lr 1",
        "optimizer.lr=1",
        "command line (--lr)",
        "4.333333",
        "33.33333",
        "finished",
        "valid (final)",
    ):
        assert text in shown
    assert "optimizer.min_lr" not in shown, "a value equal to its default is not listed"
    assert "18.33333" not in shown, "iterations in the middle are left out"


def test_inspect_json_is_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = write_run(tmp_path / "run")
    assert run_inspect(str(run_dir), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["run"]["config"] == FACTS["config"]
    assert shown["train"][0]["lm_loss"] == 10 / 3 + 1


def test_records_of_schema_1_are_still_read(tmp_path: Path):
    damage(write_run(tmp_path / "run"), "run.json", '"schema": 2', '"schema": 1')
    run = load_run(tmp_path / "run")
    assert [line.ledger for line in run.train] == [None] * 3


def test_ledger_comes_back_with_its_numbers(tmp_path: Path):
    ledger = {"ranks": 2, "loss_sums": [1 / 3, math.inf], "hashes": ["ab", "cd"], "grad_norms": {"mlp": math.nan}}
    writer = RunWriter(tmp_path)
    writer.start(**FACTS)
    writer.metrics({"kind": "train", "iteration": 1, "lm_loss": 1.0, "ledger": ledger})
    writer.finish("finished")
    found = load_run(tmp_path).train[0].ledger
    assert found is not None
    assert math.isnan(found["grad_norms"].pop("mlp"))
    assert found == {**ledger, "grad_norms": {}}
