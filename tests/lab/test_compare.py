"""Each verdict on synthetic records, and each planted fault."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.errors import UserError
from lockstep.lab import cli as lab_cli
from lockstep.lab.bands import bf16_ulp
from lockstep.lab.compare import Comparison, compare_paths
from tests.lab.synthetic import Line, config, digest, evaluation_lines, train_lines, weights, write

Change = Callable[[list[Line]], None]


def pair(tmp_path: Path, change: Change | None = None, **facts: Any) -> Comparison:
    """Compare a run with a copy that differs in its lines (``change``) or its facts."""
    a = write(tmp_path / "a")
    return compare_paths(a, write(tmp_path / "b", change=change, **facts))


def put(iteration: int, key: str, value: Any) -> Change:
    def change(lines: list[Line]) -> None:
        lines[iteration - 1][key] = value

    return change


def test_copies_are_identical(tmp_path: Path):
    found = pair(tmp_path)
    assert found.decision.verdict == "identical"
    assert found.decision.cause == "Every loss and gradient norm of 10 iterations and 3 evaluations is bitwise equal."
    assert found.exit_code == 0
    assert {stage.state for stage in found.stages} == {"equal"}


def test_warmup_of_one_iteration_against_none_is_config(tmp_path: Path):
    """The pair of commands of the documentation: warm-up 0 by flags, 1 from the peak by the recipe."""
    a = write(tmp_path / "a")
    tree = config(scheduler__lr_warmup_iters=1, scheduler__lr_warmup_init=3e-4, run__dir="elsewhere")
    found = compare_paths(a, write(tmp_path / "b", tree=tree, train=train_lines(warmup=1)))
    assert found.decision.verdict == "config"
    assert found.exit_code == 1
    losses = [abs(row.difference or 0) for row in found.findings.numbers.rows]
    assert losses[:2] == [0, 0]
    assert losses[2] > 0
    assert found.decision.cause == (
        "scheduler.lr_warmup_iters (0 against 1) differs: losses are equal through iteration 2 and differ by at most "
        f"{max(losses):.3g} after it (at iteration {losses.index(max(losses)) + 1}), below one BF16 ulp of the loss "
        "(0.0625)."
    )
    assert "scheduler.lr_warmup_iters=0" in found.decision.next_step
    roles = {d.path: d.role for d in found.findings.differences or []}
    assert roles == {
        "scheduler.lr_warmup_iters": "active",
        "scheduler.lr_warmup_init": "dormant",
        "run.dir": "no effect",
    }
    assert found.stages[3].first == 2, "the learning rate differs from iteration 2 on"


def test_configs_that_differ_without_any_difference_in_numbers_are_identical(tmp_path: Path):
    tree = config(optimizer__clip_grad=5.0, optimizer__sgd_momentum=0.5, logger__log_interval=7)
    found = pair(tmp_path, tree=tree)
    assert found.decision.verdict == "identical"
    assert "although the configs differ in optimizer.clip_grad (1.0 against 5.0)" in found.decision.cause
    assert any("without effect: optimizer.sgd_momentum, logger.log_interval" in note for note in found.notes)
    assert "settings that differ but changed no number: optimizer.clip_grad (1.0 against 5.0)" in found.notes


def test_one_bit_of_one_loss_is_rounding(tmp_path: Path):
    loss = train_lines()[4]["lm_loss"]
    found = pair(tmp_path, put(5, "lm_loss", math.nextafter(loss, math.inf)))
    assert found.decision.verdict == "rounding"
    assert found.exit_code == 0
    assert "first at iteration 5" in found.decision.cause
    assert "inside half a BF16 ulp of the loss (0.03125); no band was measured" in found.decision.cause


@pytest.mark.parametrize(("difference", "verdict"), [(0.03125, "rounding"), (0.0313, "bug"), (-0.5, "bug")])
def test_the_band_is_half_an_ulp_of_the_loss(tmp_path: Path, difference: float, verdict: str):
    a = write(tmp_path / "a", change=put(10, "lm_loss", 10.0))
    b = write(tmp_path / "b", change=put(10, "lm_loss", 10.0 + difference))
    assert compare_paths(a, b).decision.verdict == verdict


FLOAT32 = {"precision": "float32", "matmul": "native", "float8": "none"}


@pytest.mark.parametrize(
    ("iteration", "what", "share", "verdict"),
    [
        (1, "lm_loss", 1e-6, "rounding"),
        (1, "lm_loss", 3e-6, "bug"),
        (2, "lm_loss", 2e-5, "rounding"),
        (2, "lm_loss", 4e-5, "bug"),
        (7, "lm_loss", 2e-3, "rounding"),
        (1, "grad_norm", 7e-6, "rounding"),
        (1, "grad_norm", 9e-6, "bug"),
        (7, "grad_norm", 3e-3, "rounding"),
    ],
)
def test_float32_explains_less(tmp_path: Path, iteration: int, what: str, share: float, verdict: str):
    far = train_lines()[iteration - 1][what] * (1 + share)
    a = write(tmp_path / "a", features=FLOAT32)
    found = compare_paths(a, write(tmp_path / "b", features=FLOAT32, change=put(iteration, what, far)))
    assert found.decision.verdict == verdict, found.decision.cause
    assert ("what float32 explains by then" in found.decision.cause) == (iteration < 7)
    assert found.findings.numbers.mismatches[0].float32 == (iteration < 7)


@pytest.mark.parametrize(
    ("features", "environment"),
    [
        ({"precision": "bfloat16"}, {}),
        ({**FLOAT32, "float8": "tensorwise"}, {}),
        (FLOAT32, {"NVIDIA_TF32_OVERRIDE": "1"}),
        ({}, {}),
    ],
)
def test_one_side_that_is_coarser_or_not_known_is_given_more(tmp_path: Path, features: Any, environment: Any):
    far = train_lines()[0]["lm_loss"] * (1 + 1e-3)
    a = write(tmp_path / "a", features=FLOAT32)
    b = write(tmp_path / "b", features=features, environment=environment, change=put(1, "lm_loss", far))
    assert compare_paths(a, b).decision.verdict == "rounding"


def test_an_evaluation_comes_after_the_update_of_its_iteration(tmp_path: Path):
    for number, (share, verdict) in enumerate(((2e-5, "rounding"), (4e-5, "bug"))):
        lines = [line for line in evaluation_lines(1) if line["iteration"] == 1][:1]
        other = [{**line, "lm_loss": line["lm_loss"] * (1 + share)} for line in lines]
        a = write(tmp_path / f"a{number}", features=FLOAT32, evaluations=lines)
        b = write(tmp_path / f"b{number}", features=FLOAT32, evaluations=other)
        assert compare_paths(a, b).decision.verdict == verdict


def test_ulps():
    assert [bf16_ulp(x) for x in (8.0, 10.4, 15.9, 7.99, 1.0, 0.0)] == [0.0625, 0.0625, 0.0625, 0.03125, 2**-7, 0.0]


def test_loss_outside_the_band_is_a_bug_with_its_first_iteration(tmp_path: Path):
    found = pair(tmp_path, put(4, "lm_loss", 11.0))
    assert (found.decision.verdict, found.exit_code) == ("bug", 1)
    assert found.decision.cause.startswith(
        "Config, data, initial weights and schedule are equal, but lm_loss at iteration 4 is "
    )
    assert "more than half a BF16 ulp of the loss (0.03125)" in found.decision.cause
    assert "the update of iteration 3" in found.decision.next_step


@pytest.mark.parametrize(
    ("key", "place"), [("lm_loss", "the forward pass"), ("grad_norm", "the backward pass of iteration 1")]
)
def test_a_bug_in_the_first_iteration_points_at_the_pass(tmp_path: Path, key: str, place: str):
    found = pair(tmp_path, put(1, key, 12.0))
    assert found.decision.verdict == "bug"
    assert place in found.decision.next_step


@pytest.mark.parametrize("size", [1e-3, 1.0])
@pytest.mark.parametrize(
    ("dropout", "axis", "verdict"),
    [
        (0.1, "data_parallel", "cannot tell"),
        (0.1, "pipeline_parallel", "cannot tell"),
        (0.1, "tensor_parallel", None),
        (0.0, "data_parallel", None),
    ],
)
def test_masks_that_layouts_draw_apart_are_neither_rounding_nor_a_bug(
    dropout: float, axis: str, verdict: str | None, size: float, tmp_path: Path
):
    tree = config(model__hidden_dropout=dropout, model__attention_dropout=0.0)
    one, two = ({"layout": {"data_parallel": 1, "pipeline_parallel": 1, axis: n}} for n in (1, 2))

    def moved(lines: list[Line]) -> None:
        lines[0]["lm_loss"] += size

    a = write(tmp_path / "a", tree=tree, features=one)
    found = compare_paths(a, write(tmp_path / "b", tree=tree, features=two, change=moved))
    assert found.decision.verdict == (verdict or ("bug" if size == 1 else "rounding"))
    if verdict:
        assert found.decision.next_step == "Run both with dropout 0 and compare again."
        assert "both have dropout, and layouts that draw other masks" in found.decision.cause


def test_nan_on_both_sides_is_not_equal(tmp_path: Path):
    a = write(tmp_path / "a", change=put(6, "lm_loss", math.nan))
    found = compare_paths(a, write(tmp_path / "b", change=put(6, "lm_loss", math.nan)))
    assert found.decision.verdict == "bug"
    assert found.decision.cause.endswith("lm_loss at iteration 6 is NaN in both, and NaN never equals NaN.")


def test_both_skipping_an_overflow_is_not_a_difference(tmp_path: Path):
    def overflow(lines: list[Line]) -> None:
        lines[2] |= {"skipped": True, "grad_norm": math.nan}

    a = write(tmp_path / "a", change=overflow)
    assert compare_paths(a, write(tmp_path / "b", change=overflow)).decision.verdict == "identical"
    assert compare_paths(a, write(tmp_path / "c")).decision.verdict == "bug"


def test_missing_iteration_fails(tmp_path: Path):
    found = pair(tmp_path, lambda lines: lines.__delitem__(6))
    assert (found.decision.verdict, found.exit_code) == ("cannot tell", 1)
    assert found.decision.cause == "Iteration 7 is missing in B, while every number that both have is equal."


def test_run_that_stopped_fails_and_says_where(tmp_path: Path):
    found = pair(tmp_path, lambda lines: lines.__delitem__(slice(7, None)), evaluations=[], status="failed")
    assert found.decision.verdict == "cannot tell"
    assert found.decision.cause.startswith("Iterations 8 to 10 are missing in B; the valid evaluation at ")
    assert "(B is failed)" in found.decision.cause


def test_early_exit_is_named(tmp_path: Path):
    tree = config(train__exit_interval=5)
    found = pair(tmp_path, lambda lines: lines.__delitem__(slice(5, None)), evaluations=[], tree=tree)
    assert found.decision.verdict == "config"
    assert "train.exit_interval (null against 5) differs" in found.decision.cause
    assert "iterations 6 to 10 are missing in B" in found.decision.cause


def test_missing_evaluation_fails(tmp_path: Path):
    found = pair(tmp_path, evaluations=evaluation_lines()[:2])
    assert (found.decision.verdict, found.exit_code) == ("cannot tell", 1)
    assert "final test evaluation at iteration 10 is missing in B" in found.decision.cause


def test_evaluation_alone_can_be_the_bug(tmp_path: Path):
    lines = evaluation_lines()
    lines[1]["lm_loss"] += 0.2
    found = pair(tmp_path, evaluations=lines)
    assert found.decision.verdict == "bug"
    assert "lm_loss of the final valid evaluation at iteration 10" in found.decision.cause


def test_shifted_learning_rate_is_schedule(tmp_path: Path):
    def shift(lines: list[Line]) -> None:
        for line in lines:
            line["lr"], line["next_lr"] = line["next_lr"], line["next_lr"] - 2.7e-5

    found = pair(tmp_path, shift)
    assert (found.decision.verdict, found.exit_code) == ("schedule", 1)
    assert found.decision.cause.startswith("The learning rate of iteration 1 is 0.0003 against 0.000273, and the confi")


def test_weight_decay_is_schedule(tmp_path: Path):
    found = pair(tmp_path, put(3, "weight_decay", 0.1))
    assert found.decision.verdict == "schedule"
    assert "weight decay of iteration 3 is 0.01 against 0.1" in found.decision.cause


def test_swapped_batches_are_data(tmp_path: Path):
    def swap(lines: list[Line]) -> None:
        lines[2]["batch_hash"], lines[3]["batch_hash"] = lines[3]["batch_hash"], lines[2]["batch_hash"]

    found = pair(tmp_path, swap)
    assert (found.decision.verdict, found.exit_code) == ("data", 1)
    assert "the same batches come in another order" in found.decision.cause
    assert "B's batch of iteration 3 is A's of iteration 4" in found.stages[1].evidence


def test_other_tokens_and_other_files_are_data(tmp_path: Path):
    found = pair(tmp_path, put(3, "batch_hash", digest("other")))
    assert found.decision.verdict == "data"
    assert found.decision.cause.startswith("The tokens of iteration 3 differ")
    a = write(tmp_path / "c", data={"valid": {"path": "/x", "source": {"sha256": "aa"}}})
    b = write(tmp_path / "d", data={"valid": {"path": "/y", "source": {"sha256": "bb"}}})
    assert "the valid data differ (source.sha256 aa against bb)" in compare_paths(a, b).decision.cause.lower()


def test_data_seed_explains_other_tokens(tmp_path: Path):
    def reorder(lines: list[Line]) -> None:
        for line in lines:
            line["batch_hash"] = digest(line["batch_hash"])
            line["lm_loss"] += 0.001

    found = pair(tmp_path, reorder, tree=config(dataset__random_seed=1))
    assert found.decision.verdict == "config"
    assert "dataset.random_seed (1234 against 1)" in found.decision.cause
    other = write(tmp_path / "c", change=reorder, tree=config(optimizer__adam_beta2=0.95))
    found = compare_paths(tmp_path / "a", other)
    assert found.decision.verdict == "data", "an Adam beta changes no token"
    assert "no setting that differs explains it (optimizer.adam_beta2" in found.decision.cause


def test_changed_parameter_is_init(tmp_path: Path):
    changed = weights()
    changed["fingerprint"] = digest("x")
    changed["parameters"]["decoder.layers.0.mlp.linear_fc1.weight"] |= {"sha256": digest("x"), "sum": 0.75}
    found = pair(tmp_path, initial_weights=changed)
    assert (found.decision.verdict, found.exit_code) == ("init", 1)
    assert found.decision.cause.startswith(
        "The parameter decoder.layers.0.mlp.linear_fc1.weight starts from other values (sum 0.5 against 0.75)"
    )
    assert found.stages[2].evidence == ["1 of 2 parameters differ"]
    del changed["parameters"]["embedding.word_embeddings.weight"]
    found = compare_paths(tmp_path / "a", write(tmp_path / "c", initial_weights=changed))
    assert "embedding.word_embeddings.weight exists only in A" in found.decision.cause


def test_setting_that_cannot_act_yet_is_no_excuse(tmp_path: Path):
    """Adam's second beta acts from the second loss on; a first loss that differs is a bug."""
    tree = config(optimizer__adam_beta2=0.95)
    found = pair(tmp_path, put(1, "lm_loss", 11.0), tree=tree)
    assert found.decision.verdict == "bug"
    assert "differ only in optimizer.adam_beta2 (0.999 against 0.95), which cannot have caused this" in (
        found.decision.cause
    )
    found = compare_paths(tmp_path / "a", write(tmp_path / "c", change=put(2, "lm_loss", 11.0), tree=tree))
    assert found.decision.verdict == "config"


@pytest.mark.parametrize("setting", [{"dataset__random_seed": 7}, {"scheduler__lr_warmup_iters": 1}])
def test_setting_whose_part_of_the_run_is_equal_is_no_excuse(tmp_path: Path, setting: dict[str, int]):
    """The tokens and the learning rates are equal at every iteration, whatever the settings say."""
    found = pair(tmp_path, put(5, "lm_loss", 11.0), tree=config(**setting))
    assert found.decision.verdict == "bug"
    assert "which cannot have caused this" in found.decision.cause
    near = put(5, "lm_loss", train_lines()[4]["lm_loss"] + 1e-6)
    found = compare_paths(tmp_path / "a", write(tmp_path / "c", change=near, tree=config(**setting)))
    assert found.decision.verdict == "rounding"
    assert any("cannot have caused this" in note for note in found.notes)


def test_clipping_that_no_norm_reached_is_no_excuse(tmp_path: Path):
    tree = config(optimizer__clip_grad=2.0)
    assert pair(tmp_path, put(5, "lm_loss", 11.0), tree=tree).decision.verdict == "bug"
    a = write(tmp_path / "c", change=put(4, "grad_norm", 1.5))

    def change(lines: list[Line]) -> None:
        lines[3]["grad_norm"] = 1.5
        lines[4]["lm_loss"] = 11.0

    found = compare_paths(a, write(tmp_path / "d", change=change, tree=tree))
    assert found.decision.verdict == "config"
    assert "optimizer.clip_grad (1.0 against 2.0)" in found.decision.cause


def test_precision_is_config(tmp_path: Path):
    changed = weights() | {"fingerprint": digest("fp32")}
    tree = config(mixed_precision__bf16=False, ddp__grad_reduce_in_fp32=False)
    found = pair(tmp_path, put(1, "lm_loss", 10.4), tree=tree, initial_weights=changed)
    assert found.decision.verdict == "config"
    assert found.decision.cause.startswith("mixed_precision.bf16 (true against false) differs:")


def test_derived_settings_give_way_to_their_source(tmp_path: Path):
    a = write(tmp_path / "a", origins={"dataset.random_seed": "derived (rng.seed)"})
    b = write(
        tmp_path / "b",
        tree=config(rng__seed=7, dataset__random_seed=7),
        origins={"dataset.random_seed": "derived (rng.seed)", "rng.seed": "command line (--seed)"},
        train=[{**x, "lm_loss": x["lm_loss"] + 0.1, "batch_hash": digest(x["batch_hash"])} for x in train_lines()],
    )
    found = compare_paths(a, b)
    assert found.decision.verdict == "config"
    assert found.decision.cause.startswith("rng.seed (1234 against 7) differs: losses differ from the first iteration")


def test_real_data_against_generated_names_the_switch(tmp_path: Path):
    tree = config(dataset__mock=False, dataset__data_path=["corpus"], dataset__split="969, 30, 1")
    found = pair(tmp_path, put(1, "batch_hash", digest("real")), tree=tree)
    assert found.decision.verdict == "config"
    assert found.decision.cause.startswith("dataset.mock (true against false) differs:")


def test_nothing_in_common_cannot_tell(tmp_path: Path):
    def later(lines: list[Line]) -> None:
        for line in lines:
            line["iteration"] += 10

    found = pair(tmp_path, later, evaluations=[])
    assert (found.decision.verdict, found.exit_code) == ("cannot tell", 1)
    assert "A has iterations 1 to 10, B has iterations 11 to 20" in found.decision.cause
    assert found.decision.next_step


COMPARED = ("lm_loss", "grad_norm", "lr", "next_lr", "weight_decay", "loss_scale", "consumed_samples", "valid_tokens")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from([*COMPARED, "batch_hash", "skipped", "missing"]),
    iteration=st.integers(1, 10),
    size=st.floats(1e-15, 10) | st.just(math.nan),
)
def test_one_perturbation_never_passes_but_inside_the_band(
    tmp_path_factory: pytest.TempPathFactory, key: str, iteration: int, size: float
):
    folder = tmp_path_factory.mktemp("runs")
    line = train_lines()[iteration - 1]

    def change(lines: list[Line]) -> None:
        if key == "missing":
            del lines[iteration - 1]
        elif key == "batch_hash":
            lines[iteration - 1][key] = digest("other")
        elif key == "skipped":
            lines[iteration - 1][key] = True
        elif isinstance(line[key], int):
            lines[iteration - 1][key] += 1
        else:
            lines[iteration - 1][key] = max(line[key] + size, math.nextafter(line[key], math.inf))

    a = write(folder / "a")
    assert compare_paths(a, write(folder / "same")).decision.verdict == "identical"
    b = write(folder / "b", change=change)
    band = {"lm_loss": bf16_ulp(line["lm_loss"]) / 2, "grad_norm": bf16_ulp(line["grad_norm"])}.get(key, 0.0)
    tolerated = key in ("lm_loss", "grad_norm") and not math.isnan(size) and (line[key] + size) - line[key] <= band
    for found in (compare_paths(a, b), compare_paths(b, a)):
        assert found.exit_code == (0 if tolerated else 1), found.decision
        assert (found.decision.verdict == "rounding") == tolerated


def run_cli(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    lab_cli.register(parser.add_subparsers())
    arguments = parser.parse_args(list(argv))
    return arguments.func(arguments)


def test_command_prints_the_verdict_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", change=put(4, "lm_loss", 11.0))
    assert run_cli("compare", str(a), str(a), "--out", str(tmp_path / "same")) == 0
    assert run_cli("compare", str(a), str(b), "--out", str(tmp_path / "out")) == 1
    shown = capsys.readouterr().out
    assert "verdict: bug" in shown
    assert "verdict: identical" in shown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.png"]
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_command_json_alone_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    a = write(tmp_path / "a", change=put(6, "lm_loss", math.nan))
    monkeypatch.chdir(tmp_path)
    assert run_cli("compare", str(a), str(a), "--json") == 1
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert report["verdict"] == "bug"
    assert report["rows"][5]["loss_a"] == "nan"
    assert not (tmp_path / "nemo_experiments").exists()
    run_cli("compare", str(a), str(a))
    assert len(list((tmp_path / "nemo_experiments" / "compare").glob("*/report.html"))) == 1


def test_what_is_no_run_is_one_message(tmp_path: Path):
    a = write(tmp_path / "a")
    with pytest.raises(UserError, match="no such directory"):
        compare_paths(a, tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing of interest\n")
    with pytest.raises(UserError, match="holds no training or validation line"):
        compare_paths(a, tmp_path / "notes.txt")


def test_a_fact_that_holds_others_tells_only_what_differs(tmp_path: Path):
    one = {"compilation": "none", "layout": {"processes": 1, "tensor_parallel": 1, "pipeline_parallel": 1}}
    two = {"compilation": "none", "layout": {"processes": 2, "tensor_parallel": 2, "pipeline_parallel": 1}}
    found = compare_paths(write(tmp_path / "a", features=one), write(tmp_path / "b", features=two))
    said = "features differs: layout.processes 1 against 2, layout.tensor_parallel 1 against 2"
    assert said in found.notes
