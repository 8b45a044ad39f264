"""Checkpoints of whole runs: what is saved, that a resumed run is the uninterrupted one, and what is refused."""

import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lockstep.config import ConfigContainer
from lockstep.errors import ConfigError, UserError
from lockstep.training import Command, RunResult, checkpoint_storage, run
from lockstep.training.step import TrainStep
from tests.training.checkpoint_runs import recorded

_SHARD = "tensors-00000-00001.safetensors"
_DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}


def _run(config: ConfigContainer, run_dir: Path) -> RunResult:
    config.run.dir = str(run_dir)
    return run(config, door="python", command=Command(["prog"]), name="tiny")


def _tracked(root: Path) -> str:
    return (root / "latest_checkpointed_iteration.txt").read_text()


@pytest.fixture
def saved(configure, tmp_path) -> Path:
    """Return a folder with the checkpoint of iteration 2 of the tiny run of 4 iterations."""
    root = tmp_path / "saved"
    _run(configure({"checkpoint.save": str(root), "checkpoint.save_interval": 2, "train.exit_interval": 2}), root / "r")
    return root


@pytest.fixture
def refusal(configure, saved, tmp_path) -> Callable[..., str]:
    """Return a function that resumes with changes and returns the error; no run directory may be left behind."""

    def refused(changes: dict[str, Any] | None = None) -> str:
        config = configure({"checkpoint.load": str(saved), **(changes or {})})
        with pytest.raises(UserError) as caught:
            _run(config, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


@pytest.mark.parametrize(
    ("changes", "async_save"),
    [
        ({"mixed_precision.bf16": True, **_DROPOUT}, True),
        # The first scale overflows, and it doubles again after every 4 clean steps.
        (
            {
                "mixed_precision.fp16": True,
                "mixed_precision.initial_loss_scale": 2.0**27,
                "mixed_precision.loss_scale_window": 4,
                "mixed_precision.hysteresis": 1,
                **_DROPOUT,
            },
            False,
        ),
        ({"optimizer.optimizer": "sgd", "dataset.dataloader_type": "cyclic"}, False),
    ],
    ids=["bf16-dropout-async", "fp16-loss-scaling", "fp32-sgd-cyclic"],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(changes, async_save, configure, tmp_path) -> None:
    changes = {"train.train_iters": 20, "validation.eval_interval": 5, "validation.eval_iters": 1, **changes}
    saving = {
        "checkpoint.save": str(tmp_path / "ckpt"),
        "checkpoint.save_interval": 20,
        "checkpoint.async_save": async_save,
        "train.exit_interval": 10,
    }
    _run(configure(changes), tmp_path / "whole")
    first = _run(configure({**changes, **saving}), tmp_path / "first")
    assert (first.status, first.iterations) == ("stopped early", 10)
    torch.manual_seed(99)  # all state has to come from the files
    second = _run(configure({**changes, "checkpoint.load": saving["checkpoint.save"]}), tmp_path / "second")
    assert (second.status, second.iterations) == ("finished", 20)
    whole = recorded(tmp_path / "whole")
    assert recorded(tmp_path / "first") + recorded(tmp_path / "second") == whole
    if "mixed_precision.fp16" in changes:
        scales = [line["loss_scale"] for line in whole if line["kind"] == "train"]
        assert any(line.get("skipped") for line in whole)
        assert len(set(scales[9:])) > 1, "the scale has to move after the resume, or this proves nothing"


def test_saves_at_the_interval_and_at_the_end(configure, tmp_path, capsys) -> None:
    root = tmp_path / "ckpt"
    _run(configure({"checkpoint.save": str(root), "checkpoint.save_interval": 3}), tmp_path / "run")
    assert sorted(path.name for path in root.iterdir()) == [
        "iter_0000003",
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
    ]
    assert _tracked(root) == "4"
    out = capsys.readouterr().out
    assert f"] saving checkpoint at iteration       3 to {root} in safetensors format\n" in out
    assert f"] successfully saved checkpoint from iteration       4 to {root} [ t 1/1, gtp_remat 1/1, p 1/1 ]\n" in out
    assert out.index("after training is done") < out.index("saving checkpoint at iteration       4")


def test_a_checkpoint_holds_everything_under_canonical_names_and_no_pickle(configure, tmp_path) -> None:
    root = tmp_path / "ckpt"
    changes = {"mixed_precision.bf16": True, "checkpoint.save": str(root), "checkpoint.save_interval": 4}
    _run(configure(changes), tmp_path / "run")
    folder = root / "iter_0000004"
    there = ["config.json", "manifest.json", "rng-00000.safetensors", _SHARD, "tensors.json"]
    assert sorted(p.name for p in folder.iterdir()) == there
    tensors = load_file(folder / _SHARD)
    names = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in names
    states = ("main", "exp_avg", "exp_avg_sq")
    assert set(tensors) == {f"model.{n}" for n in names} | {f"optimizer.{s}.{n}" for s in states for n in names}
    for name in names:
        assert tensors[f"model.{name}"].dtype == torch.bfloat16
        assert torch.equal(tensors[f"optimizer.main.{name}"].bfloat16(), tensors[f"model.{name}"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(json.loads((folder / "tensors.json").read_text())["tensors"]) == set(tensors)
    assert (manifest["iteration"], manifest["optimizer"]["step"]) == (4, 4)
    assert manifest["progress"] == {
        "consumed_samples": 16,
        "stepped_samples": 16,
        "evaluated_samples": {"valid": 16, "test": 0},
    }
    assert manifest["run_dir"] == str(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config == json.loads((tmp_path / "run" / "run.json").read_text())["config"]


def test_says_what_it_resumes_from_in_its_first_line_and_in_the_record(configure, saved, tmp_path, capsys) -> None:
    (saved / ".saving-iter_0000004.77").mkdir()
    capsys.readouterr()
    _run(configure({"checkpoint.load": str(saved)}), tmp_path / "run")
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("core: main, commit ")
    assert out[0].endswith(f"; resuming from {saved} at iteration 2")
    assert out[1] == f"the unfinished save iter_0000004 in {saved} is not used"
    assert not any("fresh run" in line for line in out)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["resumed_from"] == {
        "checkpoint": str(saved / "iter_0000002"),
        "iteration": 2,
        "run_dir": str(saved / "r"),
        "finetune": False,
    }
    assert [line["iteration"] for line in recorded(tmp_path / "run") if line["kind"] == "train"] == [3, 4]


def test_ckpt_step_takes_an_older_checkpoint(configure, tmp_path) -> None:
    root = str(tmp_path / "ckpt")
    _run(configure({"checkpoint.save": root, "checkpoint.save_interval": 1}), tmp_path / "whole")
    _run(configure({"checkpoint.load": root, "checkpoint.ckpt_step": 1}), tmp_path / "run")
    assert recorded(tmp_path / "run") == recorded(tmp_path / "whole")[1:]


def test_resuming_a_finished_run_only_evaluates(configure, tmp_path, capsys) -> None:
    root = str(tmp_path / "ckpt")
    saving = {"checkpoint.save": root, "checkpoint.save_interval": 3}
    _run(configure(saving), tmp_path / "whole")
    capsys.readouterr()
    result = _run(configure({**saving, "checkpoint.load": root}), tmp_path / "again")
    assert result.iterations == 4
    assert "saving checkpoint" not in capsys.readouterr().out
    assert recorded(tmp_path / "again") == recorded(tmp_path / "whole")[-2:]


def test_finetune_takes_the_weights_alone(configure, saved, tmp_path, capsys) -> None:
    changes = {"checkpoint.load": str(saved), "checkpoint.finetune": True, "optimizer.lr": 0.0}
    changes |= {"model.seq_length": 128, "scheduler.lr_decay_iters": 100}
    config = configure({**changes, "model.max_position_embeddings": 256})
    capsys.readouterr()
    _run(config, tmp_path / "run")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith(f"; fine-tuning from iteration 0 with the weights of {saved}, iteration 2")
    lines = recorded(tmp_path / "run")
    assert lines[0]["consumed_samples"] == 4
    assert lines[0]["iteration"] == 1
    weights = json.loads((tmp_path / "run" / "run.json").read_text())["initial_weights"]
    parent = json.loads((saved / "r" / "run.json").read_text())["initial_weights"]
    assert weights["fingerprint"] != parent["fingerprint"]


def test_finetuning_in_another_precision_starts_from_the_rounded_weights(configure, saved, tmp_path) -> None:
    changes = {"checkpoint.load": str(saved), "checkpoint.finetune": True, "optimizer.lr": 0.0}
    changes |= {"mixed_precision.bf16": True, "checkpoint.save": str(tmp_path / "ckpt"), "checkpoint.save_interval": 4}
    _run(configure(changes), tmp_path / "run")
    before, after = load_file(saved / "iter_0000002" / _SHARD), load_file(tmp_path / "ckpt" / "iter_0000004" / _SHARD)
    names = [name.removeprefix("model.") for name in after if name.startswith("model.")]
    for name in names:
        rounded = before[f"model.{name}"].bfloat16()
        assert torch.equal(after[f"model.{name}"], rounded)
        assert torch.equal(after[f"optimizer.main.{name}"], rounded.float())


def test_no_load_optim_and_no_load_rng_start_those_afresh(configure, tmp_path) -> None:
    root = str(tmp_path / "ckpt")
    saving = {"checkpoint.save": root, "checkpoint.save_interval": 2, "train.exit_interval": 2}
    saving |= {"checkpoint.save_optim": False, "checkpoint.save_rng": False}
    _run(configure({**_DROPOUT, **saving}), tmp_path / "first")
    folder = Path(root) / "iter_0000002"
    assert not (folder / "rng-00000.safetensors").exists()
    assert not any(name.startswith("optimizer.") for name in load_file(folder / _SHARD))
    loading = {**_DROPOUT, "checkpoint.load": root}
    with pytest.raises(UserError, match="was saved without optimizer state; add --no-load-optim"):
        _run(configure(loading), tmp_path / "x")
    with pytest.raises(UserError, match="was saved without random streams; add --no-load-rng"):
        _run(configure({**loading, "checkpoint.load_optim": False}), tmp_path / "x")
    _run(configure({**loading, "checkpoint.load_optim": False, "checkpoint.load_rng": False}), tmp_path / "run")
    first = recorded(tmp_path / "run")[0]
    assert (first["iteration"], first["consumed_samples"]) == (3, 12)
    assert first["lr"] == 1e-2, "without the optimizer's state the schedules begin anew"


def test_schedules_must_be_those_of_the_checkpoint(configure, saved, refusal, tmp_path) -> None:
    message = refusal({"train.train_iters": 8})
    assert "learning rate decay is 32, in the checkpoint 16" in message
    assert "--override-opt_param-scheduler" in message
    loading = {"checkpoint.load": str(saved), "train.train_iters": 8}
    _run(configure({**loading, "scheduler.override_opt_param_scheduler": True}), tmp_path / "ours")
    _run(configure({**loading, "scheduler.use_checkpoint_opt_param_scheduler": True}), tmp_path / "theirs")
    assert recorded(tmp_path / "ours")[0]["lr"] == pytest.approx(1e-2 * (1 - 8 / 32))
    assert recorded(tmp_path / "theirs")[0]["lr"] == pytest.approx(1e-2 * (1 - 8 / 16))


def test_another_model_is_refused_by_name(refusal) -> None:
    message = refusal({"model.num_layers": 2, "model.ffn_hidden_size": 64})
    assert "model.num_layers is 2, in the checkpoint 1; model.ffn_hidden_size is 64, in the checkpoint 32" in message
    message = refusal({"checkpoint.finetune": True, "model.ffn_hidden_size": 64})
    assert "with shape [32, 16], this run with [64, 16]" in message
    message = refusal({"mixed_precision.bf16": True})
    assert "optimizer.main." in message
    assert "--no-load-optim" in message


def test_a_named_checkpoint_that_cannot_be_loaded_is_fatal(refusal, saved, tmp_path) -> None:
    assert "there is no such folder" in refusal({"checkpoint.load": str(tmp_path / "nowhere")})
    assert "no checkpoint of iteration 7: there are 2" in refusal({"checkpoint.ckpt_step": 7})
    (saved / "latest_checkpointed_iteration.txt").write_text("release")
    assert "holds 'release' instead of an iteration" in refusal()
    (saved / "latest_checkpointed_iteration.txt").unlink()
    assert "has no readable latest_checkpointed_iteration.txt" in refusal()


def test_a_damaged_file_is_named(refusal, saved) -> None:
    folder = saved / "iter_0000002"
    whole = (folder / _SHARD).read_bytes()
    (folder / _SHARD).write_bytes(whole[:-9])
    assert f"{folder / _SHARD} is damaged: it has {len(whole) - 9} bytes of {len(whole)}" in refusal()
    (folder / _SHARD).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "its contents have changed since it was saved" in refusal()
    (folder / _SHARD).unlink()
    assert f"{_SHARD} is damaged: it is missing" in refusal()
    (folder / _SHARD).write_bytes(whole)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest[:-20])
    assert "manifest.json is damaged: it is cut off or no JSON" in refusal()
    (folder / "manifest.json").write_text(manifest.replace('"format": 2', '"format": 1'))
    assert "a checkpoint of format 1, written by Lockstep" in refusal()
    assert "this one reads format 2 only" in refusal()
    (folder / "manifest.json").unlink()
    assert "manifest.json is damaged: it cannot be read" in refusal()


def test_checkpoints_of_two_runs_are_not_mixed(configure, saved, tmp_path) -> None:
    saving = {"checkpoint.save": str(saved), "checkpoint.save_interval": 2}
    with pytest.raises(UserError, match="already holds checkpoints of another run; continue it with --load"):
        _run(configure(saving), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    _run(configure({**saving, "checkpoint.load": str(saved)}), tmp_path / "run")
    assert _tracked(saved) == "4"


def test_a_save_that_replaces_one_of_its_iteration(configure, tmp_path) -> None:
    root = tmp_path / "ckpt"
    saving = {"checkpoint.save": str(root), "checkpoint.save_interval": 2}
    _run(configure(saving), tmp_path / "first")
    shutil.copytree(root / "iter_0000004", tmp_path / "before")
    resumed = {**saving, "checkpoint.load": str(root), "checkpoint.ckpt_step": 2}
    _run(configure(resumed), tmp_path / "second")
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["iter_0000002", "iter_0000004"]
    before, after = load_file(tmp_path / "before" / _SHARD), load_file(root / "iter_0000004" / _SHARD)
    assert all(torch.equal(after[name], before[name]) for name in before)
    # Cut off between the two renames: the old one is found under its other name, and put back by the next save.
    (root / "iter_0000004").rename(root / ".replaced-iter_0000004.77")
    assert _run(configure({"checkpoint.load": str(root)}), tmp_path / "third").iterations == 4
    _run(configure(resumed), tmp_path / "fourth")
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["iter_0000002", "iter_0000004"]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"checkpoint.most_recent_k": 2}, [5, 6]),
        ({"checkpoint.save_retain_interval": 4}, [4, 6]),
        ({"checkpoint.save_retain_interval": 4, "checkpoint.most_recent_k": 2}, [4, 5, 6]),
        ({"checkpoint.most_recent_k": 1, "checkpoint.async_save": True}, [6]),
    ],
)
def test_retention(changes, kept, configure, tmp_path) -> None:
    root = tmp_path / "ckpt"
    saving = {"checkpoint.save": str(root), "checkpoint.save_interval": 1, "train.train_iters": 6}
    _run(configure({**saving, **changes, "validation.eval_iters": 0}), tmp_path / "run")
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == [f"iter_{n:07d}" for n in kept]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_that_fails_ends_the_run_with_its_reason(async_save, configure, tmp_path, monkeypatch) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_text("x")
        raise OSError(28, "No space left on device")

    root = tmp_path / "ckpt"
    saving = {"checkpoint.save": str(root), "checkpoint.save_interval": 1, "checkpoint.async_save": async_save}
    monkeypatch.setattr("lockstep.training.checkpoint_storage.save_file", full)
    with pytest.raises(
        UserError, match=r"saving the checkpoint of iteration 1 to .* failed: .*No space left on device"
    ):
        _run(configure(saving), tmp_path / "run")
    assert list(root.iterdir()) == [], "half a checkpoint does not stay on a full disk"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_settings_without_what_they_need_are_refused(configure) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(
            {
                "checkpoint.save": "x",
                "checkpoint.ckpt_step": 3,
                "checkpoint.most_recent_k": 0,
                "checkpoint.load_optim": False,
                "scheduler.override_opt_param_scheduler": True,
                "scheduler.use_checkpoint_opt_param_scheduler": True,
            }
        )
    text = str(caught.value)
    assert "checkpoint.save (--save) needs checkpoint.save_interval (--save-interval)" in text
    assert "checkpoint.ckpt_step (--ckpt-step) has no effect without checkpoint.load (--load)" in text
    assert "checkpoint.load_optim (--no-load-optim) has no effect without checkpoint.load (--load)" in text
    assert "checkpoint.most_recent_k = 0: give 1 or more" in text
    assert "--use-checkpoint-opt_param-scheduler exclude each other" in text
    with pytest.raises(ConfigError, match=r"= 5 is not a multiple of checkpoint\.save_interval = 2"):
        configure({"checkpoint.save": "x", "checkpoint.save_interval": 2, "checkpoint.save_retain_interval": 5})


def test_a_signal_ends_the_iteration_saves_and_stops(configure, tmp_path, capsys, monkeypatch) -> None:
    root = tmp_path / "ckpt"
    before = signal.getsignal(signal.SIGUSR1)
    launch = TrainStep.launch

    def signalled(self: TrainStep, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return launch(self, *args)

    monkeypatch.setattr(TrainStep, "launch", signalled)
    changes = {"checkpoint.save": str(root), "checkpoint.save_interval": 100, "checkpoint.async_save": True}
    changes |= {"train.exit_signal_handler": True, "train.exit_signal": "SIGUSR1"}
    result = _run(configure(changes), tmp_path / "run")
    assert (result.status, result.iterations) == ("stopped early", 1)
    assert _tracked(root) == "1"
    assert "[exiting program after receiving SIGUSR1.] datetime" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_save_in_the_background_is_not_touched_by_training(configure, tmp_path, monkeypatch) -> None:
    saving: dict[str, Any] = {"checkpoint.save_interval": 1, "train.train_iters": 2, "validation.eval_iters": 0}
    _run(configure({**saving, "checkpoint.save": str(tmp_path / "sync")}), tmp_path / "first")
    trained, launch, write = threading.Event(), TrainStep.launch, checkpoint_storage.save_file

    def stepping(self: TrainStep, *args: Any) -> Any:
        launched = launch(self, *args)
        if (tmp_path / "async").exists() and any((tmp_path / "async").iterdir()):
            trained.set()
        return launched

    def waiting(tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert trained.wait(30)
        write(tensors, path)

    monkeypatch.setattr(TrainStep, "launch", stepping)
    monkeypatch.setattr(checkpoint_storage, "save_file", waiting)
    saving |= {"checkpoint.save": str(tmp_path / "async"), "checkpoint.async_save": True}
    _run(configure(saving), tmp_path / "second")
    before, after = (load_file(tmp_path / kind / "iter_0000001" / _SHARD) for kind in ("sync", "async"))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_full_disk_is_one_line(configure, tmp_path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    changes = {"checkpoint.save": str(tmp_path / "ckpt"), "checkpoint.save_interval": 1, "tokenizer.vocab_size": 9000}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            _run(configure(changes), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = str(caught.value)
    assert "saving the checkpoint of iteration 1 to" in text
    assert "File too large" in text
    assert "\n" not in text
    assert list((tmp_path / "ckpt").iterdir()) == []
