"""Localising: clean pairs are rounding, and planted faults are named by stage and tensor."""

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lockstep.cli import main
from lockstep.errors import UserError
from lockstep.hf.rules import Grouped
from lockstep.lab.compare import compare_paths
from lockstep.lab.localise import stages, worker
from lockstep.lab.localise.foreign import from_conversion, from_folder
from lockstep.lab.localise.localise import Localised, in_question, judge, localise
from lockstep.lab.localise.probes import load_probes
from lockstep.lab.localise.reference import ReferenceDecoder
from lockstep.lab.localise.replay import Decoder, replay
from lockstep.lab.localise.sides import Foreign, Rerun, from_checkpoint, from_record, open_sides
from lockstep.lab.localise.walk import Pass
from lockstep.lab.localise.worker import RUN, TWIN, Job, config_of
from lockstep.models import norms
from lockstep.record import load_run
from lockstep.training import Command, checkpoint_load, feed
from lockstep.training import run as train
from tests.lab import faults
from tests.lab.synthetic import write
from tests.parallel.spawn import Turn, in_turn

_ALONE = [name for name, fault in faults.FAULTS.items() if fault.processes == 1 and not fault.trains_first]
_TOGETHER = [name for name, fault in faults.FAULTS.items() if fault.processes > 1]


def _pass(label: str, folder: Path) -> Pass:
    return Pass(label, str(folder), load_probes(folder, RUN), load_probes(folder, TWIN))


def _outcome(a: Path, b: Path) -> Localised:
    return judge((_pass("A", a), _pass("B", b)), [1])


def _probe(job: Job, name: str | None = None) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert faults.planted(name, job) == 0


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[str, Path]:
    """The probes of the clean run of one process, by kind of model."""
    found = {}
    for kind in faults.KINDS:
        found[kind] = tmp_path_factory.mktemp(kind)
        _probe(faults.job_of(None, found[kind], found[kind], kind))
    return found


def _clean(name: str, clean: dict[str, Path]) -> Path:
    """Return the clean side of one process of a fault, which is run when the first one asks for it."""
    kind = faults.FAULTS[name].kind
    if kind not in clean:
        clean[kind] = clean["gpt"].parent / f"clean-{len(clean)}"
        _probe(faults.job_of(None, clean[kind], clean[kind], kind))
    return clean[kind]


def _assert_named(found: Localised, name: str) -> None:
    fault, first = faults.FAULTS[name], found.walked.first
    assert first is not None, found.sentence
    assert (first.stage, first.name) == (fault.stage, fault.tensor), found.sentence
    assert found.exit_code == 1


@pytest.mark.parametrize("name", _ALONE)
def test_a_fault_in_one_process_is_named(name: str, clean: dict[str, Path], tmp_path: Path) -> None:
    start = _clean(name, clean)
    _probe(faults.job_of(name, tmp_path, start), name)
    _assert_named(_outcome(start, tmp_path), name)


@pytest.mark.parametrize("kind", faults.KINDS)
@pytest.mark.parametrize("decoder", ["reference", "transformers"])
def test_another_decoder_is_rounding(kind: str, decoder: str, clean: dict[str, Path], tmp_path: Path) -> None:
    found = _against(decoder, clean[kind], tmp_path)
    assert found.verdict == "rounding", found.sentence
    assert not [r for r in found.walked.results if r.state == "unknown"]


def test_a_hugging_face_folder_is_a_side(clean: dict[str, Path], tmp_path: Path) -> None:
    _against("transformers", clean["llama"], tmp_path / "conversion")
    folder = tmp_path / "conversion" / "hf-0"
    run = write(tmp_path / "run", features={"layout": {"processes": 1}})
    assert open_sides(str(run), str(folder))[1] == Foreign("folder", folder)
    replay(from_folder(folder), load_probes(clean["llama"], RUN), [1], tmp_path / "b")
    side = Pass("B", "folder", load_probes(tmp_path / "b", RUN), load_probes(tmp_path / "b", TWIN), foreign=True)
    found = judge((_pass("A", clean["llama"]), side), [1])
    assert found.verdict == "rounding", found.sentence


_VARIANTS: dict[str, dict[str, Any]] = {
    "Llama 3.1's positions, norms of heads, loss by token, documents": {
        **faults.LLAMA,
        "model.rope_scaling": True,
        "model.qk_layernorm": True,
        "model.calculate_per_token_loss": True,
        "dataset.reset_attention_mask": True,
    },
    "experts": {
        **faults.LLAMA,
        "model.num_moe_experts": 4,
        "model.moe_ffn_hidden_size": 16,
        "model.moe_layer_freq": "[0]+[1]",
        "model.moe_router_load_balancing_type": ["none"],
    },
    "experts chosen by shares": {
        **faults.LLAMA,
        "model.num_moe_experts": 4,
        "model.moe_ffn_hidden_size": 16,
        "model.moe_router_pre_softmax": True,
        "model.moe_router_load_balancing_type": ["none"],
    },
    "BF16": {**faults.LLAMA, "mixed_precision.bf16": True},
    "SGD": {**faults.GPT, "optimizer.optimizer": "sgd"},
}


@pytest.mark.parametrize("variant", _VARIANTS)
def test_the_reference_decoder_takes_two_steps_of_a_variant(variant: str, tmp_path: Path) -> None:
    _probe(Job(faults.config(_VARIANTS[variant]), [1, 2], str(tmp_path / "a")))
    found = _against("reference", tmp_path / "a", tmp_path / "b", [1, 2])
    assert found.verdict == "rounding", found.sentence


def test_recomputed_activations_are_seen_once(clean: dict[str, Path], tmp_path: Path) -> None:
    again = {
        "model.recompute_granularity": "full",
        "model.recompute_method": "uniform",
        "model.recompute_num_layers": 1,
    }
    job = faults.job_of(None, tmp_path, clean["gpt"])
    _probe(replace(job, config=faults.config({**faults.GPT, **again})))
    assert _outcome(clean["gpt"], tmp_path).verdict == "identical"


def _against(decoder: str, start: Path, folder: Path, iterations: Sequence[int] = (1,)) -> Localised:
    run = load_probes(start, RUN)
    model = run.facts["config"]["model"]
    other: Decoder = ReferenceDecoder(model) if decoder == "reference" else from_conversion(model, folder)
    replay(other, run, list(iterations), folder)
    side = Pass("B", decoder, load_probes(folder, RUN), load_probes(folder, TWIN), foreign=True)
    return judge((_pass("A", start), side), list(iterations))


@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_conversion_that_swaps_query_and_key_is_named(kind: str, clean: dict[str, Path], tmp_path: Path) -> None:
    good = Grouped.split

    def swapped(self: Grouped, whole: Any, sizes: Any) -> tuple[Any, ...]:
        query, key, value = good(self, whole, sizes)
        width = len(key)
        return torch.cat([key, query[width:]]), query[:width], value

    with mock.patch.object(Grouped, "split", swapped):
        found = _against("transformers", clean[kind], tmp_path)
    assert found.verdict == "init"
    assert found.walked.first is not None
    assert found.walked.first.name == "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("decoder", "tensor"), [("reference", "rotary cosine"), ("transformers", "decoder.layers.0.self_attention")]
)
def test_a_fault_is_named_against_another_decoder(decoder: str, tensor: str, tmp_path: Path) -> None:
    _probe(faults.job_of("rope base", tmp_path / "a", tmp_path / "a"), "rope base")
    found = _against(decoder, tmp_path / "a", tmp_path / "b")
    assert found.walked.first is not None
    assert (found.walked.first.stage, found.walked.first.name) == (stages.FORWARD, tensor)


def test_two_precisions_are_rounding(clean: dict[str, Path], tmp_path: Path) -> None:
    job = faults.job_of(None, tmp_path, clean["gpt"])
    _probe(replace(job, config=faults.config({**faults.GPT, "mixed_precision.bf16": True})))
    found = _outcome(clean["gpt"], tmp_path)
    assert found.verdict == "rounding", found.sentence
    assert "mixed_precision.bf16 (false against true)" in found.sentence


def test_an_overflow_of_fp16_is_rounding(clean: dict[str, Path], tmp_path: Path) -> None:
    half = {"mixed_precision.fp16": True, "mixed_precision.initial_loss_scale": 2.0**30}
    job = faults.job_of(None, tmp_path, clean["gpt"])
    _probe(replace(job, config=faults.config({**faults.GPT, **half})))
    found = _outcome(clean["gpt"], tmp_path)
    assert found.verdict == "rounding", found.sentence
    assert any(row.reason == "float16 overflowed in B" for result in found.walked.results for row in result.rows)


def test_a_moment_that_is_zero_is_named_across_precisions(tmp_path: Path) -> None:
    """What two precisions begin a later iteration with may differ, but not by a state that is not there."""
    _probe(Job(faults.config(faults.GPT), [3], str(tmp_path / "a")))
    low = {**faults.GPT, "mixed_precision.bf16": True, "train.train_iters": 3}
    good = worker.optimizer_tensors

    def without(*arguments: Any) -> Any:
        found = good(*arguments)
        if found:
            found["optimizer.exp_avg.decoder.final_layernorm.weight"].tensor.zero_()
        return found

    for number, job_patch in enumerate((good, without)):
        folder = tmp_path / f"b{number}"
        with mock.patch.object(worker, "optimizer_tensors", job_patch):
            _probe(Job(faults.config(low), [3], str(folder), str(tmp_path / "a")))
        first = judge((_pass("A", tmp_path / "a"), _pass("B", folder)), [3]).walked.first
        assert (None if first is None else (first.stage, first.name, first.reason)) == (
            (stages.STATE, "exp_avg.decoder.final_layernorm.weight", "it is zero in B") if number else None
        )


def test_a_fault_below_the_rounding_of_bf16_is_named(clean: dict[str, Path], tmp_path: Path) -> None:
    """An epsilon that moves norms by less than BF16 rounds shows in float64."""

    def a_little(forward: Any, self: Any, x: Any) -> Any:
        before, self.epsilon = self.epsilon, self.epsilon * 1.01
        try:
            return forward(self, x)
        finally:
            self.epsilon = before

    job = faults.job_of(None, tmp_path, clean["gpt"])
    job = replace(job, config=faults.config({**faults.GPT, "mixed_precision.bf16": True}))
    good = norms.Norm.forward
    with mock.patch.object(norms.Norm, "forward", lambda self, x: a_little(good, self, x)):
        _probe(job)
    first = _outcome(clean["gpt"], tmp_path).walked.first
    assert first is not None
    assert (first.stage, first.name) == (stages.FORWARD, "decoder.layers.0.input_layernorm")
    assert first.apart is not None
    assert first.apart_in_float64 is not None
    assert first.apart_in_float64 < 2.0**-9 < first.apart


def test_a_setting_is_the_cause_where_it_explains_the_tensor(clean: dict[str, Path], tmp_path: Path) -> None:
    job = faults.job_of(None, tmp_path, clean["llama"], "llama")
    _probe(replace(job, config=faults.config({**faults.LLAMA, "model.rotary_base": 500000})))
    found = _outcome(clean["llama"], tmp_path)
    assert found.verdict == "config"
    assert found.sentence.startswith("model.rotary_base (10000 against 500000) differs. Iteration 1, forward: rotary")
    assert "model.rotary_base=10000" in found.next_step


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Probes of the third iteration of a run with dropout, and the settings to resume it after the second."""
    folder = tmp_path_factory.mktemp("resumed")
    settings = {**faults.GPT, "model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
    saving = {"checkpoint.save": str(folder / "saved"), "checkpoint.save_interval": 2, "run.dir": str(folder / "run")}
    with contextlib.redirect_stdout(io.StringIO()):
        tree = config_of(faults.config({**settings, **saving}))
        train(tree, door="python", command=Command(["prog"]), name="tiny")
    _probe(Job(faults.config(settings), [3], str(folder / "a")))
    return folder / "a", {**settings, "checkpoint.load": str(folder / "saved"), "checkpoint.ckpt_step": 2}


def _resumed(resumed: tuple[Path, dict[str, Any]], folder: Path) -> Localised:
    _probe(Job(faults.config(resumed[1]), [3], str(folder), str(resumed[0])))
    return judge((_pass("A", resumed[0]), _pass("B", folder)), [3])


def test_a_resumed_run_is_identical(resumed, tmp_path: Path) -> None:
    found = _resumed(resumed, tmp_path)
    assert found.verdict == "identical", found.sentence


def test_streams_that_were_not_restored_are_named(resumed, tmp_path: Path) -> None:
    with mock.patch.object(checkpoint_load, "_restore_streams"):
        first = _resumed(resumed, tmp_path).walked.first
    assert first is not None
    assert (first.stage, first.name) == (stages.STATE, "random stream embedding 0")


def test_a_side_begins_at_its_newest_checkpoint_before_the_iteration(resumed) -> None:
    saved = resumed[1]["checkpoint.load"]
    settings = {name: value for name, value in resumed[1].items() if not name.startswith("checkpoint.")}
    side = Rerun("run", faults.config({**settings, "checkpoint.save": saved, "checkpoint.save_interval": 2}))
    assert from_checkpoint(side, 2) is side
    found = from_checkpoint(side, 3).config["checkpoint"]
    assert (found["load"], found["ckpt_step"]) == (saved, 2)
    assert from_checkpoint(Rerun("run", faults.config(settings)), 3).config["checkpoint"]["load"] is None


def test_moments_that_were_not_restored_are_named(resumed, tmp_path: Path) -> None:
    """Both sides repeat the same operations: nothing is left to rounding."""
    good = checkpoint_load.Source.read

    def without(self: Any, tensors: Any, config: Any) -> None:
        good(self, tensors, config)
        tensors["optimizer.exp_avg.decoder.final_layernorm.weight"].tensor.mul_(0.9)

    with mock.patch.object(checkpoint_load.Source, "read", without):
        found = _resumed(resumed, tmp_path)
    assert found.verdict == "bug"
    assert found.walked.first is not None
    assert (found.walked.first.stage, found.walked.first.name) == (
        stages.STATE,
        "exp_avg.decoder.final_layernorm.weight",
    )


def test_samples_that_are_repeated_are_named(resumed, tmp_path: Path) -> None:
    with mock.patch.object(feed.Feed, "seek"):
        first = _resumed(resumed, tmp_path).walked.first
    assert first is not None
    assert (first.stage, first.name) == (stages.DATA, "tokens")


def test_damaged_probes_are_an_error(clean: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="probes \\(run\\) of 0 of no processes"):
        load_probes(tmp_path, RUN)
    shutil.copytree(clean["gpt"], tmp_path / "copy")
    tensors = tmp_path / "copy" / f"{RUN}-0.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_probes(tmp_path / "copy", RUN)


def test_the_first_iteration_that_differs_is_probed_with_the_one_before(tmp_path: Path) -> None:
    layout: dict[str, Any] = {"features": {"layout": {"processes": 1}}}

    def later(lines: list[Any]) -> None:
        lines[4]["grad_norm"] += 1e-9
        lines[7]["lm_loss"] += 1.0

    one = from_record(load_run(write(tmp_path / "a", **layout)))
    other = from_record(load_run(write(tmp_path / "b", change=later, **layout)))
    assert in_question(one, other, compare_paths(tmp_path / "a", tmp_path / "b")) == [4, 5, 7, 8]
    assert in_question(one, one, compare_paths(tmp_path / "a", tmp_path / "a")) == [1]
    assert in_question(one, Foreign("reference"), None) == [1]


def test_what_cannot_be_a_side_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "run", features={"layout": {"processes": 1}})
    with pytest.raises(UserError, match="name the run first, as in `lockstep localise RUN reference`"):
        open_sides("reference", str(tmp_path / "run"))
    with pytest.raises(UserError, match="nothing-there is not a run directory"):
        open_sides(str(tmp_path / "run"), str(tmp_path / "nothing-there"))
    write(tmp_path / "young")
    with pytest.raises(UserError, match="does not tell its layout"):
        open_sides(str(tmp_path / "run"), str(tmp_path / "young"))


def test_the_command_ends_with_a_verdict(tmp_path: Path, capsys) -> None:
    """Runs a side in a process of its own, as users do."""
    with contextlib.redirect_stdout(io.StringIO()):
        tree = config_of(faults.config({**faults.LLAMA, "run.dir": str(tmp_path / "run")}))
        train(tree, door="python", command=Command(["prog"]), name="tiny")
    words = ["localise", str(tmp_path / "run"), "reference", "--iteration", "2", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "verdict: rounding" in printed
    assert "does not repeat itself" not in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["verdict"], report["exit_code"], report["iterations"]) == ("rounding", 0, [2])
    assert report["begins"]["name"].startswith("decoder.layers.0.")
    page = tmp_path / "out" / "report.html"
    assert printed.endswith(f"report: {page}\n")
    assert "<strong>rounding</strong>" in page.read_text()
    assert not (tmp_path / "out" / "a").exists()


@pytest.mark.slow
def test_a_fault_is_named_by_way_of_the_launcher(tmp_path: Path) -> None:
    name = "missing all-reduce over tensor parallel"
    fault = faults.FAULTS[name]
    variables = {"PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'src'}", "OMP_NUM_THREADS": "1"}
    one = Rerun("clean", faults.config(faults.GPT), variables=variables)
    tree = faults.config({**faults.GPT, **fault.layout}, fault.processes)
    other = Rerun("planted", tree, fault.processes, variables=variables, worker=("-m", "tests.lab.faults", name))
    found = localise(one, other, tmp_path, say=lambda line: None)
    _assert_named(found, name)
    assert found.verdict == "bug"
    assert found.next_step.startswith("Look at the sums over micro-batches and processes")


@pytest.fixture(scope="module")
def together(clean: dict[str, Path], tmp_path_factory) -> dict[str, Path]:
    """The probes of two processes: clean layouts by name, and planted faults by theirs; one start serves all."""
    folder, turns, found = tmp_path_factory.mktemp("together"), [], {}
    for number, (name, layout) in enumerate(faults.LAYOUTS.items()):
        found[name] = folder / f"layout-{number}"
        tree = faults.config({**faults.GPT, **layout}, 2)
        job = Job(tree, [1], str(found[name]), str(clean["gpt"]))
        turns.append(Turn(2, faults.planted, (None, job)))
    for number, name in enumerate(_TOGETHER):
        found[name] = folder / f"fault-{number}"
        if faults.FAULTS[name].beside:
            start = found[f"{name}, clean"] = folder / f"clean-{number}"
            turns.append(Turn(2, faults.planted, (None, faults.clean_job_of(name, start))))
        else:
            start = _clean(name, clean)
        turns.append(Turn(2, faults.planted, (name, faults.job_of(name, found[name], start))))
    dropped = {**faults.GPT, "model.hidden_dropout": 0.1}
    found["dropout"], found["DP2, dropout"] = folder / "dropout", folder / "dropout-2"
    _probe(Job(faults.config(dropped), [1], str(found["dropout"])))
    other = Job(faults.config(dropped, 2), [1], str(found["DP2, dropout"]), str(found["dropout"]))
    turns.append(Turn(2, faults.planted, (None, other)))
    for turn, results in zip(turns, in_turn(turns), strict=True):
        assert results == [0, 0], turn
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", faults.LAYOUTS)
def test_a_layout_is_rounding(layout: str, clean: dict[str, Path], together: dict[str, Path]) -> None:
    found = _outcome(clean["gpt"], together[layout])
    assert found.verdict == "rounding", found.sentence
    assert found.walked.begins is not None
    assert found.walked.begins.stage in (
        "forward",
        "gradients",
        "gradients after reduction",
        "gradient norm",
    )


@pytest.mark.slow
def test_masks_that_layouts_draw_apart_are_no_bug(together: dict[str, Path]) -> None:
    found = _outcome(together["dropout"], together["DP2, dropout"])
    assert found.verdict == "cannot tell"
    assert found.next_step == "Localise runs with dropout 0."


@pytest.mark.slow
@pytest.mark.parametrize("name", _TOGETHER)
def test_a_fault_in_two_processes_is_named(name: str, clean: dict[str, Path], together: dict[str, Path]) -> None:
    start = together.get(f"{name}, clean") or _clean(name, clean)
    found = _outcome(start, together[name])
    _assert_named(found, name)
    if name in ("one process is off", "replica that drifts", "micro-batches of the first process"):
        assert ", on process 1 of B" in found.sentence


def test_records_of_other_code_are_not_called_equal(tmp_path: Path) -> None:
    """What another commit computed differs by more than rounding, and does not come back when it is run again."""
    with contextlib.redirect_stdout(io.StringIO()):
        tree = config_of(faults.config({**faults.LLAMA, "run.dir": str(tmp_path / "run")}))
        train(tree, door="python", command=Command(["prog"]), name="tiny")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    metrics = tmp_path / "other" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train" and line["iteration"] >= 2:
            line["lm_loss"] += 0.5
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = localise(*open_sides(str(tmp_path / "run"), str(tmp_path / "other")), tmp_path / "probes")
    assert found.verdict == "cannot tell"
    assert found.exit_code == 1
    assert "B does not repeat itself" in found.sentence
    assert "are not those of the records" in found.next_step
