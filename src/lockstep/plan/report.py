"""What a plan prints, and what it writes for other programs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from lockstep.config import ConfigContainer
from lockstep.megatron_lm.translate import words_of
from lockstep.plan.advice import Advice
from lockstep.plan.gpus import GIB
from lockstep.plan.layouts import Changes
from lockstep.plan.planner import Answer, Planner
from lockstep.plan.tracker import Part
from lockstep.recipes.translate import spell

_SCHEMA = 1

_MEANING: dict[Part, str] = {
    "weights": "what the model computes with",
    "gradients": "and the buffers they are summed in",
    "optimizer": "main weights and state",
    "experts": "all of theirs",
    "activations": "kept for backward, gradients of them",
    "logits": "and their gradient",
    "workspace": "of cuBLAS and of the optimizer step",
}


def words_for(door: str, config: ConfigContainer, changes: Changes) -> list[str]:
    """Return the changes as the words of a door."""
    if door == "train":
        return [f"{path}={spell(value)}" for path, value in changes.items()]
    infos = {info.path: info for info, _, _ in config.items()}
    words: list[str] = []
    for path, value in changes.items():
        found = words_of(infos[path], value)
        words += found if found is not None else [f"(without {infos[path].spec.flags[0]})"]
    return words


def print_plan(planner: Planner, gpus: int, asked: Answer, layouts: list[Answer], console: Console) -> None:
    """Print the parts of the asked layout, whether it fits, and the layouts."""
    memory, gpu = asked.memory, planner.gpu
    whose = f" on rank {memory.rank}, which needs most" if gpus > 1 else ""
    title = f"{asked.layout} on {gpus} x {gpu.name}: {memory.parameters / 1e9:.2f} billion parameters{whose}"
    console.print(title, highlight=False, soft_wrap=True)
    table = Table("GiB", "", box=None, pad_edge=False)
    for heading in ("at the peak", "at most"):
        table.add_column(heading, justify="right")
    for part, size in memory.parts.items():
        table.add_row(part, _MEANING[part], _gib(size), _gib(memory.highest[part]))
    table.add_row("peak", f"in the {memory.moment}", _gib(memory.peak_bytes), "", style="bold")
    table.add_row("outside", "context, NCCL, gaps between blocks", _gib(gpu.outside_bytes(gpus)), "")
    table.add_row("GPU", "", _gib(gpu.memory_bytes), "")
    console.print(table)
    console.print(_verdict(asked), style="bold", highlight=False)
    if layouts:
        console.print()
        console.print(_layout_table(asked, layouts))


def _verdict(asked: Answer) -> str:
    free = asked.room_bytes - asked.memory.peak_bytes
    return f"fits, {_gib(free)} GiB to spare" if asked.fits else f"does not fit: {_gib(-free)} GiB too much"


def _layout_table(asked: Answer, layouts: list[Answer]) -> Table:
    table = Table("layout", box=None, pad_edge=False)
    for heading in ("peak GiB", "of room"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for answer in layouts:
        share = answer.memory.peak_bytes / answer.room_bytes
        note = "fits" if answer.fits else "does not fit"
        note += ", as asked" if answer.layout == asked.layout else ""
        table.add_row(str(answer.layout), _gib(answer.memory.peak_bytes), f"{share:.0%}", note)
    return table


def advice_lines(advice: Advice | None, words: list[str], gpus: int) -> list[str]:
    """Return what to tell the user whose layout does not fit."""
    if advice is None:
        return ["no layout fits, nor do more GPUs help: make the model, the sequence or the vocabulary smaller"]
    answer = advice.answer
    what = [f"--gpus {advice.gpus}"] if advice.gpus != gpus else []
    return [
        f"smallest change that fits ({answer.layout}, {_gib(answer.memory.peak_bytes)} GiB at the peak):",
        "  " + " ".join([*what, *words]),
    ]


def as_json(
    planner: Planner, gpus: int, asked: Answer, layouts: list[Answer], advice: Advice | None, words: list[str]
) -> dict[str, Any]:
    """Return the plan as JSON has it; sizes are bytes."""
    gpu = planner.gpu
    return {
        "schema": _SCHEMA,
        "gpu": {
            "name": gpu.name,
            "count": gpus,
            "memory_bytes": gpu.memory_bytes,
            "outside_bytes": gpu.outside_bytes(gpus),
        },
        "asked": _answer_json(asked),
        "layouts": [_answer_json(answer) for answer in layouts],
        "advice": advice
        and {
            "gpus": advice.gpus,
            "changes": advice.changes,
            "words": words,
            **_answer_json(advice.answer),
        },
    }


def _answer_json(answer: Answer) -> dict[str, Any]:
    memory = answer.memory
    return {
        "layout": {"name": str(answer.layout), **vars(answer.layout)},
        "fits": answer.fits,
        "peak_bytes": memory.peak_bytes,
        "parts": memory.parts,
        "highest": memory.highest,
        "moment": memory.moment,
        "rank": memory.rank,
        "parameters": memory.parameters,
        "resident_bytes": memory.resident_bytes,
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
