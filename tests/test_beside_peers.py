import importlib
import json
import select
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.stateful import Stateful

from benchmarks import beside_peers, gpu_speed
from benchmarks.peers import job as jobs
from benchmarks.peers.stand_ins import StandIns
from lockstep.parallel import Mesh
from lockstep.parallel.mesh import Axis


def found(rate, **more):
    step = {"step_s": 1000 / rate, "tokens_per_s": rate, "peak_gib": 1.0, "gpus": 1}
    return {**step, "device": "card", "torch": "2", "date": "today", **more}


def pair(name, *, tiny=False):
    """A setting's job for a peer, and our own configuration."""
    setting = beside_peers.setting_of(name, tiny=tiny)
    config = gpu_speed.configured(setting.name, "auto", list(setting.changes), setting.gpus)
    return beside_peers.job_of(setting, compiled=False), config


@pytest.mark.parametrize("number", [0, gpu_speed.WARM_UP])
def test_a_peer_gets_the_shape_and_tokens_of_our_configuration(number):
    job, config = pair("llama32_1b-mb1", tiny=True)
    ours = gpu_speed._batch(config, number, Mesh())
    texts, labels = (torch.cat(parts) for parts in zip(*job.tokens(number, 0), strict=True))
    assert texts.equal(ours.tokens)
    assert labels.equal(ours.labels)
    assert len(texts) == (8 if number else 2)
    assert (job.layers, job.hidden, job.ffn, job.groups, job.vocabulary, job.length) == (2, 64, 128, 2, 128, 64)


def test_processes_get_the_tokens_that_ours_get():
    job, config = pair("llama3_8b")
    mesh = Mesh(dp=Axis(2, 1), world=Axis(2, 1))
    ours = gpu_speed._batch(config, 0, mesh)
    assert job.tokens(0, 1)[0][0].equal(ours.tokens)


def test_both_sides_leave_out_as_many_steps():
    assert jobs.WARM_UP == gpu_speed.WARM_UP


def test_a_peer_gets_the_micro_batches_and_precision_of_the_name():
    job, config = pair("llama3_8b+fp8+16micro")
    assert (job.micro_batch, job.batch, config.train.global_batch_size) == (1, 32, 32)
    assert job.float8 == "tensorwise"
    assert len(job.tokens(gpu_speed.WARM_UP, 1)) == 16
    assert pair("llama3_8b")[0].float8 is None
    assert pair("llama32_1b-mb4+4micro")[0].batch == 16


def test_micro_batches_are_those_of_a_data_parallel_process():
    assert gpu_speed.configured("llama3_8b+tp2+4micro", "auto", [], 2).train.global_batch_size == 4


def test_a_peer_gets_the_experts_of_our_configuration():
    job, config = pair("deepseek_v2_lite+6layers+ep2")
    assert job.experts == (64, 6, 1408, 2816)
    assert (job.layers, job.recomputed, config.model.expert_model_parallel_size) == (6, True, 2)


@pytest.mark.parametrize(("name", "told"), [("llama3_8b+tp2", r"\+tp2"), ("reference-pair", "reference-pair")])
def test_a_setting_that_peers_do_not_have_is_refused(name, told):
    with pytest.raises(ValueError, match=told):
        beside_peers.setting_of(name)


def test_the_table_has_ratios_and_reasons():
    turns = {
        "ours": found(600.0),
        "torchtitan": found(500.0, peer="torchtitan 0.2.2"),
        "transformers": {"failed": "a|b", "gpus": 1},
    }
    rows = beside_peers.table({"llama32_1b-mb4": turns})
    assert rows[3] == "| llama32_1b-mb4 | 1 | torchtitan 0.2.2 | 2000.0 | 500 | 1.0 | 1.200 |"
    assert rows[4] == "| llama32_1b-mb4 | 1 | transformers | a/b | | | |"
    assert len(rows) == 5


def test_the_table_has_kernels_beside_their_floors():
    times = {"attention": 3.0, "matrix products": 5.0, "compiled": 2.0, "others": 1.0, "idle": 0.5, "whole": 11.5}
    ours = found(600.0, kernels_ms=times, floors_ms={"attention": 2.9, "matrix products": 4.0})
    rows = beside_peers.table({"llama32_1b-mb4": {"ours": ours}})
    assert rows[-2:] == [
        "| llama32_1b-mb4 | ours | 5.0 | 3.0 |  |  | 0.5 | 3.0 |",
        "| llama32_1b-mb4 | floor | 4.0 | 2.9 |  |  |  |  |",
    ]


def test_the_table_of_several_runs_is_written_between_its_marks(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- beside-peers -->\nold\n<!-- /beside-peers -->\nafter\n")
    for name, setting in (("one", "llama32_1b-mb4"), ("two", "llama3_8b")):
        (tmp_path / name).write_text(json.dumps({setting: {"ours": found(600.0)}}))
    files = [str(tmp_path / "one"), str(tmp_path / "two")]
    monkeypatch.setattr(sys, "argv", ["beside_peers", "--of", *files, "--write", str(page)])
    assert beside_peers.main() == 0
    lines = page.read_text().splitlines()
    assert lines[:4] == ["before", "<!-- beside-peers -->", "", "card, torch 2, today:"]
    assert [line.split(" | ")[0] for line in lines[7:9]] == ["| llama32_1b-mb4", "| llama3_8b"]
    assert lines[9:] == ["", "<!-- /beside-peers -->", "after"]
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        beside_peers.write(page, ["new"])


def test_a_peer_that_is_absent_is_skipped_with_the_reason(tmp_path):
    options = Namespace(peer_path=tmp_path)
    assert beside_peers.absent("no_such_trainer", options) == "no_such_trainer is not installed"
    (tmp_path / "no_such_trainer").mkdir()
    assert beside_peers.absent("no_such_trainer", options) is None


@pytest.mark.parametrize(
    ("code", "timeout", "told"),
    [
        ("import sys; print('{\"step_s\": 1.0}', flush=True); sys.exit('fails at its end')", 120.0, {"step_s": 1.0}),
        ("raise MemoryError('too large')", 120.0, {"failed": "MemoryError: too large", "gpus": 1}),
        ("import time; time.sleep(600)", 1.0, {"failed": "did not end in 1 s", "gpus": 1}),
    ],
)
def test_a_turn_has_its_result_or_its_reason(tmp_path, monkeypatch, code, timeout, told):
    monkeypatch.setattr(beside_peers, "command_of", lambda *_: [sys.executable, "-c", code])
    setting = beside_peers.setting_of("llama32_1b-mb4")
    result = beside_peers.turn("ours", setting, Namespace(peer_path=None, logs=tmp_path, timeout=timeout))
    assert {name: result[name] for name in told} == told
    assert (tmp_path / "llama32_1b-mb4-ours.log").is_file()


def test_ending_a_launcher_ends_workers_that_have_sessions_of_their_own():
    worker = "import time; print('up', flush=True); time.sleep(600)"
    launcher = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {worker!r}], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        gpu_speed.end(process.pid)
        # The worker has the other end too: it closes when both are gone.
        assert select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.read() == b""


def test_a_stand_in_has_every_name_and_can_be_a_base(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [StandIns(("no_such_package",)), *sys.meta_path])
    module = importlib.import_module("no_such_package.part")
    monkeypatch.delitem(sys.modules, "no_such_package.part")
    monkeypatch.delitem(sys.modules, "no_such_package")

    loader = type("Loader", (module.Loader, Stateful), {})
    assert isinstance(loader("any", argument=1), loader)
    assert module.registry.Registry[int]().__class__.__name__ == "Registry"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_package_either")


def test_the_reason_of_a_failure_is_its_error_not_the_launchers():
    log = "[rank0]: x.OutOfMemoryError: too large\nE1125 failed\ntorch.y.ChildFailedError: \n====\n"
    assert beside_peers._reason(log) == "x.OutOfMemoryError: too large"
    assert beside_peers._reason("y.KeyError: 'a'\nError running lspci: none\n") == "y.KeyError: 'a'"


def test_changes_of_a_setting_have_types():
    changes = ["model.num_layers=3", "model.share_embeddings_and_output_weights=false", "mixed_precision.fp8=hybrid"]
    assert [gpu_speed._changed(change)[1] for change in changes] == [3, False, "hybrid"]


def test_floors_are_work_over_rates(monkeypatch):
    config = gpu_speed.configured("llama32_1b-mb4", "auto", [])
    monkeypatch.setattr(gpu_speed, "choose_attention", lambda *_: SimpleNamespace(kernel="cudnn"))
    monkeypatch.setattr(gpu_speed, "_attention_seconds", lambda *_: 1e-3)
    monkeypatch.setattr(gpu_speed, "_seconds", lambda _: 1.0)
    scores = 6 * 16 * 2048 * 8192**2 * 8
    whole = scores + 2 * 8192**3
    cpu = torch.device("cpu")
    alone = gpu_speed._floors(config, cpu, Mesh(), whole, 10)
    assert alone == {"matrix products": 1000.0, "attention": 16 * 8.0}
    mesh = Mesh(dp=Axis(2), world=Axis(2))
    both = gpu_speed._floors(config, cpu, mesh, whole, 2**28)
    # Gradients in FP32 and weights in BF16, at 2 parts of 128 MiB a second.
    assert both is not None
    assert both["communication"] == 6000.0
    assert both["attention"] == 16 * 4.0
