from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import beside_peers, gpu_speed
from lockstep.parallel import Mesh
from lockstep.parallel.mesh import Axis


def found(rate, **more):
    return {"step_s": 1000 / rate, "tokens_per_s": rate, "peak_gib": 1.0, "device": "card", "torch": "2", **more}


def test_a_peer_gets_the_shape_and_tokens_of_our_configuration():
    setting = beside_peers._SETTINGS["tiny"]
    job = beside_peers.job_of(setting)
    config = gpu_speed.configured(setting.name, "auto", list(setting.changes))
    ours = gpu_speed._batch(config, 3, torch.device("cpu"), Mesh())
    texts, labels = (torch.cat(parts) for parts in zip(*job.tokens(3, 0), strict=True))
    assert texts.equal(ours.tokens)
    assert labels.equal(ours.labels)
    assert (job.layers, job.hidden, job.ffn, job.groups, job.vocabulary, job.length) == (2, 64, 128, 2, 128, 64)


def test_processes_get_the_tokens_that_ours_get():
    job = beside_peers.job_of(beside_peers._SETTINGS["llama3_8b"])
    config = gpu_speed.configured("llama3_8b", "auto", [], 2)
    mesh = Mesh(dp=Axis(2, 1), world=Axis(2, 1))
    ours = gpu_speed._batch(config, 0, torch.device("cpu"), mesh)
    assert job.tokens(0, 1)[0][0].equal(ours.tokens)


def test_the_table_has_ratios_and_reasons():
    turns = {
        "ours": found(600.0),
        "torchtitan": found(500.0, peer="torchtitan 0.2.2"),
        "transformers": {"failed": "a|b"},
    }
    rows = beside_peers.table({"llama32_1b": turns})
    assert rows[3] == "| llama32_1b | 1 | torchtitan 0.2.2 | 2000.0 | 500 | 1.0 | 1.20 |"
    assert rows[4] == "| llama32_1b | 1 | transformers | a/b | | | |"
    assert len(rows) == 5


def test_the_table_has_kernels_beside_their_floors():
    times = {"attention": 3.0, "matrix products": 5.0, "compiled": 2.0, "others": 1.0, "idle": 0.5, "whole": 11.5}
    ours = found(600.0, kernels_ms=times, floors_ms={"attention": 2.9, "matrix products": 4.0})
    rows = beside_peers.table({"llama32_1b": {"ours": ours}})
    assert rows[-2:] == [
        "| llama32_1b | ours | 5.0 | 3.0 |  |  | 0.5 | 3.0 |",
        "| llama32_1b | floor | 4.0 | 2.9 |  |  |  |  |",
    ]


def test_the_table_is_written_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- beside-peers -->\nold\n<!-- /beside-peers -->\nafter\n")
    beside_peers.write(page, ["new"])
    assert page.read_text() == "before\n<!-- beside-peers -->\n\nnew\n\n<!-- /beside-peers -->\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        beside_peers.write(page, ["new"])


def test_a_peer_that_is_absent_is_skipped_with_the_reason(tmp_path):
    options = Namespace(peer_path=tmp_path)
    assert beside_peers.absent("no_such_trainer", options) == "no_such_trainer is not installed"
    (tmp_path / "no_such_trainer").mkdir()
    assert beside_peers.absent("no_such_trainer", options) is None


def test_the_reason_of_a_failure_is_its_error_not_the_launchers():
    log = "[rank0]: x.OutOfMemoryError: too large\nE1125 failed\ntorch.y.ChildFailedError: \n====\n"
    assert beside_peers._reason(log) == "x.OutOfMemoryError: too large"


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
