"""Correlate: sides are derived, checked before anything runs, and kept apart."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.config import ConfigContainer, all_fields
from lockstep.config.resolve import resolve
from lockstep.errors import UserError
from lockstep.lab import correlate as module
from lockstep.lab.calibration.band import Band, write_band
from lockstep.lab.correlate import DEFAULT_RECIPE, REFERENCE_FLAGS, REFERENCE_OVERRIDES, build_pair, correlate
from lockstep.lab.dormant import DORMANT
from lockstep.megatron_lm.parser import parse_flags
from lockstep.recipes.door import parse_recipe_args
from tests.lab.synthetic import write


def settings(config: ConfigContainer) -> dict[str, object]:
    """Return what acts of a resolved config; without warm-up the first learning rate of a warm-up does not."""
    values = {info.path: value for info, value, _ in resolve(config).items() if info.spec.effect == "run"}
    if not values["scheduler.lr_warmup_iters"]:
        del values["scheduler.lr_warmup_init"]
    return values


def test_reference_pair_is_one_run():
    pair = build_pair(None, None)
    assert settings(parse_flags(pair.flags)) == settings(parse_recipe_args(pair.recipe))


def test_missing_side_is_derived_by_the_tree():
    flags = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
    flags += " --micro-batch-size 2 --train-iters 5 --lr 1e-3 --lr-warmup-iters 2 --mock-data --vocab-size 100"
    flags += " --tokenizer-type NullTokenizer"
    pair = build_pair(flags, None)
    assert pair.recipe[:2] == ["--recipe", DEFAULT_RECIPE]
    assert settings(parse_recipe_args(pair.recipe)) == settings(parse_flags(pair.flags))
    sizes = "model.num_layers=4 model.hidden_size=64 model.num_attention_heads=4 scheduler.lr_warmup_iters=1"
    back = build_pair(None, f"{DEFAULT_RECIPE} {sizes}")
    assert settings(parse_recipe_args(back.recipe)) == settings(parse_flags(back.flags))


def test_recipe_may_be_given_in_three_ways():
    words = ["model.num_layers=1"]
    for given in (["some_recipe", *words], ["--recipe", "some_recipe", *words]):
        assert module._recipe_arguments(given) == ["--recipe", "some_recipe", *words]
    assert module._recipe_arguments(words) == ["--recipe", DEFAULT_RECIPE, *words]


@pytest.mark.parametrize(
    ("mlm", "bridge", "message"),
    [
        ("--num-layerz 2", None, "num-layers"),
        (None, "vanilla_gpt_pretrain_config model.num_layerz=2", "model.num_layers"),
        ("--num-layers 2 --run-dir x", None, "leave --run-dir out"),
        (None, "run.dir=x", "leave run.dir=x out"),
        ("--mock-data --num-layers 2 --hidden-size 10 --num-attention-heads 4", None, "is not divisible"),
        ("--num-layers 2 --mock-data", f"{DEFAULT_RECIPE} {REFERENCE_OVERRIDES}", "--hidden-size"),
        (REFERENCE_FLAGS, f"{DEFAULT_RECIPE} {REFERENCE_OVERRIDES} model.hidden_size=255", "is not divisible"),
        ("--data-path 'x", None, "close the quotes"),
    ],
)
def test_bad_sides_end_before_anything_runs(mlm: str | None, bridge: str | None, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        correlate(mlm, bridge, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_must_be_new_or_empty(tmp_path: Path):
    (tmp_path / "old").touch()
    with pytest.raises(UserError, match=r"is not empty \(it holds old\)"):
        correlate(None, None, tmp_path)


def fake_lockstep(folder: Path, monkeypatch: pytest.MonkeyPatch, *, exit_code: int = 0) -> None:
    """Put a stand-in for the interpreter in place that writes a prepared record where the run directory is named."""
    write(folder / "prepared")
    script = folder / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import re, shutil, sys\n"
        "words = sys.argv[3:]\n"
        "print('door', words[0])\n"
        f"if {exit_code}: sys.exit({exit_code})\n"
        "where = words[-1].removeprefix('run.dir=').strip(\"'\")\n"
        f"shutil.copytree({str(folder / 'prepared')!r}, where)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(script))


def test_pair_runs_in_fresh_folders_and_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake_lockstep(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert correlate(None, None, None) == 0
    shown = capsys.readouterr().out
    assert (
        shown.index("[mlm] door pretrain-gpt") < shown.index("[bridge] door train") < shown.index("verdict: identical")
    )
    (folder,) = (tmp_path / "nemo_experiments" / "correlate").iterdir()
    held = {path.name for path in folder.iterdir()}
    assert held == {"mlm", "bridge", "mlm.log", "bridge.log", "report.html", "report.json", "report.png"}
    assert "door train" in (folder / "bridge.log").read_text()


def test_calibrate_measures_the_flag_side_before_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake_lockstep(tmp_path, monkeypatch)
    measured = []

    def calibrate(run_dir: Path, say: Callable[[str], None]) -> None:
        measured.append(run_dir)
        say("measured")
        write_band(Band({"lm_loss": {}, "grad_norm": {}}, 4.0, ["runs"], True), run_dir)

    monkeypatch.setattr("lockstep.lab.calibration.calibrate.calibrate", calibrate)
    out = tmp_path / "out"
    assert correlate(None, None, out, calibrated=True) == 0
    assert measured == [out / "mlm"]
    shown = capsys.readouterr().out
    assert shown.index("[bridge] door train") < shown.index("measured") < shown.index("verdict: identical")
    assert "the band was measured on A: 4 times the spread of runs" in " ".join(shown.split())


def test_side_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_lockstep(tmp_path, monkeypatch, exit_code=3)
    with pytest.raises(UserError, match=r"the mlm side ended with exit code 3; its output is in .*mlm\.log"):
        correlate(None, None, tmp_path / "with space, and comma")


def test_dormant_table_names_settings_of_the_tree():
    for rule in DORMANT:
        assert set(rule.paths) | set(rule.governed_by) <= set(all_fields()), rule.reason


def test_dormancy_depends_only_on_what_governs_it():
    """Where a setting is awake in one run only, something that governs it differs: the cause is never lost."""
    tree = {info.path: value for info, value, _ in ConfigContainer().items()}
    trials: dict[str, tuple[object, ...]] = {
        "scheduler.lr_decay_style": ("constant", "linear", "WSD"),
        "scheduler.weight_decay_incr_style": ("constant", "linear"),
        "optimizer.optimizer": ("adam", "sgd"),
        "model.position_embedding_type": ("rope", "none", "learned_absolute"),
        "tokenizer.tokenizer_type": ("NullTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer"),
        "dataset.data_path": (None, ["a"], ["1", "a", "2", "b"]),
    }
    for path, value in tree.items():
        options = trials.get(path, (True, False) if isinstance(value, bool) else (None, 0, 1, ["x"]))
        for option in options:
            for rule in DORMANT:
                if rule.when({**tree, path: option}) != rule.when(tree):
                    assert path in rule.governed_by, (rule.reason, path)
