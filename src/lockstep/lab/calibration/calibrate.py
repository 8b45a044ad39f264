"""Calibrating a run: repeats, altered initial weights, a wider precision and other layouts, as short runs."""

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.config import ConfigContainer, resolve
from lockstep.config.experts import has_whole_experts
from lockstep.errors import UserError
from lockstep.lab.calibration.band import FACTOR, QUANTITIES, Band, Curve, apart, measure, write_band
from lockstep.lab.localise.sides import Rerun, from_record
from lockstep.record import Run, load_run
from lockstep.record.schema import decode_number, encode

SEEDS = 4
ITERATIONS = 100
_SHOWN_LINES = 12
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def calibrate(
    run_dir: Path | str,
    say: Callable[[str], None],
    *,
    seeds: int = SEEDS,
    iterations: int | None = None,
    layouts: Sequence[str] = (),
) -> Band:
    """Measure what rounding does to a recorded run and keep the band beside its record.

    ``layouts`` are overrides, such as ``model.tensor_model_parallel_size=2``, each a further run.

    Raises:
        UserError: no such run, one that cannot be run again from its record, or a run that fails.
    """
    run = load_run(run_dir)
    side = from_record(run)
    if run.facts.get("resumed_from") or run.facts["config"]["checkpoint"].get("pretrained_checkpoint"):
        raise UserError(f"{run.path} begins from a checkpoint; calibrate the run that it continues")
    if not run.train or seeds < 2:
        raise UserError(
            f"{run.path} has no iterations to calibrate" if seeds >= 2 else f"--seeds {seeds}: a spread needs 2 or more"
        )
    count = min(len(run.train), iterations or ITERATIONS)
    with tempfile.TemporaryDirectory() as scratch:
        return _measured(run, side, count, seeds, layouts, Path(scratch), say)


def _measured(
    run: Run, side: Rerun, count: int, seeds: int, layouts: Sequence[str], scratch: Path, say: Callable[[str], None]
) -> Band:
    from lockstep.lab.calibration.worker import Job

    def job(title: str, config: dict[str, Any], seed: int | None = None) -> Job:
        return Job(title, config, count, str(scratch / f"{title.replace(' ', '-')}.json"), seed)

    jobs = [job("repeat", side.config)]
    jobs += [job(f"weights moved by one ulp {k}", side.config, k) for k in range(1, seeds + 1)]
    wide = _in_float32(side.config)
    if wide is not None:
        jobs.append(job("float32 twin", wide))
    say(f"calibrate: {len(jobs) + len(layouts)} runs of {count} iterations of {run.path}")
    curves = _run(side, jobs, scratch, say)
    base = {line.iteration: {"lm_loss": line.lm_loss, "grad_norm": line.grad_norm} for line in run.train[:count]}
    altered = [curves[j.title] for j in jobs if j.seed is not None]
    made_from = [f"{seeds} runs from weights moved by one ulp"]
    for text in layouts:
        config, processes = _laid_out(side.config, text)
        changed = job(f"layout {text}", config)
        altered.append(_run(replace(side, processes=processes), [changed], scratch, say)[changed.title])
        made_from.append(f"a run with {text}")
    bitwise = not any(apart(base, curves["repeat"]).values())
    if not bitwise:
        altered.append(curves["repeat"])
        made_from.append("a repeat that differs")
    twin = apart(base, curves["float32 twin"]) if wide is not None else {}
    band = Band(measure(base, altered), FACTOR, made_from, bitwise, twin)
    say(f"repeat: {'equal in every digit' if bitwise else 'differs'}")
    if twin:
        say(f"float32 twin: losses at most {twin['lm_loss']:.3g} apart, gradient norms {twin['grad_norm']:.3g}")
    for quantity in QUANTITIES:
        first, last = (band.spread[quantity].get(i) for i in (min(base), max(base)))
        if first is not None and last is not None:
            say(
                f"band of {quantity}: {FACTOR * first:.3g} at iteration {min(base)}, {FACTOR * last:.3g} at {max(base)}"
            )
    say(f"band: {write_band(band, run.path)}")
    return band


def _in_float32(config: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """Return the config in float32, or None where it is."""
    precision = config["mixed_precision"]
    if not (precision.get("bf16") or precision.get("fp16")):
        return None
    return {**config, "mixed_precision": {**precision, "bf16": False, "fp16": False}}


def _laid_out(config: dict[str, dict[str, Any]], text: str) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the config with overrides ``key=value ...``, and how many processes it takes.

    These are as few as the layout needs, or as many as the word ``processes=N`` says.
    """
    from lockstep.lab.localise.worker import config_of

    changed = copy.deepcopy(config)
    asked = None
    for word in text.split():
        path, equals, value = word.partition("=")
        if path == "processes":
            if not value.isdecimal() or int(value) < 1:
                raise UserError(f"--layout {text!r}: {word} is no number of processes; give processes=2, for example")
            asked = int(value)
            continue
        section, _, name = path.partition(".")
        if not equals or name not in changed.get(section, {}):
            raise UserError(f"--layout {text!r}: {word!r} is neither section.key=value of a setting nor processes=N")
        try:
            changed[section][name] = decode_number(json.loads(value))
        except ValueError:
            changed[section][name] = value
    tree = config_of(changed)
    processes = asked or _least_processes(tree)
    return encode(resolve(tree, world_size=processes).as_dict()), processes


def _least_processes(config: ConfigContainer) -> int:
    """Return the fewest processes that a layout fits on."""
    m = config.model
    tensor, context, experts = (
        m.tensor_model_parallel_size,
        m.context_parallel_size,
        m.expert_model_parallel_size if m.num_moe_experts is not None else 1,
    )
    shared = math.lcm(tensor * context, experts) if has_whole_experts(m) else tensor * math.lcm(context, experts)
    return m.pipeline_model_parallel_size * shared


def _run(side: Rerun, jobs: list[Any], scratch: Path, say: Callable[[str], None]) -> dict[str, Curve]:
    """Do jobs of one layout in one start of processes; return their curves by title."""
    from lockstep.lab.calibration.worker import save

    save(jobs, scratch / "jobs.json")
    words = [sys.executable]
    if side.processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={side.processes}"]
    words += ["-m", "lockstep.lab.calibration.worker", str(scratch / "jobs.json")]
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS} | side.variables
    log = scratch / "output.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment)
        waiting = list(jobs)
        while waiting:
            try:
                ended = process.wait(0.2) is not None
            except subprocess.TimeoutExpired:
                ended = False
            while waiting and Path(waiting[0].output).is_file():
                say(f"  {waiting.pop(0).title}")
            if ended:
                break
        code = process.wait()
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        reason = told[0].removeprefix("error: ") if told else "\n" + "\n".join(lines[-_SHOWN_LINES:])
        raise UserError(f"{jobs[len(jobs) - len(waiting)].title if waiting else 'a run'} ended with {code}: {reason}")
    return {job.title: _curve(Path(job.output)) for job in jobs}


def _curve(path: Path) -> Curve:
    lines = json.loads(path.read_text(encoding="utf-8"))
    return {line["iteration"]: {name: decode_number(line[name]) for name in QUANTITIES} for line in lines}
