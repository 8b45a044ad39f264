"""Every format is told by its content, and a curve is itself in each of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import UserError
from lockstep.lab.compare import compare_paths
from lockstep.lab.foreign.options import make_readers
from lockstep.lab.side import Side, load_side
from tests.lab.foreign.writers import (
    TITAN_TAGS,
    WRITERS,
    events,
    olmo_core,
    smooth,
    table,
    torchtitan,
    trainer_lines,
    trainer_state,
)
from tests.lab.synthetic import train_lines, write

LINES_OF_HF = make_readers([], [], ["B:1"])[1]


def load(path: Path, *, formats: tuple[str, ...] = (), columns: tuple[str, ...] = ()) -> Side:
    return load_side(path, "B", make_readers(formats, columns, [])[1])


def written(name: str, path: Path, lines: list[dict[str, Any]]) -> Any:
    made = WRITERS[name](path, lines)
    return compare_paths(write(path.parent / "run", train=smooth(), evaluations=[]), made, reader_b=LINES_OF_HF)


@pytest.mark.parametrize("name", WRITERS)
def test_a_record_equals_its_curve_in_every_format(name: str, tmp_path: Path):
    found = written(name, tmp_path / "foreign", smooth())
    assert (found.decision.verdict, found.exit_code) == ("identical", 0), found.decision
    assert len(found.findings.numbers.rows) == 10


@pytest.mark.parametrize("name", WRITERS)
def test_one_loss_that_is_elsewhere_is_seen_in_every_format(name: str, tmp_path: Path):
    lines = smooth()
    lines[6]["lm_loss"] += 0.2
    found = written(name, tmp_path / "foreign", lines)
    assert found.exit_code == 1
    assert found.findings.numbers.first_outside.iteration == 7


@pytest.mark.parametrize("name", WRITERS)
def test_a_learning_rate_that_is_elsewhere_is_seen_where_it_is_told(name: str, tmp_path: Path):
    lines = smooth()
    lines[5]["lr"] = lines[4]["next_lr"] = 1e-4
    found = written(name, tmp_path / "foreign", lines)
    if name == "torchtitan":
        assert found.stages[3].state == "unknown", "no learning rate is printed"
    elif name == "olmo-core":
        assert found.stages[3].detail == "the learning rates of 2 iterations are equal", "too few digits of the others"
    else:
        assert (found.stages[3].state, found.decision.verdict) == ("differs", "schedule")
        assert "the learning rate of iteration 6 is" in found.stages[3].detail


def test_torchtitan_lines_are_of_their_step_alone(tmp_path: Path):
    lines = train_lines(30)
    sampled = [lines[0], lines[9], lines[19], lines[29]]
    log = torchtitan(tmp_path / "log", sampled)
    text = log.read_text() + "[titan] 2026-01-02 03:04:05,678 - root - INFO - \x1b[33mvalidate step: 30  \x1b[32m"
    log.write_text(f"{text}loss:  9.5929  memory: 1.00GiB(1.00%)  tps: 1\n")
    side = load(log)
    assert (side.interval, side.printer, sorted(side.points)) == (10, "torchtitan console log", [1, 10, 20, 30])
    assert (side.points[10].start, side.points[10].lm_loss) == (10, round(lines[9]["lm_loss"], 5))
    assert side.evaluations == {(30, "valid", False): 9.5929}
    evaluation = {"kind": "evaluation", "iteration": 30, "split": "valid", "final": False, "lm_loss": 9.59291}
    record = write(tmp_path / "run", train=lines, evaluations=[evaluation])
    found = compare_paths(record, log)
    assert found.decision.verdict == "identical"
    assert [row.iteration for row in found.findings.numbers.rows] == [10, 20, 30]


def test_olmo_core_drops_a_rate_of_one_digit_and_keeps_one_of_three(tmp_path: Path):
    lines = train_lines()
    lines[3]["lr"] = 2.34e-5
    side = load(olmo_core(tmp_path / "log", lines))
    assert [side.points[i].lr for i in (1, 4)] == [None, 2.34e-5]


@pytest.mark.parametrize(("version", "shown"), [("4.50.3", "next_lr"), ("4.51.0", "lr"), ("5.2.0", "lr"), (None, "lr")])
def test_hugging_face_rate_is_of_this_or_the_next_step_by_version(version: str | None, shown: str, tmp_path: Path):
    if version:
        (tmp_path / "config.json").write_text(json.dumps({"transformers_version": version}))
    side = load(trainer_state(tmp_path / "trainer_state.json", train_lines()))
    assert getattr(side.points[3], shown) == train_lines()[2]["lr"]
    assert any("4.51" in note for note in side.notes) == (version is None)


def test_hugging_face_losses_are_averages_since_the_last_entry(tmp_path: Path):
    state = trainer_state(tmp_path / "trainer_state.json", train_lines(20), interval=5)
    side = load(tmp_path)
    assert side.points[10].start == 6
    record = write(tmp_path / "run", train=train_lines(20), evaluations=[])
    assert compare_paths(record, state).decision.verdict == "identical"
    log = trainer_lines(tmp_path / "log", train_lines(20), interval=5)
    with pytest.raises(UserError, match="tell no step; give its logging_steps as --interval N"):
        load(log)
    log.write_text("TrainingArguments(\nlearning_rate=0.0003,\nlogging_steps=5,\n)\n" + log.read_text())
    assert compare_paths(record, log).decision.verdict == "identical"


def test_hugging_face_folder_is_that_of_its_last_checkpoint(tmp_path: Path):
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        trainer_state(folder / "trainer_state.json", train_lines(step))
    assert max(load(tmp_path).points) == 10


def test_hugging_face_losses_of_four_decimals_are_known_to_be(tmp_path: Path):
    lines = [{**line, "lm_loss": round(line["lm_loss"], 4)} for line in train_lines()]
    state = trainer_state(tmp_path / "trainer_state.json", lines)
    assert load(state).digits["lm_loss"].decimals == 4
    assert compare_paths(write(tmp_path / "run", evaluations=[]), state).decision.verdict == "identical"


def test_tensorboard_tags_that_are_not_known_have_to_be_named(tmp_path: Path):
    folder = events(tmp_path / "tb", train_lines(), {"my/loss": "lm_loss", "my/rate": "lr"})
    with pytest.raises(UserError, match=r"no tag is known to be the loss; say .*--columns loss=TAG .*my/loss, my/rate"):
        load(folder)
    side = load(folder, columns=("loss=my/loss,lr=my/rate",))
    assert side.points[3].lr == pytest.approx(train_lines()[2]["lr"])
    both = events(tmp_path / "two", train_lines(), {**TITAN_TAGS, "train/loss": "lm_loss"})
    with pytest.raises(UserError, match="torchtitan and Hugging Face tags are there; say which"):
        load(both)
    with pytest.raises(UserError, match="no tag nowhere"):
        load(folder, columns=("loss=nowhere",))


def test_final_evaluations_of_tensorboard_are_told_apart_by_their_order(tmp_path: Path):
    record = write(tmp_path / "run")
    folder = events(tmp_path / "tb", train_lines(), {"lm loss": "lm_loss"})
    values = [{"iteration": 10, "lm_loss": loss} for loss in (9.5929, 9.5927, 9.6263)]
    events(folder, values, {"lm loss validation": "lm_loss"})
    found = compare_paths(record, folder)
    assert (found.decision.verdict, len(found.findings.numbers.evaluations)) == ("identical", 3)


def test_columns_are_guessed_by_name_or_given(tmp_path: Path):
    names = ("Step", "train/loss", "train/grad_norm", "train/learning_rate")
    assert load(table(tmp_path / "a.csv", train_lines(), names)).points[1].lm_loss == train_lines()[0]["lm_loss"]
    other = table(tmp_path / "b.csv", train_lines(), ("n", "l", "g", "r"))
    with pytest.raises(UserError, match="no column is known to be the iteration; say which by --columns iteration="):
        load(other)
    assert load(other, columns=("B:iteration=n,loss=l",)).points[1].grad_norm is None
    two = table(tmp_path / "c.csv", train_lines(), ("step", "loss", "lm_loss", "lr"))
    with pytest.raises(UserError, match="loss, lm_loss may be the loss; say which by --columns loss=NAME"):
        load(two)
    with pytest.raises(UserError, match=r"no column lss for lm_loss. Did you mean loss"):
        load(two, columns=("loss=lss",))


def test_a_table_that_counts_from_zero_says_so(tmp_path: Path):
    lines = [{**line, "iteration": line["iteration"] - 1} for line in train_lines()]
    found = compare_paths(write(tmp_path / "run", evaluations=[]), table(tmp_path / "a.csv", lines))
    assert found.decision.verdict == "identical"
    assert any("counts iterations from 0" in note for note in found.notes)
    assert sorted(load(tmp_path / "a.csv", columns=("from=1",)).points)[0] == 0


def test_averages_of_a_table(tmp_path: Path):
    lines = train_lines(20)
    means = [
        {**lines[end - 1], "lm_loss": sum(line["lm_loss"] for line in lines[end - 5 : end]) / 5}
        for end in (5, 10, 15, 20)
    ]
    path = table(tmp_path / "a.csv", means)
    record = write(tmp_path / "run", train=lines, evaluations=[])
    assert compare_paths(record, path).exit_code == 1
    averaged = make_readers([], ["B:average=true"], [])[1]
    assert compare_paths(record, path, reader_b=averaged).exit_code == 0


@pytest.mark.parametrize(
    ("formats", "columns", "intervals", "message"),
    [
        (["titan"], [], [], "--format: 'titan' is not known; one of .*Did you mean torchtitan"),
        (["A:csv", "A:jsonl"], [], [], "are both for A"),
        ([], ["loss"], [], "not of the form loss=NAME"),
        ([], ["los=x"], [], "'los=x' is not known.*Did you mean loss"),
        ([], ["from=2"], [], "'from=2' is not known"),
        ([], [], ["ten"], "--interval: 'ten' is no number of steps"),
    ],
)
def test_bad_options_name_value_and_remedy(
    formats: list[str], columns: list[str], intervals: list[str], message: str, tmp_path: Path
):
    path = table(tmp_path / "a.csv", train_lines())
    with pytest.raises(UserError, match=message):
        load_side(path, "A", make_readers(formats, columns, intervals)[0])


def test_options_for_a_record_alone_are_refused(tmp_path: Path):
    record = write(tmp_path / "run")
    with pytest.raises(UserError, match="no run of another trainer; drop A:csv"):
        load_side(record, "A", make_readers(["A:csv"], [], [])[0])
    assert load_side(record, "A", make_readers(["csv"], [], [])[0]).run


def test_format_is_taken_as_told(tmp_path: Path):
    log = torchtitan(tmp_path / "log", train_lines())
    with pytest.raises(UserError, match="holds no loss; it was read as OLMo-core console log"):
        load(log, formats=("olmo-core",))
    log.write_text(log.read_text() + olmo_core(tmp_path / "other", train_lines()).read_text())
    with pytest.raises(UserError, match="holds lines of torchtitan and olmo-core; say which by --format"):
        load(log)
    assert len(load(log, formats=("B:torchtitan",)).points) == 10
