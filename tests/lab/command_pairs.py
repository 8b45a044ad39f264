"""Clean pairs through the commands that users give: both sides train, then ``compare`` and ``localise`` judge them.

Two correct runs of one job that differ in layout, precision, kernel, or in where they began. Neither command may call
such a pair a bug, nor give it a cause that is not there. ``python -m tests.lab.command_pairs`` prints a table of them.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lockstep.cli import main as lockstep
from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.training import Command
from lockstep.training import run as train
from tests.data.sft.conftest import write_lines, write_tokenizer
from tests.hf.tiny import saved
from tests.lab import faults
from tests.parallel.spawn import Turn, in_turn
from tests.parallel.sweep import GATED_ROUTER

Settings = dict[str, Any]

MOE: Settings = faults.MOE
LATENTS: Settings = {
    **faults.LLAMA,
    "model.num_query_groups": 4,
    "model.multi_latent_attention": True,
    "model.q_lora_rank": 10,
    "model.kv_lora_rank": 12,
    "model.qk_head_dim": 6,
    "model.qk_pos_emb_head_dim": 4,
    "model.v_head_dim": 5,
    "model.rotary_scaling_factor": 40.0,
    "model.mscale_all_dim": 0.707,
}
DEEPSEEK: Settings = {
    **MOE,
    **LATENTS,
    "model.moe_shared_expert_intermediate_size": 16,
    "model.moe_router_load_balancing_type": ["seq_aux_loss"],
    "model.moe_router_pre_softmax": True,
}
GATED: Settings = {
    **MOE,
    **GATED_ROUTER,
}
DOCUMENTS: Settings = {
    **faults.LLAMA,
    "model.calculate_per_token_loss": True,
    "dataset.reset_attention_mask": True,
    "dataset.reset_position_ids": True,
    "dataset.eod_mask_loss": True,
}
FP16: Settings = {**faults.LLAMA, "mixed_precision.fp16": True, "mixed_precision.initial_loss_scale": 2.0**20}
WIDE: Settings = {**faults.LLAMA, "model.hidden_size": 128, "model.ffn_hidden_size": 256, "train.micro_batch_size": 4}
EVALUATED: Settings = {"validation.eval_iters": 1, "validation.eval_interval": 2}
DEEP: Settings = {**faults.LLAMA, "model.num_layers": 4}
DROPOUT: Settings = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
BF16: Settings = {"mixed_precision.bf16": True}
EXPERT: Settings = {"model.expert_model_parallel_size": 2}
INTERLEAVED: Settings = {**faults.PIPELINE, "model.virtual_pipeline_model_parallel_size": 2}
FULL: Settings = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}
SELECTIVE: Settings = {
    "model.recompute_granularity": "selective",
    "model.recompute_modules": ["core_attn", "mlp", "layernorm"],
}
OVERLAP: Settings = {
    **faults.SHARDED,
    "ddp.overlap_grad_reduce": True,
    "ddp.overlap_param_gather": True,
    "ddp.bucket_size": 5000,
}


@dataclass(frozen=True)
class Run:
    """One side: its job and what is particular to it.

    Attributes:
        job: settings that both sides have.
        changes: those of this side alone.
        resumed: it begins at the checkpoint that the other side saved after the second iteration.
    """

    job: Settings
    changes: Settings = field(default_factory=dict)
    processes: int = 1
    threads: int = 1
    resumed: bool = False


@dataclass(frozen=True)
class Pair:
    """Two sides.

    ``setting`` is true where one that acts differs, so that it may be named as the cause; ``masks`` where the sides
    draw other dropout masks, so that nothing can be told.
    """

    a: Run
    b: Run
    setting: bool = False
    masks: bool = False


def _layout(job: Settings, changes: Settings, masks: bool = False) -> Pair:
    return Pair(Run(job), Run(job, changes, processes=2), masks=masks)


def _both(job: Settings, changes: Settings) -> Pair:
    return Pair(Run(job, processes=2), Run(job, changes, processes=2))


def _resumed(job: Settings, changes: Settings | None = None, processes: int = 1) -> Pair:
    return Pair(Run(job, {"checkpoint.save_interval": 2}), Run(job, changes or {}, processes, resumed=True))


def pairs(folder: Path) -> dict[str, Pair]:
    """Return the pairs by name; what adapters and texts need is written into ``folder``."""
    llama, bf16 = faults.LLAMA, {**faults.LLAMA, **BF16}
    lora, texts = _adapters(folder), _texts(folder)
    return {
        "repeat, 2 threads": Pair(Run(WIDE), Run(WIDE, threads=2)),
        "repeat, 2 threads, BF16": Pair(Run({**WIDE, **BF16}), Run({**WIDE, **BF16}, threads=2)),
        "float32 and BF16": Pair(Run(llama), Run(llama, BF16), setting=True),
        "float32 and BF16, experts": Pair(Run(MOE), Run(MOE, BF16), setting=True),
        "float32 and BF16, latents": Pair(Run(LATENTS), Run(LATENTS, BF16), setting=True),
        "micro-batches of half the size": Pair(
            Run(llama, {"train.micro_batch_size": 2}), Run(llama, {"train.micro_batch_size": 1}), setting=True
        ),
        "recomputation of layers": Pair(Run(bf16), Run(bf16, FULL)),
        "recomputation of modules, dropout": Pair(Run({**bf16, **DROPOUT}), Run({**bf16, **DROPOUT}, SELECTIVE)),
        "fused attention": Pair(
            Run(bf16, {"model.attention_backend": "unfused"}),
            Run(bf16, {"model.attention_backend": "flash"}),
            setting=True,
        ),
        "fused loss": Pair(Run(bf16), Run(bf16, {"model.cross_entropy_loss_fusion": True})),
        "experts, EP2": _layout(MOE, EXPERT),
        "experts, EP2, all-gather": _layout(MOE, {**EXPERT, "model.moe_token_dispatcher_type": "allgather"}),
        "experts, TP2": _layout(MOE, faults.SEQUENCE),
        "latents, TP2": _layout(LATENTS, faults.TENSOR),
        "latents and experts, TP2": _layout(DEEPSEEK, faults.SEQUENCE),
        "latents and experts, PP2": _layout(DEEPSEEK, faults.PIPELINE),
        "interleaved PP2": _layout(DEEP, INTERLEAVED),
        "interleaved PP2, BF16": _layout({**DEEP, **BF16}, INTERLEAVED),
        "dropout, TP2": _layout({**llama, **DROPOUT}, faults.TENSOR),
        "dropout, DP2": _layout({**llama, **DROPOUT}, {}, masks=True),
        "dropout, PP2": _layout({**llama, **DROPOUT}, faults.PIPELINE, masks=True),
        "dropout, DP2, BF16, evaluated": _layout({**bf16, **DROPOUT, **EVALUATED}, {}, masks=True),
        "documents, loss by token, DP2": _layout(DOCUMENTS, {}),
        "documents, loss by token, CP2": _layout(DOCUMENTS, {"model.context_parallel_size": 2}),
        "documents, loss by token, FSDP2, BF16": _layout({**DOCUMENTS, **BF16}, {"dist.use_torch_fsdp2": True}),
        "FP16 with overflows, TP2": _layout(FP16, faults.TENSOR),
        "experts of all kinds, EP2": _layout(GATED, EXPERT),
        "experts of all kinds, DP2": _layout(GATED, {}),
        "experts of all kinds, TP2": _layout(GATED, faults.SEQUENCE),
        "adapters with dropout, recomputed": Pair(
            Run({**lora, "peft.dropout": 0.1}), Run({**lora, "peft.dropout": 0.1}, FULL)
        ),
        "resumed with TP2, adapters": _resumed(lora, faults.TENSOR, 2),
        "distributed optimizer on and off": _both(bf16, faults.SHARDED),
        "overlapped reduction on and off": _both(llama, OVERLAP),
        "adapters, TP2": _layout(lora, faults.TENSOR),
        "adapters, DP2, BF16": _layout({**lora, **BF16}, {}),
        "packed texts, DP2": _layout(texts, {}),
        "packed texts, micro-batches of half the size": Pair(
            Run(texts, {"train.micro_batch_size": 2}), Run(texts, {"train.micro_batch_size": 1}), setting=True
        ),
        "packed texts, TP2, BF16": _layout({**texts, **BF16}, faults.TENSOR),
        "resumed": _resumed({**bf16, **DROPOUT}),
        "resumed, experts": _resumed(MOE),
        "resumed, adapters": _resumed(lora),
        "resumed with TP2": _resumed(llama, faults.TENSOR, 2),
        "resumed with sharded DP2, BF16": _resumed(bf16, faults.SHARDED, 2),
    }


def _adapters(folder: Path) -> Settings:
    base = saved(folder / "llama", "llama")
    return {
        **faults.LLAMA,
        "model.num_query_groups": 4,
        "model.rotary_base": 500000,
        "model.seq_length": 32,
        "model.max_position_embeddings": 16384,
        "tokenizer.vocab_size": 70,
        "checkpoint.pretrained_checkpoint": str(base),
        "peft.scheme": "lora",
        "peft.dim": 4,
        "peft.alpha": 8,
    }


def _texts(folder: Path) -> Settings:
    root = folder / "texts"
    root.mkdir()
    for name, count in (("training", 22), ("validation", 5), ("test", 5)):
        rows = [{"q": "how many?"[: i % 9], "a": str(7 * i) * (i % 3 + 1)} for i in range(count)]
        write_lines(root / f"{name}.jsonl", rows)
    jobs = {name: value for name, value in faults.LLAMA.items() if name not in _OF_MOCK}
    return {
        **jobs,
        "tokenizer.tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer.tokenizer_model": str(write_tokenizer(root / "tokenizer")),
        "dataset.sft": True,
        "dataset.dataset_root": str(root),
        "dataset.dataloader_type": "batch",
        "dataset.prompt_column": "q",
        "dataset.completion_column": "a",
        "dataset.enable_offline_packing": True,
        "dataset.packed_sequence_size": 64,
    }


_OF_MOCK = ("dataset.mock", "tokenizer.vocab_size", "tokenizer.tokenizer_type", "model.make_vocab_size_divisible_by")


def trained(settings: Settings, run_dir: str, threads: int) -> str:
    """Train on the processes that the environment tells of, as `train` does behind either door."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    config = ConfigContainer()
    for path, value in {**settings, "run.dir": run_dir}.items():
        config.set(path, value, Origin("python"))
    config = resolve(config, world_size=int(os.environ.get("WORLD_SIZE") or 1))
    with contextlib.redirect_stdout(io.StringIO()):
        return train(config, door="python", command=Command(["prog"]), name="pair").status


def train_all(chosen: Mapping[str, Pair], folder: Path) -> dict[str, tuple[Path, Path]]:
    """Train both sides of every pair and return their run directories; one start of processes serves all."""
    found, turns = {}, []
    for number, (name, pair) in enumerate(chosen.items()):
        runs = folder / f"{number}-a", folder / f"{number}-b"
        saves = str(folder / f"{number}-saved")
        for run, run_dir in zip((pair.a, pair.b), runs, strict=True):
            settings = {**run.job, **run.changes}
            if "checkpoint.save_interval" in settings:
                settings["checkpoint.save"] = saves
            if run.resumed:
                settings |= {"checkpoint.load": saves, "checkpoint.ckpt_step": 2}
            turns.append(Turn(run.processes, trained, (settings, str(run_dir), run.threads)))
        found[name] = runs
    ended = zip(turns, in_turn(turns), strict=True)
    failed = [f"{turn.arguments[1]}: {ends}" for turn, ends in ended if ends != ["finished"] * turn.processes]
    if failed:
        raise RuntimeError("\n".join(failed))
    return found


@dataclass(frozen=True)
class Verdicts:
    """What both commands said of a pair: the word, and the sentence behind it."""

    compare: str
    localise: str
    causes: tuple[str, str]


def verdicts(a: Path, b: Path, out: Path) -> Verdicts:
    """Give two run directories to the commands ``compare`` and ``localise``."""
    found = []
    for command, cause in (("compare", "cause"), ("localise", "sentence")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = lockstep([command, str(a), str(b), "--json", "--out", str(out / command)])
        report = json.loads(printed.getvalue() or "{}") if code < 2 else {"verdict": f"exit code {code}", cause: ""}
        found.append((report["verdict"], report[cause]))
    return Verdicts(found[0][0], found[1][0], (found[0][1], found[1][1]))


def is_false(pair: Pair, found: Verdicts) -> bool:
    """Tell whether a command named a cause that is not there, or could not tell where it should."""
    allowed = {"identical", "rounding", *(["config"] if pair.setting else []), *(["cannot tell"] if pair.masks else [])}
    return not {found.compare, found.localise} <= allowed


_HEAD = """# Clean pairs

Two correct runs of one job, and what `lockstep compare A B` and `lockstep localise A B` say of them. Both sides are
trained for 3 iterations, then both commands are called with the two run directories. `make faults` writes this page
from `tests/lab/command_pairs.py`. `config` is right only where a setting that acts differs (precision, size of the
micro-batches, kernel), and `cannot tell` only where dropout masks are drawn apart. More pairs, through the walk alone,
are in [planted faults](faults.md). The models are tiny.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit code 1 where a verdict is false."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.command_pairs", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the names of the pairs; all of them when unset")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the page")
    options = parser.parse_args(argv)
    began, false = time.perf_counter(), []
    lines = ["| pair | processes | compare | localise |", "| --- " * 4 + "|"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        made_pairs = pairs(folder)
        chosen = {name: made_pairs[name] for name in made_pairs if any(w in name for w in options.words or [""])}
        for name, (a, b) in train_all(chosen, folder).items():
            pair, found = chosen[name], verdicts(a, b, folder / f"{a.name}-reports")
            lines.append(f"| {name} | {pair.a.processes} and {pair.b.processes} | {found.compare} | {found.localise} |")
            print(lines[-1], *found.causes, sep="\n    ", flush=True)
            false += [name] if is_false(pair, found) else []
    lines += ["", f"{len(chosen)} pairs: {len(false)} with a false verdict{''.join(f', {name}' for name in false)}."]
    print("\n".join(lines), f"{time.perf_counter() - began:.0f} s", sep="\n")
    if options.write:
        options.write.write_text(_HEAD + "\n".join(lines) + "\n")
    return 1 if false else 0


if __name__ == "__main__":
    sys.exit(main())
