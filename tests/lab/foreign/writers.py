"""Curves as each trainer writes them; ``python -m tests.lab.foreign.writers RUN FOLDER`` writes those of a record."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.lab.synthetic import ITERATIONS, Line, mlm_line, train_lines

RESET = "\x1b[39m"


def torchtitan(path: Path, lines: list[Line], prefix: str = "") -> Path:
    """torchtitan's console, with colours and its logger's prefix."""
    head = f"{prefix}[titan] 2026-01-02 03:04:05,678 - root - INFO - "
    texts = [f"{head}Training starts at step 1"]
    texts += [
        f"{head}\x1b[31mstep: {line['iteration']:2}  \x1b[32mloss: {line['lm_loss']:8.5f}  "
        f"\x1b[38;2;180;60;0mgrad_norm: {line['grad_norm']:7.4f}  \x1b[36mmemory: 42.10GiB(44.30%)  "
        f"\x1b[34mtps: 7,012  \x1b[36mtflops: 361.22  \x1b[35mmfu: 36.52%{RESET}"
        for line in lines
    ]
    path.write_text("\n".join(texts) + "\n")
    return path


def olmo_number(value: float) -> str:
    """Spell a number as OLMo-core's console does."""
    if math.isnan(value) or math.isinf(value):
        return f"{value}"
    size = abs(value)
    if size < 0.0001:
        return f"{value:.2E}"
    return (
        f"{value:.1f}"
        if size > 100
        else f"{value:.2f}"
        if size > 10
        else f"{value:.3f}"
        if size > 1
        else f"{value:.4f}"
    )


def olmo_core(path: Path, lines: list[Line], prefix: str = "") -> Path:
    """OLMo-core's console, with the stamp of its logger."""
    head = f"{prefix}2026-01-02 03:04:05.678\thost:0\tolmo_core.train.callbacks.console_logger:80\tINFO\t"
    texts = []
    for line in lines:
        metrics = {
            "train/CE loss": line["lm_loss"],
            "train/PPL": 3.0,
            "optim/total grad norm": line["grad_norm"],
            "optim/LR (group 0)": line["lr"],
            "throughput/total tokens": 1234.0,
        }
        texts.append(f"{head}[step={line['iteration']}/{ITERATIONS},epoch=1,eta=0:00:10]")
        texts += [f"{prefix}    {name}={olmo_number(value)}" for name, value in metrics.items()]
        texts.append(f"{head}Saving checkpoint")
    path.write_text("\n".join(texts) + "\n")
    return path


def olmo_files(folder: Path, lines: list[Line]) -> Path:
    """The files of OLMo-core's metric saver."""
    folder.mkdir()
    for line in lines:
        metrics = {
            "train/CE loss": line["lm_loss"],
            "optim/total grad norm": line["grad_norm"],
            "optim/LR (group 0)": line["lr"],
        }
        (folder / f"metrics_step{line['iteration']}.json").write_text(json.dumps(metrics))
    return folder


def history(lines: list[Line], interval: int = 1) -> list[dict[str, float]]:
    """The history of a Trainer: averages over the interval, the learning rate of the step itself."""
    entries = []
    for end in range(interval, len(lines) + 1, interval):
        window, last = lines[end - interval : end], lines[end - 1]
        loss = math.fsum(line["lm_loss"] for line in window) / interval
        entries.append(
            {
                "epoch": end / 100,
                "grad_norm": last["grad_norm"],
                "learning_rate": last["lr"],
                "loss": loss,
                "step": last["iteration"],
            }
        )
    return entries


def trainer_state(path: Path, lines: list[Line], interval: int = 1) -> Path:
    """A ``trainer_state.json``."""
    summary = {"epoch": 1.0, "step": len(lines), "total_flos": 1e9, "train_loss": 3.0, "train_runtime": 1.5}
    state = {"global_step": len(lines), "log_history": [*history(lines, interval), summary], "logging_steps": interval}
    path.write_text(json.dumps({**state, "max_steps": len(lines)}, indent=2))
    return path


def trainer_lines(path: Path, lines: list[Line], interval: int = 1) -> Path:
    """What a Trainer prints, with its progress bar between."""
    texts = []
    for entry in history(lines, interval):
        shown = {name: f"{entry[name]:.4g}" for name in ("loss", "grad_norm", "learning_rate", "epoch")}
        texts.append(f"{shown}\r 10%|#    | 1/10 [00:01<00:09,  1.0it/s]")
    texts.append("{'train_runtime': '1.5', 'train_loss': '3.0', 'epoch': '1'}")
    path.write_text("\n".join(texts) + "\n")
    return path


def table(path: Path, lines: list[Line], names: Iterable[str] = ("iteration", "lm_loss", "grad_norm", "lr")) -> Path:
    """A CSV of every digit."""
    keys = ("iteration", "lm_loss", "grad_norm", "lr")
    rows = [",".join(names), *(",".join(repr(line[key]) for key in keys) for line in lines)]
    path.write_text("\n".join(rows) + "\n")
    return path


def json_lines(path: Path, lines: list[Line]) -> Path:
    """Lines of JSON."""
    keys = {"step": "iteration", "loss": "lm_loss", "grad_norm": "grad_norm", "lr": "lr"}
    path.write_text("".join(json.dumps({name: line[key] for name, key in keys.items()}) + "\n" for line in lines))
    return path


MEGATRON_TAGS = {"lm loss": "lm_loss", "grad-norm": "grad_norm", "learning-rate": "next_lr"}
TITAN_TAGS = {"loss_metrics/global_avg_loss": "lm_loss", "grad_norm": "grad_norm", "lr/AdamW": "lr"}
NEMO_TAGS = {"reduced_train_loss": "lm_loss", "grad_norm": "grad_norm", "lr": "lr"}


def events(folder: Path, lines: list[Line], tags: dict[str, str], first: int = 1) -> Path:
    """TensorBoard events; ``first`` is the step of the first iteration."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for line in lines:
        for tag, key in tags.items():
            value = Summary.Value(tag=tag, simple_value=line[key])
            writer.add_event(Event(wall_time=1.0, step=line["iteration"] - 1 + first, summary=Summary(value=[value])))
    writer.close()
    return folder


def megatron(path: Path, lines: list[Line]) -> Path:
    """Megatron-LM's console, one line an iteration."""
    path.write_text("".join(mlm_line(line) + "\n" for line in lines))
    return path


def bridge(path: Path, lines: list[Line]) -> Path:
    """Bridge's console."""
    path.write_text("".join(mlm_line(line, bridge=True) + "\n" for line in lines))
    return path


WRITERS: dict[str, Callable[[Path, list[Line]], Path]] = {
    "megatron-lm": megatron,
    "megatron-bridge": bridge,
    "torchtitan": torchtitan,
    "olmo-core": olmo_core,
    "olmo-core files": olmo_files,
    "hugging-face": lambda path, lines: trainer_state(path.with_suffix(".json"), lines),
    "hugging-face lines": trainer_lines,
    "tensorboard": lambda path, lines: events(path, lines, MEGATRON_TAGS),
    "tensorboard of torchtitan": lambda path, lines: events(path, lines, TITAN_TAGS),
    "tensorboard of NeMo": lambda path, lines: events(path, lines, NEMO_TAGS, first=0),
    "csv": table,
    "jsonl": json_lines,
}
"""Every format, with a curve of one line an iteration."""


def smooth(iterations: int = ITERATIONS) -> list[Line]:
    """Lines of which Megatron-LM's second one is not an average: the losses of iterations 1 and 2 are equal."""
    lines = train_lines(iterations)
    lines[0]["lm_loss"] = lines[1]["lm_loss"]
    return lines


def main(run: str, folder: str) -> None:
    """Write the curve of a run record in every format but those of Megatron-LM, whose first lines average."""
    from lockstep.record import load_run

    lines = [vars(line) for line in load_run(run).train]
    Path(folder).mkdir(parents=True)
    for name, write in WRITERS.items():
        if not name.startswith("megatron"):
            write(Path(folder) / name.replace(" ", "-"), lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
