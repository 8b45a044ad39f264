"""Which layers each pipeline stage has.

With v virtual stages on each of p processes there are p * v stages; stage i is chunk i // p of process i % p.
"""

import re
from itertools import accumulate, pairwise

from lockstep.config.model import ModelConfig

_TOKENS = re.compile(r"[Et|L]")
_MOST_REPEATS = 1 << 16
_REPEATED = re.compile(r"\(([Et|L]*)\)\*(\d+)|([Et|L])\*(\d+)")


def num_stages(model: ModelConfig) -> int:
    """Return the number of stages over all processes, virtual ones included."""
    return model.pipeline_model_parallel_size * (model.virtual_pipeline_model_parallel_size or 1)


def stage_layers(model: ModelConfig) -> list[range]:
    """Return the numbers of the layers of every stage, in the order of the model.

    Raises:
        ValueError: the layers cannot be shared out so; says why and what to change.
    """
    counts = _even_counts(model) if model.pipeline_model_parallel_layout is None else _counts_of_layout(model)
    if 0 in counts[1:-1]:
        raise ValueError("a stage between the first and the last would have no layers; use fewer pipeline stages")
    return [range(begin, end) for begin, end in pairwise(accumulate(counts, initial=0))]


def _even_counts(model: ModelConfig) -> list[int]:
    """Share the layers out evenly, but for a first and last process that were given numbers of their own.

    The embedding and the loss count as a layer where asked for.
    """
    processes, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    embedding, loss = model.account_for_embedding_in_pipeline_split, model.account_for_loss_in_pipeline_split
    ends = {0: model.num_layers_in_first_pipeline_stage, processes - 1: model.num_layers_in_last_pipeline_stage}
    given = {process: number for process, number in ends.items() if number is not None}
    if given and (embedding or loss):
        raise ValueError(
            "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage exclude "
            "account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split; drop one kind"
        )
    total = (model.num_layers or 0) + embedding + loss
    left, others = total - sum(given.values()), processes - len(given)
    if left < 0 or (others and left % others) or (not others and left):
        raise ValueError(
            f"{left} layers cannot be shared out evenly to {others} pipeline stages; change the number of layers, the "
            "number of stages, or those of the first and last one (--decoder-first-pipeline-num-layers, "
            "--decoder-last-pipeline-num-layers)"
        )
    per_process = [given.get(process, left // max(1, others)) for process in range(processes)]
    uneven = [number for number in per_process if number % chunks]
    if uneven:
        raise ValueError(
            f"{uneven[0]} layers of a process are not divisible by its {chunks} virtual pipeline stages; change one"
        )
    counts = [number // chunks for _ in range(chunks) for number in per_process]
    counts[0] -= embedding
    counts[-1] -= loss
    if min(counts) < 0:
        raise ValueError("a stage would have fewer layers than none; use fewer pipeline stages")
    return counts


def layout_stages(layout: str) -> int:
    """Return the number of stages that a layout writes out."""
    return _written_out(layout).count("|") + 1


def _counts_of_layout(model: ModelConfig) -> list[int]:
    """Read a layout such as ``Et*3|t*4|tL``: E embedding, t layer, L loss, stages separated by |, (...)*n repeats."""
    name = f"pipeline_model_parallel_layout = {model.pipeline_model_parallel_layout!r}"
    text = _written_out(model.pipeline_model_parallel_layout or "")
    if _TOKENS.sub("", text):
        raise ValueError(f"{name} is not written as Et*3|t*4|tL")
    if text.replace("|", "").replace("t", "") != "EL" or text[0] + text[-1] != "EL":
        raise ValueError(f"{name} must begin with E and end with L, and have one of each")
    counts = [stage.count("t") for stage in text.split("|")]
    if sum(counts) != model.num_layers:
        raise ValueError(f"{name} has {sum(counts)} layers, the model {model.num_layers}")
    if len(counts) != num_stages(model):
        raise ValueError(
            f"{name} has {len(counts)} stages, there are {num_stages(model)}: pipeline_model_parallel_size times the "
            "virtual stages of each process"
        )
    return counts


def _written_out(layout: str) -> str:
    text = layout.replace(",", "").replace(" ", "")
    while (expanded := _REPEATED.sub(_expanded, text)) != text:
        text = expanded
    return text


def _expanded(match: re.Match[str]) -> str:
    group, times, single, single_times = match.groups()
    number = int(times or single_times)
    if number > _MOST_REPEATS:
        raise ValueError(
            f"pipeline_model_parallel_layout repeats something {number} times; {_MOST_REPEATS} is the most"
        )
    return (single or group) * number
