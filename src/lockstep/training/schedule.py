"""Learning rate and weight decay as functions of the samples that successful optimizer steps have consumed."""

import math
from dataclasses import dataclass

from lockstep.config import ConfigContainer
from lockstep.errors import ConfigError


@dataclass(frozen=True)
class LearningRateSchedule:
    """Learning rate after ``n`` consumed samples; all lengths are in samples.

    ``style`` is one of constant, linear, cosine, inverse-square-root, WSD; ``wsd_style`` shapes the last
    ``wsd_decay`` samples of WSD.
    """

    peak: float
    minimum: float
    initial: float
    warmup: float
    decay: float
    style: str
    wsd_decay: float | None = None
    wsd_style: str = "exponential"

    def __call__(self, n: int) -> float:
        """Return the learning rate of the step taken when ``n`` samples have been consumed."""
        if self.warmup > 0 and n <= self.warmup:
            return self.initial + (self.peak - self.initial) * n / self.warmup
        if self.style == "constant":
            return self.peak
        if n > self.decay:
            return self.minimum
        if self.style == "inverse-square-root":
            return max(self.minimum, self.peak * max(self.warmup, 1) ** 0.5 / max(n, 1) ** 0.5)
        return self.minimum + self._share(n) * (self.peak - self.minimum)

    def _share(self, n: int) -> float:
        """Return which share of the way from the minimum to the peak is left."""
        done = (n - self.warmup) / (self.decay - self.warmup)
        if self.style == "linear":
            return 1.0 - done
        if self.style == "cosine":
            return 0.5 * (math.cos(math.pi * done) + 1.0)
        return self._wsd_share(n)

    def _wsd_share(self, n: int) -> float:
        assert self.wsd_decay is not None, "WSD schedules are built with the length of their final decay"
        start = self.decay - self.wsd_decay
        if n <= start:
            return 1.0
        done = (n - start) / self.wsd_decay
        if self.wsd_style == "linear":
            return 1.0 - done
        if self.wsd_style == "cosine":
            return 0.5 * (math.cos(math.pi * done) + 1.0)
        if self.wsd_style == "minus_sqrt":
            return 1.0 - math.sqrt(done)
        return 2.0 * 0.5**done - 1.0


@dataclass(frozen=True)
class WeightDecaySchedule:
    """Weight decay after ``n`` consumed samples; it rises from ``start`` to ``end`` over ``span`` samples."""

    start: float
    end: float
    span: int
    style: str

    def __call__(self, n: int) -> float:
        """Return the weight decay of the step taken when ``n`` samples have been consumed."""
        if self.style == "constant" or n > self.span:
            return self.end
        done = n / self.span
        share = done if self.style == "linear" else 0.5 * (math.cos(math.pi * (1.0 - done)) + 1.0)
        return self.start + share * (self.end - self.start)


def nominal_batch_size(config: ConfigContainer) -> int:
    """Return the global batch size that iterations are counted in samples with.

    It is the configured one; under a step schedule, which leaves it unset, the micro-batch size, as in Megatron-LM.
    """
    size = config.train.global_batch_size or config.train.micro_batch_size
    if size is None:
        raise ConfigError("train.micro_batch_size (--micro-batch-size) is not set; give it a value")
    return size


def build_schedules(config: ConfigContainer) -> tuple[LearningRateSchedule, WeightDecaySchedule]:
    """Build both schedules of a resolved configuration.

    Raises:
        ConfigError: no learning rate, or a warm-up or WSD decay that does not fit the decay.
    """
    s, o = config.scheduler, config.optimizer
    if o.lr is None:
        raise ConfigError("optimizer.lr (--lr) is not set; give the peak learning rate")
    decay, warmup, wsd_decay, span = _lengths(config)
    if s.lr_warmup_fraction is not None:
        warmup = s.lr_warmup_fraction * decay
    if warmup >= decay:
        raise ConfigError(
            f"the warm-up of {warmup:g} samples does not fit the decay of {decay} samples; "
            "shorten scheduler.lr_warmup_iters or lengthen scheduler.lr_decay_iters"
        )
    if s.lr_decay_style == "WSD" and wsd_decay is None:
        raise ConfigError("scheduler.lr_decay_style=WSD needs scheduler.lr_wsd_decay_iters (--lr-wsd-decay-iters)")
    rate = LearningRateSchedule(
        peak=o.lr,
        minimum=o.min_lr,
        initial=s.lr_warmup_init,
        warmup=warmup,
        decay=decay,
        style=s.lr_decay_style,
        wsd_decay=wsd_decay,
        wsd_style=s.lr_wsd_decay_style,
    )
    start = s.start_weight_decay if s.start_weight_decay is not None else o.weight_decay
    end = s.end_weight_decay if s.end_weight_decay is not None else o.weight_decay
    return rate, WeightDecaySchedule(start, end, span, s.weight_decay_incr_style)


def _lengths(config: ConfigContainer) -> tuple[int, float, int | None, int]:
    """Return decay, warm-up, WSD decay and weight-decay span, in samples."""
    t, s = config.train, config.scheduler
    if t.train_samples is not None:
        decay = s.lr_decay_samples if s.lr_decay_samples is not None else t.train_samples
        return decay, s.lr_warmup_samples, s.lr_wsd_decay_samples, t.train_samples
    if t.train_iters is None:
        raise ConfigError("the length of the run is not set; give train.train_iters (--train-iters)")
    batch = nominal_batch_size(config)
    decay_iters = s.lr_decay_iters if s.lr_decay_iters is not None else t.train_iters
    wsd_decay = s.lr_wsd_decay_iters * batch if s.lr_wsd_decay_iters is not None else None
    return decay_iters * batch, s.lr_warmup_iters * batch, wsd_decay, t.train_iters * batch
