"""Damaged, incomplete and contradicting inputs: a clear answer each, never a false ``identical``."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import UserError
from lockstep.lab.compare import Comparison, compare_paths
from lockstep.lab.foreign.options import make_readers
from lockstep.lab.foreign.repeats import Item, settle
from lockstep.lab.side import gaps, load_side
from tests.lab.foreign.writers import (
    MEGATRON_TAGS,
    WRITERS,
    bridge,
    events,
    json_lines,
    megatron,
    olmo_files,
    smooth,
    table,
    torchtitan,
    trainer_state,
)
from tests.lab.synthetic import write

Make = Callable[[Path], Path]
READERS = make_readers([], [], ["1"])
ONE_LINE_AN_ITERATION = [name for name in WRITERS if name not in ("olmo-core files", "hugging-face lines")]


def against_record(made: Path, folder: Path) -> Comparison:
    return compare_paths(write(folder / "run", train=smooth(), evaluations=[]), made, *READERS)


def edit(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def event_file(folder: Path) -> Path:
    return next(folder.iterdir())


def _middle(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([*lines[:3], b'{"step": 4, "lo\n', *lines[4:]])


REFUSED: dict[str, tuple[Make, str]] = {
    "empty log": (lambda f: edit(megatron(f / "x", smooth()), lambda _: b""), "x is empty; give a console log"),
    "log of blanks": (lambda f: edit(megatron(f / "x", smooth()), lambda _: b"\n \n"), "x is empty"),
    "binary garbage": (lambda f: edit(megatron(f / "x", smooth()), lambda c: b"\x93\0\1" + c), "is binary, not a log"),
    "text of something else": (
        lambda f: edit(megatron(f / "x", smooth()), lambda _: b"hello\n"),
        "no training or validation line of a known format",
    ),
    "no such file": (lambda f: f / "nowhere", "no such directory"),
    "empty folder": (lambda f: f, "neither a run directory .* nor a folder"),
    "half a trainer_state.json": (
        lambda f: edit(trainer_state(f / "trainer_state.json", smooth()), lambda c: c[: len(c) // 2]),
        "trainer_state.json is cut off or damaged",
    ),
    "trainer_state.json without history": (
        lambda f: edit(trainer_state(f / "trainer_state.json", smooth()), lambda _: b"{}"),
        "holds no log_history",
    ),
    "history with a word for a number": (
        lambda f: edit(
            trainer_state(f / "trainer_state.json", smooth()),
            lambda c: c.replace(b'"loss": 1', b'"loss": "x1').replace(b',\n      "step": 3', b'",\n      "step": 3'),
        ),
        "trainer_state.json",
    ),
    "empty event file": (
        lambda f: edit(event_file(events(f / "tb", smooth(), MEGATRON_TAGS)), lambda _: b"").parent,
        "is empty; the run has written no event",
    ),
    "event file with a bit that was turned": (
        lambda f: (
            edit(
                event_file(events(f / "tb", smooth(), MEGATRON_TAGS)), lambda c: c[:300] + bytes([c[300] ^ 1]) + c[301:]
            ).parent
        ),
        "is damaged after .* records",
    ),
    "garbage under the name of an event file": (
        lambda f: edit(event_file(events(f / "tb", smooth(), MEGATRON_TAGS)), lambda _: b"garbage" * 40).parent,
        "is damaged after 0 records",
    ),
    "line of JSON that is cut within the file": (
        lambda f: edit(json_lines(f / "x", smooth()), _middle),
        "x:4: not a JSON object",
    ),
    "row with too few cells": (
        lambda f: edit(table(f / "x", smooth()), lambda c: c.replace(b"\n5,", b"\n5\n55,")),
        "x:6: 1 cells under 4 names",
    ),
    "cell that is no number": (
        lambda f: edit(table(f / "x", smooth()), lambda c: c.replace(b"\n5,", b"\nfive,")),
        "x:6: iteration is 'five', no number",
    ),
    "iteration that is no whole number": (
        lambda f: edit(table(f / "x", smooth()), lambda c: c.replace(b"\n5,", b"\n5.5,")),
        "x:6: iteration is 5.5, no whole number",
    ),
    "half an OLMo-core metrics file": (
        lambda f: edit(olmo_files(f / "x", smooth()) / "metrics_step3.json", lambda c: c[:20]).parent,
        "metrics_step3.json is cut off or damaged",
    ),
    "metrics of a Lockstep record without it": (
        lambda f: write(f / "x", train=smooth()) / "metrics.jsonl",
        "belongs to a Lockstep run record; give its run directory",
    ),
    "half a run.json": (
        lambda f: edit(write(f / "x", train=smooth()) / "run.json", lambda c: c[: len(c) // 2]).parent,
        "run.json is cut off or damaged",
    ),
    "cut last line of a finished record": (
        lambda f: edit(write(f / "x", train=smooth(), evaluations=[]) / "metrics.jsonl", lambda c: c[:-20]).parent,
        "the last line is cut off",
    ),
    "iteration twice in a record": (
        lambda f: (
            edit(
                write(f / "x", train=smooth(), evaluations=[]) / "metrics.jsonl",
                lambda c: c + c.splitlines(keepends=True)[-1],
            ).parent
        ),
        "iteration 10 is there twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_damaged_is_refused_with_file_and_place(name: str, tmp_path: Path):
    make, message = REFUSED[name]
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match=message):
        against_record(make(tmp_path / "made"), tmp_path)


CUT: dict[str, Make] = {
    "jsonl": lambda f: edit(json_lines(f / "x", smooth()), lambda c: c[:-12]),
    "csv": lambda f: edit(table(f / "x", smooth()), lambda c: c[:-40]),
    "tensorboard": lambda f: (
        edit(event_file(events(f / "tb", smooth(), {"lm loss": "lm_loss"})), lambda c: c[:-5]).parent
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_last_line_that_is_cut_off_is_left_out_and_said(name: str, tmp_path: Path):
    found = against_record(CUT[name](tmp_path), tmp_path)
    assert found.decision.verdict == "cannot tell"
    assert found.decision.cause.startswith("Iteration 10 is missing in B")
    assert any("cut off" in note for note in found.notes)


def _losses_last(path: Path, lines: list[dict[str, Any]]) -> Path:
    made = table(path, lines)
    rows = [row.split(",") for row in made.read_text().splitlines()]
    made.write_text("".join(",".join([at, norm, loss]) + "\n" for at, loss, norm, _ in rows))
    return made


@pytest.mark.parametrize("name", ["megatron-lm", "megatron-bridge", "torchtitan", "olmo-core", "csv", "losses last"])
def test_log_that_is_cut_off_anywhere_in_its_last_lines_names_no_cause(name: str, tmp_path: Path):
    """A number that lacks digits is another number: 3e-05 without its last two characters is 3."""
    whole = (WRITERS | {"losses last": _losses_last})[name](tmp_path / "x", smooth())
    run, content = write(tmp_path / "run", train=smooth(), evaluations=[]), whole.read_bytes()
    begins = content.rindex(b"step=" if name == "olmo-core" else b"\n", 0, -2)
    for end in range(begins + 1, len(content), 3):
        whole.write_bytes(content[:end])
        found = compare_paths(run, whole)
        assert found.decision.verdict in ("cannot tell", "rounding", "identical"), (content[begins:end], found.decision)
        told = found.findings.b.points.get(10)
        if told is not None and name != "losses last":
            assert told.lm_loss == pytest.approx(found.findings.a.points[10].lm_loss, abs=1e-2), content[begins:end]
        if found.decision.verdict != "cannot tell":
            assert told is not None


def test_line_that_is_cut_off_within_a_log_is_left_out_and_said(tmp_path: Path):
    def cut(text: bytes) -> bytes:
        lines = text.splitlines(keepends=True)
        return b"".join([*lines[:4], lines[4][: lines[4].index(b"lm loss:") + 14] + b"\n", *lines[5:]])

    made = edit(megatron(tmp_path / "x", smooth()), cut)
    for other in (write(tmp_path / "run", train=smooth(), evaluations=[]), made):
        found = compare_paths(other, made)
        assert found.decision.verdict == "cannot tell"
        assert found.decision.cause.startswith("Iteration 5 is missing in ")
        assert "B: line 5, of iteration 5, is cut off and was left out" in found.notes


def test_event_file_that_is_cut_in_the_middle_lacks_the_rest(tmp_path: Path):
    folder = events(tmp_path / "tb", smooth(), MEGATRON_TAGS)
    edit(event_file(folder), lambda content: content[: len(content) // 2])
    found = against_record(folder, tmp_path)
    assert found.exit_code == 1
    assert found.findings.pairs.missing_b[-1] == 10
    assert any("cut off and was left out" in note for note in found.notes)


def test_last_number_of_a_table_that_is_cut_is_no_equal_number(tmp_path: Path):
    made = edit(table(tmp_path / "x", [{**line, "lr": 1.0} for line in smooth()]), lambda c: c)
    text = made.read_text().splitlines()
    made.write_text("\n".join(",".join(row.split(",")[:2]) for row in text)[:-9])
    found = against_record(made, tmp_path)
    assert found.decision.verdict == "rounding"
    assert any("it may be cut off" in note for note in found.notes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", WRITERS)
def test_nan_and_infinite_losses_equal_nothing(name: str, value: float, tmp_path: Path):
    lines = smooth()
    lines[4]["lm_loss"] = value
    made = WRITERS[name](tmp_path / "made", lines)
    found = compare_paths(made, made, *READERS)
    assert load_side(made, "A", READERS[0]).points[5].lm_loss == pytest.approx(value, nan_ok=True)
    if math.isnan(value):
        assert found.exit_code == 1
        assert "NaN never equals NaN" in found.decision.cause
    assert against_record(made, tmp_path).exit_code == 1


@pytest.mark.parametrize("name", WRITERS)
def test_an_iteration_that_one_side_lacks_is_missing(name: str, tmp_path: Path):
    lines = smooth()
    if name == "hugging-face":
        made = trainer_state(tmp_path / "x.json", lines)
        made.write_text(
            made.read_text()
            .replace('"step": 4', '"step": 5', 1)
            .replace('"loss"', '"los"', 4)
            .replace('"los"', '"loss"', 3)
        )
    elif name == "hugging-face lines":
        made = WRITERS[name](tmp_path / "x", lines[:9])
    else:
        made = WRITERS[name](tmp_path / "x", [*lines[:3], *lines[4:]])
    found = against_record(made, tmp_path)
    assert found.exit_code == 1
    assert found.findings.pairs.missing_b, found.decision


def _without_the_fifth() -> list[dict[str, Any]]:
    return [*smooth()[:4], *smooth()[5:]]


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "hugging-face lines"])
def test_an_iteration_that_both_sides_lack_is_missing(name: str, tmp_path: Path):
    made = WRITERS[name](tmp_path / "x", _without_the_fifth())
    found = compare_paths(made, made, *READERS)
    assert (found.decision.verdict, found.exit_code) == ("cannot tell", 1)
    assert found.decision.cause.startswith("Iteration 5 is missing in A and B, while every number that both have")


def test_an_iteration_that_both_records_lack_is_missing(tmp_path: Path):
    a, b = (write(tmp_path / name, train=_without_the_fifth(), evaluations=[]) for name in "ab")
    assert compare_paths(a, b).decision.cause.startswith("Iteration 5 is missing in A and B")
    lossless = [{**line, "lm_loss": None} if line["iteration"] == 5 else line for line in smooth()]
    a, b = (write(tmp_path / f"{name}2", train=lossless, evaluations=[]) for name in "ab")
    assert compare_paths(a, b).decision.cause.startswith("Iteration 5 is missing in A and B")


def test_gaps_are_those_of_a_curve_that_keeps_its_rhythm():
    assert gaps([1, 2, 4, 6, 7, 8, 9, 10, 11], 1) == [3, 5]
    assert gaps([10, 20, 50, 60, 70], 10) == [30, 40]
    assert gaps([1, 2, 3, 4, 6], 1) == [5]
    assert not gaps([1, 2, 3, 4, 5, 10, 20, 30], 1)
    assert not gaps([1, 2, 4, 8, 16], 1)
    assert not gaps([7], 1)
    assert not gaps([], 1)


@pytest.mark.parametrize("name", ["megatron-lm", "tensorboard", "hugging-face", "csv"])
def test_curves_without_an_iteration_in_common_cannot_tell(name: str, tmp_path: Path):
    a, b = (WRITERS[name](tmp_path / where, part) for where, part in (("a", smooth()[:4]), ("b", smooth()[5:])))
    found = compare_paths(a, b)
    assert (found.decision.verdict, found.exit_code) == ("cannot tell", 1)
    assert "no iteration and no evaluation in common (A has iterations 1 to 4, B has" in found.decision.cause


def test_records_that_were_not_written_to_their_end_say_so(tmp_path: Path):
    def killed(name: str) -> Path:
        run = write(tmp_path / name, train=smooth(), evaluations=[], status="running")
        return edit(run / "metrics.jsonl", lambda content: content[:-20]).parent

    found = compare_paths(killed("a"), killed("b"))
    assert found.decision.cause.endswith(
        "of 9 iterations is bitwise equal, as far as they go (A is running, B is running)."
    )
    assert against_record(killed("c"), tmp_path).decision.verdict == "cannot tell"


@pytest.mark.parametrize("name", ONE_LINE_AN_ITERATION)
def test_two_runs_in_one_file_are_refused(name: str, tmp_path: Path):
    other = smooth()
    for line in other[2:]:
        line["lm_loss"] += 0.5
    made = joined(name, tmp_path, smooth(), other)
    with pytest.raises(UserError, match="twice with different numbers and starts again at iteration 1: two runs"):
        against_record(made, tmp_path)


def joined(name: str, folder: Path, *parts: list[dict[str, Any]]) -> Path:
    """Write several runs into one file, one after the other."""
    if name.startswith("tensorboard"):
        for part in parts:
            made = WRITERS[name](folder / "joined", part)
        return made
    if name == "hugging-face":
        return WRITERS[name](folder / "joined", [line for part in parts for line in part])
    texts = [WRITERS[name](folder / f"part{i}", part).read_text() for i, part in enumerate(parts)]
    if name == "csv":
        texts[1:] = [text.partition("\n")[2] for text in texts[1:]]
    made = folder / "joined"
    made.write_text("".join(texts))
    return made


@pytest.mark.parametrize("name", [n for n in ONE_LINE_AN_ITERATION if n not in ("hugging-face", "megatron-lm")])
def test_iterations_that_a_resume_repeats_alike_do_no_harm(name: str, tmp_path: Path):
    found = against_record(joined(name, tmp_path, smooth()[:8], smooth()[5:]), tmp_path)
    assert found.decision.verdict == "identical"
    assert any(
        "resumes at iteration 6: iterations 6 to 8 are printed twice, with equal numbers" in n for n in found.notes
    )


@pytest.mark.parametrize("number", ["lm_loss", "grad_norm"])
@pytest.mark.parametrize("name", [n for n in ONE_LINE_AN_ITERATION if n not in ("hugging-face", "megatron-lm")])
def test_iterations_that_a_resume_repeats_otherwise_are_never_identical(name: str, number: str, tmp_path: Path):
    before = smooth()[:8]
    before[6][number] += 0.5
    found = against_record(joined(name, tmp_path, before, smooth()[5:]), tmp_path)
    assert (found.decision.verdict, found.exit_code) == ("cannot tell", 1)
    assert "iteration 7 is printed twice with different numbers" in found.decision.cause
    assert "with the later numbers everything is equal" in found.decision.cause
    assert any("1 of them with different numbers; the later ones count" in note for note in found.notes)


def test_what_a_resume_went_back_on_and_did_not_reach_again_is_missing(tmp_path: Path):
    log = joined("torchtitan", tmp_path, smooth(), smooth()[5:8])
    found = against_record(log, tmp_path)
    assert found.decision.cause.startswith("Iterations 9 to 10 are missing in B")
    assert any("left out: the run went back to iteration 6" in note for note in found.notes)


def test_evaluations_that_a_resume_went_back_on_are_dropped(tmp_path: Path):
    def text(part: list[dict[str, Any]], loss: float) -> str:
        line = f" validation loss at iteration 8 | lm loss value: {loss:.6E} | lm loss PPL: 1.0E+00 | \n"
        return bridge(tmp_path / "part", part).read_text() + line

    log = tmp_path / "log"
    log.write_text(text(smooth()[:8], 9.5) + text(smooth()[5:8], 9.25))
    assert load_side(log, "A").evaluations == {(8, "valid", False): 9.25}
    log.write_text(text(smooth()[:8], 9.5) + text([], 9.25))
    with pytest.raises(UserError, match="the valid loss at iteration 8 twice with different numbers"):
        load_side(log, "A")


def test_resumed_process_of_megatron_lm_counts_its_first_iteration_twice(tmp_path: Path):
    lines = smooth()
    second = lines[5:]
    second[1] = {**second[1], "lm_loss": (lines[5]["lm_loss"] + lines[6]["lm_loss"]) / 2}
    log = tmp_path / "log"
    log.write_text(
        megatron(tmp_path / "a", lines[:5]).read_text()
        + megatron(tmp_path / "b", smooth()[4:5]).read_text()
        + megatron(tmp_path / "c", second).read_text()
    )
    side = load_side(log, "A")
    assert [side.points[i].start for i in (4, 5, 6)] == [4, 5, 6]
    resumed = joined("megatron-lm", tmp_path, lines[:8], second)
    side = load_side(resumed, "A")
    assert [side.points[i].start for i in (5, 6, 7, 8)] == [5, 6, 6, 8]


@pytest.mark.parametrize("between", [True, False])
def test_ranks_that_print_alike_are_one_run_and_otherwise_refused(between: bool, tmp_path: Path):
    def log(b: list[dict[str, Any]]) -> Path:
        first = torchtitan(tmp_path / "a", smooth(), "[rank0]:").read_text().splitlines()
        second = torchtitan(tmp_path / "b", b, "[rank1]:").read_text().splitlines()
        texts = [text for pair in zip(first, second, strict=True) for text in pair] if between else [*first, *second]
        (tmp_path / "log").write_text("\n".join(texts) + "\n")
        return tmp_path / "log"

    assert against_record(log(smooth()), tmp_path).decision.verdict == "identical"
    other = [{**line, "lm_loss": line["lm_loss"] + 0.25} for line in smooth()]
    with pytest.raises(UserError, match="ranks print different numbers" if between else "two runs"):
        load_side(log(other), "A")


def test_ranks_without_a_prefix_that_print_otherwise_are_refused(tmp_path: Path):
    first = torchtitan(tmp_path / "a", smooth()).read_text().splitlines()
    second = torchtitan(tmp_path / "b", [{**x, "lm_loss": 3.0} for x in smooth()]).read_text().splitlines()
    (tmp_path / "log").write_text("\n".join(t for pair in zip(first, second, strict=True) for t in pair))
    with pytest.raises(
        UserError, match="iteration 1 twice with different numbers; split it into one file a run, or one"
    ):
        load_side(tmp_path / "log", "A")


@pytest.mark.parametrize("name", ["megatron-lm", "megatron-bridge", "torchtitan", "olmo-core"])
@pytest.mark.parametrize("prefix", ["12:30:05 ", "2026-01-02T03:04:05.6Z ", "3: ", "[default7]:"])
def test_prefixes_of_a_launcher_or_a_clock_do_no_harm(name: str, prefix: str, tmp_path: Path):
    made = WRITERS[name](tmp_path / "x", smooth())
    made.write_text("".join(f"{prefix}{text}\n" for text in made.read_text().splitlines()))
    assert against_record(made, tmp_path).decision.verdict == "identical"


def test_settling_tells_a_resume_from_a_run_that_moved_to_other_ranks():
    items = [Item(i, "7", float(i)) for i in range(1, 7)] + [Item(i, "3", float(i)) for i in range(5, 10)]
    settled = settle("log", items)
    assert (sorted(settled.values), settled.begins, settled.conflict) == ([*range(1, 10)], [1, 5], None)


def test_lines_of_a_trainer_by_several_ranks_are_not_counted_as_one(tmp_path: Path):
    texts = WRITERS["hugging-face lines"](tmp_path / "x", smooth()).read_text().splitlines()
    (tmp_path / "log").write_text("".join(f"[rank{rank}]: {text}\n" for text in texts for rank in (0, 1)))
    with pytest.raises(UserError, match="lines of several ranks are counted as one; give the log of one rank"):
        load_side(tmp_path / "log", "B", READERS[1])


def test_side_that_tells_no_evaluation_lacks_none_and_says_so(tmp_path: Path):
    found = compare_paths(write(tmp_path / "run", train=smooth()), table(tmp_path / "x", smooth()))
    assert found.decision.verdict == "identical"
    assert "B tells no evaluation: none is compared" in found.notes
