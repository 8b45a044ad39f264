"""Sizes: the global batch size over the run, the number of iterations, and the samples each split must provide."""

import itertools
from dataclasses import dataclass

from lockstep.config import ConfigContainer
from lockstep.errors import ConfigError
from lockstep.training.schedule import nominal_batch_size

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class BatchSchedule:
    """Global batch size as a function of consumed samples.

    ``stages`` are (first consumed sample, global batch size) in rising order, the first at 0; every size is a
    multiple of ``micro_batch_size``. ``round_up`` tells whether a run of so many samples ends with the batch that
    reaches them or with the last one that fits. ``dp_size`` processes share out the micro-batches of an iteration.
    """

    stages: tuple[tuple[int, int], ...]
    micro_batch_size: int
    round_up: bool = False
    dp_size: int = 1

    def __post_init__(self) -> None:
        for start, size in self.stages:
            if size <= 0 or size % (self.micro_batch_size * self.dp_size):
                copies = f" times {self.dp_size} data-parallel processes" if self.dp_size > 1 else ""
                raise ConfigError(
                    f"the global batch size {size} (from sample {start} on) is not a multiple of the micro-batch size "
                    f"{self.micro_batch_size}{copies}; change one of them"
                )

    def size_at(self, consumed_samples: int) -> int:
        """Return the global batch size of the iteration that starts after ``consumed_samples`` samples."""
        current = self.stages[0][1]
        for start, size in self.stages:
            if consumed_samples < start:
                break
            current = size
        return current

    def micro_batches_at(self, consumed_samples: int) -> int:
        """Return the micro-batches of one process in the iteration that starts after ``consumed_samples`` samples."""
        return self.size_at(consumed_samples) // self.micro_batch_size // self.dp_size

    def iterations_for(self, samples: int) -> int:
        """Return the number of iterations of a run of ``samples`` samples."""
        iterations = consumed = 0
        for end, size in self._spans(samples):
            whole = end == samples and not self.round_up
            steps = max(0, end - consumed) // size if whole else max(0, -(-(end - consumed) // size))
            iterations += steps
            consumed += steps * size
        return iterations

    def samples_after(self, iterations: int) -> int:
        """Return how many samples ``iterations`` iterations consume."""
        consumed = 0
        for index, (_, size) in enumerate(self.stages):
            steps = iterations
            if index + 1 < len(self.stages):
                steps = min(iterations, max(0, -(-(self.stages[index + 1][0] - consumed) // size)))
            consumed += steps * size
            iterations -= steps
        return consumed

    def _spans(self, samples: int) -> list[tuple[int, int]]:
        """Return (end sample, batch size) of the stages that a run of ``samples`` samples reaches."""
        ends = [min(start, samples) for start, _ in self.stages[1:]] + [samples]
        reached = [(start, size) for start, size in self.stages if start < samples]
        return [(end, size) for end, (_, size) in zip(ends, reached, strict=False)]


def build_batch_schedule(config: ConfigContainer, dp_size: int = 1) -> BatchSchedule:
    """Build the batch-size schedule of a resolved configuration: constant, ramp or steps.

    Raises:
        ConfigError: malformed ramp or steps, or a size that is not a multiple of the micro-batch size.
    """
    t = config.train
    if t.micro_batch_size is None:
        raise ConfigError("train.micro_batch_size (--micro-batch-size) is not set; give it a value")
    if t.step_batch_size_schedule is not None:
        stages = parse_step_schedule(t.step_batch_size_schedule, config.model.seq_length)
    elif t.rampup_batch_size is not None:
        stages = ramp_stages(t.rampup_batch_size, nominal_batch_size(config))
    else:
        stages = ((0, nominal_batch_size(config)),)
    return BatchSchedule(stages, t.micro_batch_size, round_up=t.step_batch_size_schedule is not None, dp_size=dp_size)


def ramp_stages(ramp: list[int], final: int) -> tuple[tuple[int, int], ...]:
    """Return the stages of a ramp ``[start, increment, samples]`` up to the global batch size ``final``.

    The increments are spread evenly over ``samples`` samples.

    Raises:
        ConfigError: not three usable numbers, or the increments do not end at ``final``.
    """
    if len(ramp) != 3:
        raise ConfigError(f"train.rampup_batch_size = {ramp}: give three numbers, start, increment and samples")
    start, increment, samples = ramp
    if start <= 0 or increment <= 0 or samples < 0:
        raise ConfigError(f"train.rampup_batch_size = {ramp}: start and increment must be above 0, samples 0 or more")
    if start > final or (final - start) % increment:
        raise ConfigError(
            f"train.rampup_batch_size = {ramp} does not reach train.global_batch_size = {final}; "
            "the difference from its start must be a multiple of its increment"
        )
    count = (final - start) // increment
    if count == 0 or samples == 0:
        return ((0, final),)
    return tuple((-(-step * samples // count), start + step * increment) for step in range(count + 1))


def parse_step_schedule(text: str, seq_length: int | None) -> tuple[tuple[int, int], ...]:
    """Parse ``"0:768 250B:1536"``: THRESHOLD:BATCH pairs, separated by spaces or commas, suffixes K M B T.

    Thresholds are tokens where ``seq_length`` is known, else samples; the stages returned are in samples.

    Raises:
        ConfigError: malformed pair, no pair at 0, repeated threshold, or a batch size that falls.
    """
    stages = []
    for entry in text.replace(",", " ").split():
        threshold, colon, size = entry.partition(":")
        if not colon:
            raise ConfigError(f"train.step_batch_size_schedule: {entry!r} is not THRESHOLD:BATCH, such as 250B:1536")
        start = _number(threshold, entry)
        stages.append((start // seq_length if seq_length else start, _number(size, entry)))
    stages.sort()
    if not stages or stages[0][0] != 0:
        raise ConfigError(f"train.step_batch_size_schedule = {text!r}: its first threshold must be 0, such as 0:256")
    for (before, smaller), (after, larger) in itertools.pairwise(stages):
        if before == after:
            raise ConfigError(f"train.step_batch_size_schedule = {text!r}: two thresholds fall on sample {after}")
        if larger < smaller:
            raise ConfigError(f"train.step_batch_size_schedule = {text!r}: the batch size must not fall")
    return tuple(stages)


def _number(text: str, entry: str) -> int:
    digits, factor = text.strip().upper(), 1
    if digits and digits[-1] in _SUFFIXES:
        digits, factor = digits[:-1], _SUFFIXES[digits[-1]]
    try:
        return int(float(digits) * factor)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"train.step_batch_size_schedule: {text!r} in {entry!r} is not a number, such as 768 or 250B"
        ) from None


def train_iterations(config: ConfigContainer, schedule: BatchSchedule) -> int:
    """Return the number of iterations of the run.

    Raises:
        ConfigError: neither iterations nor samples are given.
    """
    t = config.train
    if t.train_iters is not None:
        return t.train_iters
    if t.train_samples is None:
        raise ConfigError("the length of the run is not set; give train.train_iters (--train-iters)")
    return schedule.iterations_for(t.train_samples)


def eval_batch_size(config: ConfigContainer) -> tuple[int, int]:
    """Return the samples of an evaluation batch and of one of its forward passes.

    Raises:
        ConfigError: the first is not a multiple of the second.
    """
    v, t = config.validation, config.train
    size = v.eval_global_batch_size or nominal_batch_size(config)
    micro = v.eval_micro_batch_size or t.micro_batch_size or size
    if size % micro:
        raise ConfigError(
            f"validation.eval_global_batch_size = {size} is not a multiple of "
            f"validation.eval_micro_batch_size = {micro}; change one of them"
        )
    return size, micro


def evaluation_due(config: ConfigContainer, iteration: int) -> bool:
    """Tell whether an evaluation follows an iteration of training."""
    v = config.validation
    if not v.eval_interval or v.eval_iters == 0 or iteration % v.eval_interval:
        return False
    return v.start_eval_at_iter is None or iteration >= v.start_eval_at_iter


def num_samples(config: ConfigContainer, schedule: BatchSchedule, train_iters: int) -> tuple[int, int, int]:
    """Return how many samples the train, validation and test splits are built for; Megatron-LM's rule.

    The numbers decide how often the documents are repeated and so the order of all samples.
    """
    t, v = config.train, config.validation
    train = t.train_samples if t.train_samples is not None else train_iters * nominal_batch_size(config)
    # Megatron-LM counts every batch as the nominal one and runs out of data where a step schedule takes larger ones.
    train = max(train, schedule.samples_after(train_iters))
    size, _ = eval_batch_size(config)
    points = 1
    if not v.skip_train and v.eval_interval:
        points = train_iters // v.eval_interval + 1
        if v.start_eval_at_iter is not None:
            skipped = v.start_eval_at_iter // v.eval_interval
            # Megatron-LM counts an evaluation right at the start iteration as skipped, and runs out of data.
            skipped -= skipped > 0 and v.start_eval_at_iter % v.eval_interval == 0
            points = max(1, points - skipped)
    return train, points * v.eval_iters * size, v.eval_iters * size
