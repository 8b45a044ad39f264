"""The band: measured, kept, used by verdicts."""

import json
from pathlib import Path

import pytest
import torch

from lockstep.errors import UserError
from lockstep.lab.calibration.band import FACTOR, Band, load_band, measure, write_band
from lockstep.lab.calibration.calibrate import _laid_out, calibrate
from lockstep.lab.calibration.worker import perturbation
from lockstep.lab.compare import compare_paths
from tests.lab.calibration.flips import EXPERTS
from tests.lab.calibration.rates import BAND_SEEDS, curve, outside
from tests.lab.faults import FAULTS, GPT, config
from tests.lab.synthetic import ITERATIONS, Line, train_lines, write

LAYOUTS = ["train.micro_batch_size=2", "model.tensor_model_parallel_size=2"]


def band(spread: float = 1e-4) -> Band:
    by_iteration = dict.fromkeys(range(1, ITERATIONS + 1), spread)
    return Band({"lm_loss": by_iteration, "grad_norm": by_iteration}, FACTOR, ["4 runs from elsewhere"], True)


def shifted(by: float) -> list[Line]:
    lines = train_lines()
    lines[4]["lm_loss"] += by
    return lines


@pytest.mark.parametrize(
    ("spread", "by", "verdict", "said"),
    [
        (1e-4, 3e-4, "rounding", "inside the measured band (0.0004); the band was measured on B"),
        (1e-4, 5e-4, "bug", "more than the measured band (0.0004)"),
        (1e-1, 5e-2, "cannot tell", "the band is as wide as the difference"),
        (1e-1, 5e-1, "bug", "more than the measured band (0.4)"),
    ],
)
def test_verdict_follows_the_measured_band(tmp_path: Path, spread: float, by: float, verdict: str, said: str):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", train=shifted(by))
    write_band(band(spread), b)
    found = compare_paths(a, b)
    assert found.decision.verdict == verdict
    assert said in found.decision.cause
    assert any("band was measured on B: 4 times the spread of 4 runs from elsewhere" in note for note in found.notes)


def test_band_comes_back_and_damage_is_named(tmp_path: Path):
    path = write_band(band(1 / 3), tmp_path)
    assert load_band(tmp_path) == band(1 / 3)
    text = path.read_text()
    path.write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(UserError, match="has schema 2, this Lockstep reads schema 1"):
        load_band(tmp_path)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="cut off or damaged; run `lockstep calibrate"):
        load_band(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbation_moves_every_weight_by_one_ulp(dtype: torch.dtype):
    value = torch.linspace(-3, 3, 64).reshape(8, 8).to(dtype)
    moved = perturbation(1)("w", value)
    up, down = (torch.nextafter(value, torch.full_like(value, end)) for end in (torch.inf, -torch.inf))
    assert ((moved == up) | (moved == down) | (value.frexp().mantissa.abs() == 0.5)).all()
    assert (moved != value).all()
    assert not perturbation(2)("w", value).equal(moved)
    assert perturbation(1)("w", torch.zeros(3, dtype=dtype)).equal(torch.zeros(3, dtype=dtype))


def test_clean_pair_is_inside_and_a_fault_outside():
    base = curve(GPT)
    measured = Band(measure(base, [curve(GPT, seed) for seed in BAND_SEEDS]), FACTOR, [], True)
    assert not outside(base, curve(GPT, 101), measured)
    assert not outside(base, curve({**GPT, "train.micro_batch_size": 2}), measured)
    with FAULTS["softmax in low precision"].plant():
        assert outside(base, curve(GPT), measured)


def test_calibrate_measures_a_recorded_run(tmp_path: Path):
    from lockstep.cli import main

    flags = (
        "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64 "
        "--micro-batch-size 1 --global-batch-size 2 --train-iters 3 --eval-iters 0 --mock-data --bf16 --lr 1e-3 "
        "--tokenizer-type NullTokenizer --vocab-size 63 --attention-dropout 0 --hidden-dropout 0"
    )
    assert main(["pretrain-gpt", *flags.split(), "--run-dir", str(tmp_path / "run")]) == 0
    said: list[str] = []
    made = calibrate(tmp_path / "run", said.append, seeds=2, layouts=LAYOUTS)
    assert made.bitwise
    assert "repeat: equal in every digit" in said
    assert made.made_from == ["2 runs from weights moved by one ulp", *(f"a run with {x}" for x in LAYOUTS)]
    assert set(made.spread["lm_loss"]) == {1, 2, 3}
    assert all(spread > 0 for spread in made.spread["lm_loss"].values())
    assert 0 < made.precision["lm_loss"] < 0.1
    assert load_band(tmp_path / "run") == made
    assert json.loads((tmp_path / "run" / "band.json").read_text())["schema"] == 1


@pytest.mark.parametrize(
    ("layout", "processes"),
    [
        ("model.tensor_model_parallel_size=2", 2),
        ("model.expert_model_parallel_size=2", 2),
        ("model.tensor_model_parallel_size=2 model.expert_model_parallel_size=2", 4),
        (
            "model.tensor_model_parallel_size=2 model.sequence_parallel=true model.expert_tensor_parallel_size=1 "
            "model.expert_model_parallel_size=2",
            2,
        ),
        ("train.micro_batch_size=2 processes=2", 2),
    ],
)
def test_a_layout_takes_as_few_processes_as_it_fits_on_or_as_many_as_asked(layout: str, processes: int):
    assert _laid_out(config(EXPERTS), layout)[1] == processes


def test_a_layout_that_names_no_number_of_processes_is_refused():
    with pytest.raises(UserError, match="processes=two is no number of processes"):
        _laid_out(config(EXPERTS), "processes=two")
