"""Learning rate and weight decay against Megatron-LM's numbers."""

import json
import math
from pathlib import Path

import pytest

from lockstep.errors import ConfigError
from lockstep.training.schedule import LearningRateSchedule, WeightDecaySchedule, build_schedules

# max 1e-3, min 1e-4, warm-up 80, decay 800, WSD decay 160 samples; by consumed samples, 8 a step.
_EXACT = {
    ("constant", ""): {0: 0.0, 40: 5e-4, 80: 1e-3, 808: 1e-3},
    ("linear", ""): {8: 1e-4, 80: 1e-3, 88: 9.9e-4, 440: 5.5e-4, 800: 1e-4, 808: 1e-4},
    ("cosine", ""): {80: 1e-3, 440: 5.5e-4, 620: 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * 0.75)), 800: 1e-4},
    ("inverse-square-root", ""): {80: 1e-3, 400: 1e-3 * math.sqrt(0.2), 800: 1e-3 * math.sqrt(0.1), 808: 1e-4},
    ("WSD", "linear"): {640: 1e-3, 720: 5.5e-4, 800: 1e-4},
    ("WSD", "cosine"): {640: 1e-3, 720: 5.5e-4, 800: 1e-4},
    ("WSD", "exponential"): {640: 1e-3, 720: 1e-4 + 9e-4 * (math.sqrt(2) - 1), 800: 1e-4},
    ("WSD", "minus_sqrt"): {640: 1e-3, 680: 5.5e-4, 800: 1e-4},
}


def _schedule(style: str, wsd_style: str, decay: int = 800) -> LearningRateSchedule:
    return LearningRateSchedule(1e-3, 1e-4, 0.0, 80, decay, style, 160, wsd_style or "exponential")


@pytest.mark.parametrize(("style", "wsd_style"), _EXACT)
def test_learning_rate_follows_the_formulas(style: str, wsd_style: str) -> None:
    schedule = _schedule(style, wsd_style)
    for samples, expected in _EXACT[style, wsd_style].items():
        assert schedule(samples) == pytest.approx(expected, rel=1e-12, abs=1e-18), samples


def test_learning_rate_matches_every_golden_value(shared: Path) -> None:
    golden = json.loads((shared / "facts" / "formats.json").read_text())["lr_schedule"]["golden"]["values"]
    checked = 0
    for name, values in golden.items():
        schedule = _schedule(*name.partition("/")[::2])
        for steps, expected in values.items():
            # The goldens are printed with eight digits after the first.
            assert schedule(8 * int(steps)) == pytest.approx(expected, rel=5e-8, abs=1e-18), (name, steps)
            checked += 1
    assert checked == 96


def test_warmup_starts_at_the_initial_rate() -> None:
    schedule = LearningRateSchedule(1.0, 0.0, 0.25, 4, 8, "linear")
    assert [schedule(n) for n in (0, 2, 4, 6, 8, 9)] == [0.25, 0.625, 1.0, 0.5, 0.0, 0.0]


def test_no_warmup_starts_at_the_peak() -> None:
    assert LearningRateSchedule(1.0, 0.0, 0.0, 0, 8, "linear")(0) == 1.0


def test_weight_decay_styles() -> None:
    assert WeightDecaySchedule(0.0, 0.1, 100, "constant")(0) == 0.1
    linear = WeightDecaySchedule(0.1, 0.3, 100, "linear")
    assert [linear(n) for n in (0, 50, 100, 101)] == pytest.approx([0.1, 0.2, 0.3, 0.3], rel=1e-12)
    cosine = WeightDecaySchedule(0.0, 1.0, 100, "cosine")
    quarter = 0.5 * (math.cos(math.pi * 0.75) + 1)
    assert [cosine(n) for n in (0, 25, 50, 100)] == pytest.approx([0.0, quarter, 0.5, 1.0], rel=1e-12, abs=1e-15)


def test_lengths_are_counted_in_samples(configure) -> None:
    changes = {"scheduler.lr_warmup_iters": 1, "scheduler.lr_decay_iters": 3, "scheduler.lr_decay_style": "WSD"}
    rate, decay = build_schedules(configure({**changes, "scheduler.lr_wsd_decay_iters": 2}))
    assert (rate.warmup, rate.decay, rate.wsd_decay, decay.span) == (4, 12, 8, 16)


def test_sample_based_run(configure) -> None:
    changes = {"train.train_iters": None, "train.train_samples": 40, "scheduler.lr_warmup_samples": 10}
    rate, decay = build_schedules(configure(changes))
    assert (rate.warmup, rate.decay, decay.span) == (10, 40, 40)


def test_warmup_fraction_is_of_the_decay(configure) -> None:
    rate, _ = build_schedules(configure({"scheduler.lr_warmup_fraction": 0.25}))
    assert rate.warmup == 4.0


def test_warmup_that_fills_the_decay_is_refused(configure) -> None:
    config = configure()
    config.scheduler.lr_warmup_iters = 4
    with pytest.raises(ConfigError, match="warm-up of 16 samples does not fit the decay of 16 samples"):
        build_schedules(config)
