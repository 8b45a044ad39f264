"""Runs of a tiny model on several processes, as jobs of `tests.parallel.spawn.in_turn`."""

import contextlib
import importlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.parallel import Mesh
from lockstep.training import Command, checkpoint_storage, run
from lockstep.training.checkpoint_load import Source
from lockstep.training.checkpoint_peers import Peers
from lockstep.training.checkpoint_save import Saved, write_checkpoint
from lockstep.training.hooks import Progress
from lockstep.training.setup import Parts
from tests.parallel.spawn import Turn, in_turn

TINY: dict[str, Any] = {
    "model.num_layers": 4,
    "model.hidden_size": 16,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.ffn_hidden_size": 24,
    "model.gated_linear_unit": True,
    "model.activation_func": "silu",
    "model.seq_length": 64,
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    # No layout divides it.
    "model.make_vocab_size_divisible_by": 1,
    "tokenizer.vocab_size": 51,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 4,
    "train.train_iters": 20,
    "validation.eval_iters": 1,
    "validation.eval_interval": 10,
    "mixed_precision.bf16": True,
    "dataset.mock": True,
    "tokenizer.tokenizer_type": "NullTokenizer",
    "optimizer.lr": 1e-3,
    "run.device": "cpu",
}
_CLOCKED = ("seconds", "tokens_per_second", "memory_bytes")
DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
SHARDED = {"ddp.use_distributed_optimizer": True}
FSDP = {"dist.use_torch_fsdp2": True}
TWICE = {"ddp.num_distributed_optimizer_instances": 2}
TENSOR = {"model.tensor_model_parallel_size": 2}
CONTEXT = {"model.context_parallel_size": 2}
PIPELINE = {"model.pipeline_model_parallel_size": 2}
INTERLEAVED = {**PIPELINE, "model.virtual_pipeline_model_parallel_size": 2}
SEQUENCE = {**TENSOR, "model.sequence_parallel": True}


def configured(changes: dict[str, Any]) -> ConfigContainer:
    """Return the tiny configuration with changes, resolved for the processes there are."""
    config = ConfigContainer()
    for path, value in {**TINY, **changes}.items():
        config.set(path, value, Origin("python"))
    return resolve(config, world_size=int(os.environ.get("WORLD_SIZE") or 1))


def train(changes: dict[str, Any], run_dir: Path) -> str:
    """Train and return how the run ended."""
    config = configured({**changes, "run.dir": str(run_dir)})
    return run(config, door="python", command=Command(["prog"]), name="tiny").status


def echo(changes: dict[str, Any], run_dir: Path, target: Path) -> str:
    """Train from a checkpoint; what was restored is first written into ``target`` as a checkpoint of this layout."""
    module = importlib.import_module("lockstep.training.run")
    restore = module.restore

    def restored(
        source: Source, config: ConfigContainer, mesh: Mesh, parts: Parts, progress: Progress, peers: Peers
    ) -> Parts:
        parts = restore(source, config, mesh, parts, progress, peers)
        snapshot = Saved(config, mesh, parts).snapshot(progress)
        write_checkpoint(target, snapshot, {"config": config.as_dict()}, {}, peers)
        return parts

    with mock.patch.object(module, "restore", restored):
        return train(changes, run_dir)


def train_on_a_full_disk(changes: dict[str, Any], run_dir: Path, rank: int) -> str:
    """Train where process ``rank`` cannot write tensors."""

    def full(tensors: Any, path: Any, *_: Any) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    here = os.environ["RANK"] == str(rank)
    with mock.patch.object(checkpoint_storage, "save_file", full if here else checkpoint_storage.save_file):
        return train(changes, run_dir)


def damage(path: Path) -> None:
    """Change the last byte of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def train_aloud(changes: dict[str, Any], run_dir: Path) -> list[str]:
    """Train and return the lines that were printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(changes, run_dir)
    return printed.getvalue().splitlines()


def take(turns: Sequence[Turn]) -> None:
    """Run jobs in one spawn; the first that fails is an error."""
    for turn, results in zip(turns, in_turn(turns), strict=True):
        for result in results:
            if isinstance(result, Exception):
                raise AssertionError(f"{turn}: {result!r}") from result


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's record without what a clock or a memory counter says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _CLOCKED} for line in lines]
