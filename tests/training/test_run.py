"""Whole runs of a tiny model: order of events, record, exits, failures, repeatability."""

import gc
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.config import ConfigContainer
from lockstep.data.build import build_datasets
from lockstep.data.tokenizers import build_tokenizer
from lockstep.errors import UserError
from lockstep.record import load_run
from lockstep.training import Command, RunResult, run

_CLOCKED = ("seconds", "tokens_per_second", "memory_bytes")


def _run(config: ConfigContainer, run_dir: Path) -> tuple[RunResult, list[dict[str, Any]]]:
    config.run.dir = str(run_dir)
    result = run(config, door="python", command=Command(["prog", "--x"], flags="--x 1"), name="tiny")
    return result, _lines(run_dir)


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _facts(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


def _train(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == "train"]


def _without_clock(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in _CLOCKED} for line in lines]


def test_run_writes_iterations_evaluations_and_facts(configure, tmp_path, capsys) -> None:
    config = configure({"mixed_precision.bf16": True})
    result, lines = _run(config, tmp_path / "run")
    events = [(line["kind"], line["iteration"], line.get("split"), line.get("final")) for line in lines]
    assert events == [
        ("train", 1, None, None),
        ("train", 2, None, None),
        ("evaluation", 2, "valid", False),
        ("train", 3, None, None),
        ("train", 4, None, None),
        ("evaluation", 4, "valid", False),
        ("evaluation", 4, "valid", True),
        ("evaluation", 4, "test", True),
    ]
    assert (result.status, result.iterations, len(result.evaluations)) == ("finished", 4, 4)
    train = _train(lines)
    assert [line["consumed_samples"] for line in train] == [4, 8, 12, 16]
    assert [line["lr"] for line in train] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3], rel=1e-12)
    assert [line["next_lr"] for line in train][:3] == [line["lr"] for line in train][1:]
    assert all(line["weight_decay"] == 0.01 and line["valid_tokens"] == 4 * 256 for line in train)
    assert train[-1]["lm_loss"] < train[0]["lm_loss"]
    assert result.lm_loss == train[-1]["lm_loss"]
    evaluation = lines[2]
    assert evaluation["samples"] == 8
    assert evaluation["ppl"] == pytest.approx(math.exp(evaluation["lm_loss"]), rel=1e-12)

    facts = _facts(tmp_path / "run")
    assert (facts["status"], facts["door"], facts["name"]) == ("finished", "python", "tiny")
    assert facts["command"] == {"argv": ["prog", "--x"], "flags": "--x 1", "overrides": None}
    assert facts["config"]["model"]["vocab_size"] == 64
    assert facts["origins"]["model.vocab_size"] == "derived (tokenizer vocabulary of 50, padded to a multiple of 16)"
    assert facts["seeds"] == {"rng": 1234, "dataset": 1234}
    assert set(facts["data"]) == {"tokenizer", "train", "valid", "test"}
    assert facts["features"]["precision"] == "bfloat16"
    assert facts["initial_weights"]
    assert facts["summary"] == {"ended": "finished", "iterations": 4, "lm_loss": result.lm_loss}
    assert config.model.vocab_size is None, "the caller's tree must stay as it is"
    assert list((tmp_path / "run" / "tb_logs").iterdir())

    out = capsys.readouterr().out
    first, rest = out.split("\n", 1)
    assert first.startswith(f"core: main, commit {facts['code']['commit'][:12]}")
    assert first.endswith("; fresh run from initial weights, seed 1234")
    assert facts["code"]["core"] == "main"
    assert rest.startswith(f"run directory: {tmp_path / 'run'}\ndevice: cpu")
    assert "    train:      16\n    validation: 24\n    test:       8\n" in out
    assert out.count(" iteration        ") == 4


def test_two_runs_are_bit_identical(configure, tmp_path) -> None:
    changes = {"mixed_precision.bf16": True, "model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
    _, first = _run(configure(changes), tmp_path / "a")
    torch.manual_seed(99)  # the global generator must not matter
    _, second = _run(configure(changes), tmp_path / "b")
    assert _without_clock(first) == _without_clock(second)
    _, other = _run(configure({**changes, "rng.seed": 5}), tmp_path / "c")
    assert _train(other)[0]["lm_loss"] != _train(first)[0]["lm_loss"]


_EXPERTS = {
    "model.num_moe_experts": 4,
    "model.moe_aux_loss_coeff": [0.01],
    "model.moe_router_score_function": "sigmoid",
    "model.moe_router_enable_expert_bias": True,
}


def test_losses_of_routers_are_on_the_record_and_experts_resume_exactly(configure, tmp_path) -> None:
    saving = {**_EXPERTS, "checkpoint.save": str(tmp_path / "saved"), "checkpoint.save_interval": 2}
    _, whole = _run(configure(saving), tmp_path / "whole")
    assert all(line["router_losses"]["load_balancing_loss"] > 0.9 for line in _train(whole))
    assert [line.router_losses for line in load_run(tmp_path / "whole").train] == [
        line["router_losses"] for line in _train(whole)
    ]
    loading = {**_EXPERTS, "checkpoint.load": str(tmp_path / "saved"), "checkpoint.ckpt_step": 2}
    _, rest = _run(configure(loading), tmp_path / "rest")
    assert _without_clock(_train(rest)) == _without_clock(_train(whole)[2:])


def test_evaluations_go_on_where_the_last_one_ended(configure, tmp_path) -> None:
    config = configure({"optimizer.lr": 0.0})
    result, _ = _run(config, tmp_path / "run")
    tokenizer = build_tokenizer(config.tokenizer)
    data = build_datasets(config.dataset, seq_length=256, seed=1234, tokenizer=tokenizer, num_samples=(16, 24, 8))
    assert data.valid is not None
    assert len(data.valid) >= 24
    losses = [evaluation.lm_loss for evaluation in result.evaluations if evaluation.split == "valid"]
    assert len(set(losses)) == 3, "the weights stay the same, so equal losses would mean equal samples"


def test_skip_train_only_evaluates(configure, tmp_path, capsys) -> None:
    result, lines = _run(configure({"validation.skip_train": True, "optimizer.lr": None}), tmp_path / "run")
    assert [(line["split"], line["final"], line["iteration"]) for line in lines] == [
        ("valid", True, 0),
        ("test", True, 0),
    ]
    assert (result.iterations, result.lm_loss) == (0, None)
    assert "skipping training (--skip-train is on) ..." in capsys.readouterr().out


def test_no_evaluation_without_eval_iters(configure, tmp_path) -> None:
    _, lines = _run(configure({"validation.eval_iters": 0}), tmp_path / "run")
    assert [line["kind"] for line in lines] == ["train"] * 4


def test_exit_interval_ends_at_once(configure, tmp_path, capsys) -> None:
    result, lines = _run(configure({"train.exit_interval": 2}), tmp_path / "run")
    assert [(line["kind"], line["iteration"]) for line in lines] == [("train", 1), ("train", 2), ("evaluation", 2)]
    assert (result.status, _facts(tmp_path / "run")["summary"]["ended"]) == ("stopped early", "stopped early")
    assert "[exiting program at iteration 2]" in capsys.readouterr().out


def test_exit_duration(configure, tmp_path, monkeypatch) -> None:
    config = configure({"train.exit_duration_in_mins": 1})
    ticks = iter(range(0, 100000, 40))
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))
    result, _ = _run(config, tmp_path / "run")
    assert (result.status, result.iterations) == ("stopped early", 2)


def test_time_that_ends_in_an_evaluation_gives_no_result(configure, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("lockstep.training.exits.ExitRule.out_of_time", lambda self: True)
    result, lines = _run(configure({"validation.eval_interval": 1}), tmp_path / "run")
    assert [line["kind"] for line in lines] == ["train"]
    assert result.status == "stopped early"
    assert "Exiting during evaluation, timelimit reached" in capsys.readouterr().out


def test_batch_ramp(configure, tmp_path) -> None:
    changes = {"train.train_iters": None, "train.train_samples": 20, "train.rampup_batch_size": [2, 2, 8]}
    result, lines = _run(configure({**changes, "validation.eval_iters": 0}), tmp_path / "run")
    assert [line["global_batch_size"] for line in _train(lines)] == [2, 2, 2, 2, 4, 4, 4]
    assert result.iterations == 7


def test_fp16_overflow_skips_and_recovers(configure, tmp_path, capsys) -> None:
    changes = {"mixed_precision.fp16": True, "mixed_precision.hysteresis": 1, "train.train_iters": 24}
    _, lines = _run(configure({**changes, "validation.eval_iters": 0}), tmp_path / "run")
    train = _train(lines)
    assert train[0]["skipped"]
    assert train[0]["grad_norm"] is None
    skipped = sum(line["skipped"] for line in train)
    assert 0 < skipped < 24
    assert train[0]["lr"] == train[0]["next_lr"], "a skipped iteration must not move the schedule"
    advanced = [line for line in train if not line["skipped"]]
    assert advanced[0]["lr"] == train[0]["lr"]
    assert train[0]["loss_scale"] == 2.0**31
    assert f"number of skipped iterations: {1:3d} |" in capsys.readouterr().out


def test_nan_stops_the_run_by_name(configure, tmp_path) -> None:
    config = configure({"optimizer.optimizer": "sgd", "optimizer.lr": 1e38, "optimizer.clip_grad": 0.0})
    with pytest.raises(UserError, match=r"iteration [234]: the (loss|gradient norm) is (nan|inf)"):
        _run(config, tmp_path / "run")
    facts = _facts(tmp_path / "run")
    assert facts["status"] == "failed"
    assert "iteration" in facts["summary"]["error"]
    assert not math.isfinite(float(_train(_lines(tmp_path / "run"))[-1]["lm_loss"] or "nan"))


def test_nan_is_let_through_where_asked_for(configure, tmp_path) -> None:
    changes = {"optimizer.optimizer": "sgd", "optimizer.lr": 1e38, "rerun_state_machine.check_for_nan_in_loss": False}
    result, _ = _run(configure({**changes, "optimizer.clip_grad": 0.0}), tmp_path / "run")
    assert result.iterations == 4


@pytest.mark.parametrize(("place", "doing"), [("build", "setting up"), ("train", "training")])
def test_a_full_memory_is_one_message(place, doing, configure, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        torch.empty(1 << 52, dtype=torch.uint8)

    monkeypatch.setattr(importlib.import_module("lockstep.training.run"), place, full)
    with pytest.raises(UserError, match=f"out of memory on cpu while {doing}: 4194304.0 GiB were asked for"):
        _run(configure(), tmp_path / "run")
    assert (tmp_path / "run").exists() == (place == "train")


def test_a_mistake_leaves_no_directory_behind(configure, tmp_path) -> None:
    config = configure()
    config.model.vocab_size = 10
    with pytest.raises(UserError, match=r"model.vocab_size = 10 is below the tokenizer's vocabulary of 50"):
        _run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_taken_directory_is_refused(configure, tmp_path) -> None:
    _run(configure({"train.train_iters": 1, "validation.eval_iters": 0}), tmp_path / "run")
    before = _facts(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        _run(configure(), tmp_path / "run")
    assert _facts(tmp_path / "run") == before


def test_several_processes_without_a_meeting_point_are_refused(configure, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK is not set; start with torchrun"):
        _run(configure(), tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(configure, tmp_path) -> None:
    with pytest.raises(UserError, match="PyTorch sees no GPU"):
        _run(configure({"run.device": "cuda"}), tmp_path / "run")


def test_wandb_that_is_not_installed_is_refused(configure, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="the wandb package is not installed"):
        _run(configure({"logger.wandb_project": "p"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_deterministic_mode_holds_during_the_run_only(configure, tmp_path, monkeypatch) -> None:
    seen = []
    step = "lockstep.training.loop.begin"
    from lockstep.training.loop import begin

    def spy(*args: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return begin(*args)

    monkeypatch.setattr(step, spy)
    _run(configure({"model.deterministic_mode": True}), tmp_path / "run")
    assert seen == [True] * 4
    assert not torch.are_deterministic_algorithms_enabled()


def test_manual_garbage_collection_is_undone(configure, tmp_path) -> None:
    _run(configure({"train.manual_gc": True, "train.manual_gc_interval": 1}), tmp_path / "run")
    assert gc.isenabled()


def test_tensorboard_tags(configure, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"logger.log_params_norm": True, "logger.log_validation_ppl_to_tensorboard": True}
    _, lines = _run(configure({**changes, "logger.tensorboard_dir": str(tmp_path / "tb")}), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    tags = ["learning-rate", "batch-size", "lm loss", "loss-scale", "grad-norm", "params-norm"]
    tags += ["lm loss validation", "lm loss validation ppl"]
    assert sorted(events.Tags()["scalars"]) == sorted(tags + [f"{tag} vs samples" for tag in tags])
    points = events.Scalars("lm loss")
    assert [point.step for point in points] == [1, 2, 3, 4]
    assert [point.value for point in points] == pytest.approx([line["lm_loss"] for line in _train(lines)], rel=1e-6)
    assert [point.step for point in events.Scalars("lm loss vs samples")] == [4, 8, 12, 16]


def test_times_for_tensorboard_are_means_of_a_log_interval(configure, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"logger.log_timers_to_tensorboard": True, "logger.log_throughput": True, "logger.log_interval": 2}
    _, lines = _run(configure({**changes, "logger.tensorboard_dir": str(tmp_path / "tb")}), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    times, throughput = events.Scalars("iteration-time"), events.Scalars("throughput")
    seconds = [line["seconds"] for line in _train(lines)]
    assert [point.step for point in times] == [2, 4]
    assert [point.value for point in times] == pytest.approx([sum(seconds[:2]) / 2, sum(seconds[2:]) / 2], rel=1e-3)
    work = [time.value * rate.value for time, rate in zip(times, throughput, strict=True)]
    assert work[0] == pytest.approx(work[1], rel=1e-5) != 0


def test_data_that_runs_out_is_one_message(configure, tmp_path, monkeypatch) -> None:
    from lockstep.training import setup

    monkeypatch.setattr(setup, "sample_order", lambda *_: iter([[0, 1], [2, 3]]))
    with pytest.raises(UserError, match=r"the train split ended after 4 samples of the \d+ it has"):
        _run(configure(), tmp_path / "run")
    assert _facts(tmp_path / "run")["status"] == "failed"


def test_ledger_adds_up_to_the_line_it_stands_in(configure, tmp_path) -> None:
    _run(configure(_EXPERTS), tmp_path / "run")
    for line in load_run(tmp_path / "run").train:
        ledger = line.ledger
        assert ledger is not None
        assert line.valid_tokens == sum(ledger["tokens"])
        assert line.lm_loss == math.fsum(ledger["loss_sums"]) / sum(ledger["tokens"])
        assert ledger["divisors"] == [tokens * 2 for tokens in ledger["tokens"]]
        assert ledger["router_weight"] == 0.5
        assert len(set(ledger["hashes"])) == len(ledger["hashes"]) == 2
        assert set(ledger["grad_norms"]) == {"embedding", "attention", "experts", "router", "norms"}
        assert math.hypot(*ledger["grad_norms"].values()) == pytest.approx(line.grad_norm, rel=1e-6)
