"""Synthetic run records and console logs."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockstep.config import ConfigContainer
from lockstep.record import RunWriter

PEAK, LEAST, ITERATIONS, BATCH = 3e-4, 3e-5, 10, 32
Line = dict[str, Any]


def config(**overrides: Any) -> dict[str, dict[str, Any]]:
    """Return a resolved tree; override with ``scheduler__lr_warmup_iters=1``."""
    tree = ConfigContainer().as_dict()
    settings: dict[str, Any] = {
        "model.num_layers": 2,
        "model.hidden_size": 256,
        "mixed_precision.bf16": True,
        "dataset.mock": True,
        "dataset.random_seed": 1234,
        "train.train_iters": ITERATIONS,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": 4,
        "optimizer.lr": PEAK,
        "optimizer.min_lr": LEAST,
        "scheduler.lr_decay_iters": ITERATIONS,
        "validation.eval_iters": 2,
        "validation.eval_interval": 10,
    }
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    for path, value in settings.items():
        section, name = path.split(".")
        tree[section][name] = value
    return tree


def rate(n: int, warmup: int = 0, iterations: int = ITERATIONS) -> float:
    """Learning rate after ``n`` updates: warm-up that starts at the peak, then linear decay."""
    if n <= warmup:
        return PEAK
    return LEAST + (PEAK - LEAST) * (1 - (n - warmup) / (iterations - warmup))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def train_lines(iterations: int = ITERATIONS, warmup: int = 0) -> list[Line]:
    """Return the lines of a run whose loss falls from 10.4, a little faster the higher the learning rate."""
    lines = []
    travelled = 0.0
    for i in range(1, iterations + 1):
        lines.append(
            {
                "kind": "train",
                "iteration": i,
                "lm_loss": 10.4207 - 300 * travelled + math.sin(i) / 1000,
                "grad_norm": 0.65 + math.cos(i) / 50 - 2 * travelled,
                "lr": rate(i - 1, warmup, iterations),
                "next_lr": rate(i, warmup, iterations),
                "weight_decay": 0.01,
                "loss_scale": 1.0,
                "consumed_samples": i * BATCH,
                "global_batch_size": BATCH,
                "valid_tokens": BATCH * 512,
                "batch_hash": digest(f"batch {i}"),
                "skipped": False,
                "seconds": 1.0,
            }
        )
        if i > 1:  # As in training: a loss shows the learning rates of the iterations before it.
            travelled += rate(i - 1, warmup, iterations)
    return lines


def evaluation_lines(iteration: int = ITERATIONS) -> list[Line]:
    cases = (("valid", False, 9.5929), ("valid", True, 9.5927), ("test", True, 9.6263))
    return [
        {"kind": "evaluation", "iteration": iteration, "split": split, "final": final, "lm_loss": loss, "samples": 64}
        for split, final, loss in cases
    ]


def weights() -> dict[str, Any]:
    parameters = {
        name: {"shape": [4, 4], "dtype": "float32", "sha256": digest(name), "sum": 0.5, "sumsq": 1.5}
        for name in ("embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc1.weight")
    }
    return {"fingerprint": digest("weights"), "parameters": parameters}


def write(
    run_dir: Path,
    *,
    tree: dict[str, dict[str, Any]] | None = None,
    train: list[Line] | None = None,
    evaluations: list[Line] | None = None,
    status: str = "finished",
    change: Callable[[list[Line]], None] | None = None,
    **facts: Any,
) -> Path:
    """Write a run record; ``change`` edits its training lines in place first."""
    run_dir.mkdir(parents=True)
    lines = train_lines() if train is None else train
    if change:
        change(lines)
    writer = RunWriter(run_dir)
    writer.start(
        config=config() if tree is None else tree,
        **{"initial_weights": weights(), "door": "megatron_lm", "device": {"name": "CPU"}, **facts},
    )
    for line in [*lines, *(evaluation_lines() if evaluations is None else evaluations)]:
        writer.metrics(line)
    if status == "finished":
        writer.finish("finished")
    elif status == "failed":
        writer.finish("failed")
    return run_dir


def mlm_line(line: Line, *, bridge: bool = False, iterations: int = ITERATIONS) -> str:
    """Print a training line as Megatron-LM or Megatron Bridge does."""
    stamp = "2026-01-02 03:04:05" if bridge else "2026-01-02 03:04:05.678901"
    loss = line["lm_loss"]
    lost = loss is not None and math.isnan(loss)
    parts = [
        f" [{stamp}] iteration {line['iteration']:8d}/{iterations:8d} |",
        f" consumed samples: {line['consumed_samples']:12d} |",
        " elapsed time per iteration (ms): 1234.5 |",
        f" learning rate: {line['next_lr']:.6E} |",
        f" global batch size: {line['global_batch_size']:5d} |",
        "" if loss is None or lost else f" lm loss: {loss:.6E} |",
        f" loss scale: {line['loss_scale']:.1f} |",
        f" grad norm: {line['grad_norm']:.3f} |",
        f" number of skipped iterations: {int(line['skipped']):3d} |",
        f" number of nan iterations: {int(lost):3d} |",
    ]
    return "".join(parts)


def bridge_line(line: Line) -> str:
    """Print a training line as Megatron Bridge does."""
    return mlm_line(line, bridge=True)


def evaluation_text(line: Line) -> str:
    split = {"valid": "validation", "test": "test"}[line["split"]]
    where = f"iteration {line['iteration']}" + (f" on {split} set" if line["final"] else "")
    ppl = math.exp(min(20, line["lm_loss"]))
    text = f" validation loss at {where} | lm loss value: {line['lm_loss']:.6E} | lm loss PPL: {ppl:.6E} | "
    frame = "-" * (len(text) + 1)
    return f"{frame}\n{text}\n{frame}"


def write_log(
    path: Path,
    train: list[Line] | None = None,
    evaluations: list[Line] | None = None,
    *,
    bridge: bool = False,
    interval: int = 1,
) -> Path:
    """Write a console log of averages over the interval.

    Megatron-LM also prints the first iteration, and counts it again in the next line.
    """
    lines = train_lines() if train is None else train
    texts = ["using world size: 1", "> building the dataset ..."]
    window: list[Line] = []
    for line in lines:
        window.append(line)
        ends = line["iteration"] % interval == 0
        if ends or (line["iteration"] == 1 and not bridge):
            mean = math.fsum(item["lm_loss"] for item in window) / len(window)
            if bridge:
                texts.append("Step Time : 1.23s GPU utilization: 4.5MODEL_TFLOP/s/GPU")
            texts.append(mlm_line({**line, "lm_loss": mean}, bridge=bridge, iterations=len(lines)))
            if bridge or line["iteration"] > 1:
                window = []
    texts += [evaluation_text(line) for line in (evaluation_lines() if evaluations is None else evaluations)]
    path.write_text("\n".join(texts) + "\n")
    return path
