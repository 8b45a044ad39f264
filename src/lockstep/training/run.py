"""One run from a resolved configuration: set-up in a fixed order, the loop, the final evaluation, the record."""

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from lockstep.config import ConfigContainer
from lockstep.config.sharding import sharding_strategy
from lockstep.core.enter import describe
from lockstep.errors import UserError
from lockstep.models.ops import matmul_mode
from lockstep.parallel import Mesh, start_processes
from lockstep.record.environment import code_version, device_facts, environment_variables, package_versions
from lockstep.record.paths import create_run_dir
from lockstep.record.schema import RUN_FILE
from lockstep.record.writer import RunWriter
from lockstep.training.attention import choose_attention
from lockstep.training.checkpoint_load import (
    Source,
    announce,
    beginning,
    check_save_folder,
    open_base,
    open_source,
    restore,
    restore_base,
)
from lockstep.training.checkpoint_peers import Peers
from lockstep.training.checkpoint_save import CheckpointHook, Saved
from lockstep.training.console import ConsoleHook, say, timestamped
from lockstep.training.device import choose_device, switches
from lockstep.training.exits import ExitRule, ExitSignal
from lockstep.training.float8 import describe_float8
from lockstep.training.hooks import CacheHook, FiniteCheck, GarbageHook, Hook, Progress, RecordHook, RunInfo
from lockstep.training.kernels import describe_kernels
from lockstep.training.loop import run_evaluation, train
from lockstep.training.memory import told_when_full
from lockstep.training.precision import params_dtype
from lockstep.training.profiling import ProfileHook
from lockstep.training.replicas import ReplicaCheck, TimeoutHook
from lockstep.training.result import Command, RunResult, RunStatus
from lockstep.training.setup import Parts, build
from lockstep.training.trackers import build_trackers


def run(config: ConfigContainer, *, door: str, command: Command, name: str) -> RunResult:
    """Train and evaluate as a resolved configuration says, and keep the record.

    ``door``, ``command`` and ``name`` only go into the record; ``config`` stays as it is.

    Raises:
        UserError: the configuration, the data or the machine cannot do what is asked, or a loss is not finite. Where
            training had not begun, no run directory is left behind.
    """
    started = time.monotonic()
    config = config.copy()
    device = choose_device(config.run.device)
    if config.logger.logging_level is not None:
        logging.getLogger("lockstep").setLevel(config.logger.logging_level)
    hooks: list[Hook] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(switches(config, device))
        signal = ExitSignal(config.train.exit_signal) if config.train.exit_signal_handler else None
        if signal is not None:
            stack.enter_context(signal.watched())
        mesh = stack.enter_context(start_processes(config, device, on_loss=partial(_fail, hooks)))
        checkpoints = _checkpointed(config)
        timeout = timedelta(minutes=config.dist.distributed_timeout_minutes)
        peers = Peers.of(mesh, timeout) if checkpoints else Peers()
        peers.by_leader(lambda: check_save_folder(config))
        base, source = open_base(config, peers), open_source(config, peers)
        limits = config.train.exit_interval, config.train.exit_duration_in_mins
        exits = Peers.of(mesh, timeout) if signal is not None or limits[1] is not None else Peers()
        exit_rule = ExitRule(started, *limits, signal, agree=exits.seen_by_leader, anywhere=exits.anywhere)
        code = code_version() if mesh.leads else {}
        if mesh.leads:
            core = describe(code["core"], code["commit"], code["dirty"])
            say(f"{core}; {beginning(source, config)}")
        if base is not None:
            say(f"training {config.peft.scheme} adapters for the weights of {base.root}")
        if source is not None:
            announce(source, config)
        writer = RunWriter(create_run_dir(config.run.dir, name)) if mesh.leads else None
        if writer is not None:
            hooks.append(RecordHook(writer))
        progress = Progress()
        try:
            if writer is not None:
                _start_record(
                    writer, config, device, source, base, code=code, door=door, command=vars(command), name=name
                )
            with told_when_full(device, "setting up"):
                parts = build(config, device, mesh, exit_rule)
                if base is not None:
                    parts = restore_base(base, config, mesh, parts, peers)
                if source is not None:
                    parts = restore(source, config, mesh, parts, progress, peers)
            if writer is not None:
                _complete_record(writer, config, device, parts, mesh)
            hooks += [*_build_hooks(config, device, name, writer), *_process_hooks(config, parts, mesh)]
            hooks += _checkpoint_hooks(config, mesh, parts, writer, peers)
        except BaseException as error:
            if writer is not None:
                _abandon(writer, hooks, error)
            raise
        run_dir = mesh.from_leader(writer.run_dir if writer is not None else None)
        info = RunInfo(config, name, run_dir, device, parts.train_iters, parts.flops_per_sample, mesh.world.size)
        return _go(info, parts, hooks, exit_rule, progress)


def _checkpointed(config: ConfigContainer) -> bool:
    settings = config.checkpoint
    return any((settings.save, settings.load, settings.pretrained_checkpoint))


def _start_record(
    writer: RunWriter,
    config: ConfigContainer,
    device: torch.device,
    source: Source | None,
    base: Source | None,
    **facts: Any,
) -> None:
    machine = device_facts(str(device))
    say(f"run directory: {writer.run_dir}")
    if source is not None:
        facts["resumed_from"] = source.as_fact() | {"finetune": source.weights_only}
    if base is not None:
        facts["base"] = base.as_fact()
    say(f"device: {device} ({machine['name']})")
    split = config.origin("model.sequence_parallel")
    if split.kind == "derived":
        say(f"sequence parallelism is off: {split.detail}")
    writer.start(
        **facts,
        packages=package_versions(),
        device=machine,
        environment=environment_variables(),
        seeds={"rng": config.rng.seed, "dataset": config.dataset.random_seed},
        **_config_facts(config),
    )


def _complete_record(
    writer: RunWriter, config: ConfigContainer, device: torch.device, parts: Parts, mesh: Mesh
) -> None:
    """Add what only the set-up could tell: vocabulary, data, initial weights, what computes what."""
    weights = dict(parts.initial_weights)
    overall = weights.pop("all")["sha256"]
    parameters = sum(math.prod(weight["shape"]) for weight in weights.values())
    features = {
        **_features(config, device),
        "parameters": parameters,
        "compile": parts.compilation,
        "cuda_graphs": parts.graphs,
        "gradient_sync": parts.gradient_sync,
        "layout": mesh.describe() | _sharding(config, mesh),
    }
    writer.update(
        data={"tokenizer": parts.tokenizer.identity(), **parts.datasets.describe()},
        initial_weights={"fingerprint": overall, "parameters": weights},
        features=features,
        **_config_facts(config),
    )
    say(f"precision: {features['precision']}, matrix products: {features['matmul']}")
    say(f"attention: {features['attention']}, compilation: {features['compile']}")
    say(f"CUDA graphs: {features['cuda_graphs']}")
    if mesh.replicas.size > 1:
        say(f"gradients are added up over processes {features['gradient_sync']}")
    say(f"float8: {features['float8']}, own kernels: {features['kernels']}")


def _sharding(config: ConfigContainer, mesh: Mesh) -> dict[str, Any]:
    """Return what processes with the same weights share out, over how many, and how often it is there."""
    strategy = sharding_strategy(config) if mesh.shards.size > 1 else "no_shard"
    sharded = strategy != "no_shard"
    return {
        "sharding": strategy,
        "shards": mesh.shards.size if sharded else 1,
        "instances": mesh.instances.size if sharded else mesh.replicas.size,
    }


def _config_facts(config: ConfigContainer) -> dict[str, Any]:
    return {
        "config": config.as_dict(),
        "origins": {info.path: str(origin) for info, _, origin in config.items() if origin.kind != "default"},
    }


def _features(config: ConfigContainer, device: torch.device) -> dict[str, Any]:
    dtype = params_dtype(config)
    return {
        "precision": str(dtype).removeprefix("torch."),
        "matmul": str(matmul_mode(device, dtype)),
        "attention": str(choose_attention(config, device)),
        "float8": describe_float8(config),
        "kernels": describe_kernels(config, device),
        "optimizer": {"adam": "torch.optim.AdamW (fused)", "sgd": "torch.optim.SGD (fused)"}[
            config.optimizer.optimizer
        ],
        "deterministic": config.model.deterministic_mode,
    }


def _build_hooks(config: ConfigContainer, device: torch.device, name: str, writer: RunWriter | None) -> list[Hook]:
    """Return the hooks after the record's, in the order they are called; those that report need the record."""
    hooks: list[Hook] = []
    if writer is not None:
        hooks += build_trackers(config, name, writer.run_dir)
        hooks.append(ConsoleHook(config.logger.log_interval, config.logger.log_throughput))
    dynamic_scale = config.mixed_precision.fp16 and config.mixed_precision.loss_scale is None
    if config.rerun_state_machine.check_for_nan_in_loss and not dynamic_scale:
        hooks.append(FiniteCheck())
    if config.train.empty_unused_memory_level and device.type == "cuda":
        hooks.append(CacheHook(config.train.empty_unused_memory_level))
    if config.train.manual_gc:
        hooks.append(GarbageHook(config.train.manual_gc_interval, config.train.manual_gc_eval))
    if config.profiling.use_pytorch_profiler:
        hooks.append(ProfileHook(config.profiling))
    return hooks


def _process_hooks(config: ConfigContainer, parts: Parts, mesh: Mesh) -> list[Hook]:
    """Return the hooks that several processes need."""
    hooks: list[Hook] = []
    interval, seconds = (
        config.train.check_weight_hash_across_dp_replicas_interval,
        config.dist.distributed_timeout_seconds_after_init,
    )
    if mesh.replicas.size > 1 and interval is not None:
        hooks.append(ReplicaCheck(parts.model, mesh, interval))
    if mesh.world.size > 1 and seconds is not None:
        hooks.append(TimeoutHook(mesh, timedelta(seconds=seconds)))
    return hooks


def _checkpoint_hooks(
    config: ConfigContainer, mesh: Mesh, parts: Parts, writer: RunWriter | None, peers: Peers
) -> list[Hook]:
    """Return the hook that saves checkpoints, where they are asked for."""
    if config.checkpoint.save is None or parts.trainer is None:
        return []
    origin = {"run_dir": str(writer.run_dir.absolute())} if writer is not None else {}
    return [CheckpointHook(config, Saved(config, mesh, parts).snapshot, origin, peers)]


def _go(info: RunInfo, parts: Parts, hooks: Sequence[Hook], exit_rule: ExitRule, progress: Progress) -> RunResult:
    """Run the loop and the final evaluation."""
    reason = None
    try:
        for hook in hooks:
            hook.on_start(info)
        if parts.trainer is not None:
            with told_when_full(info.device, "training", graphs=not parts.graphs.startswith("none")):
                reason = train(info, parts.trainer, parts.evaluator, hooks, progress, exit_rule)
            say(timestamped(reason or "after training is done"))
            if reason is None:
                for hook in hooks:
                    hook.after_training(progress)
        # Megatron-LM leaves at once when it stops early: no final evaluation.
        if reason is None and parts.evaluator is not None:
            with told_when_full(info.device, "evaluating"):
                for split in parts.evaluator.splits:
                    run_evaluation(parts.evaluator, split, hooks, progress, final=True)
        status: RunStatus = "finished" if reason is None else "stopped early"
        result = RunResult(info.run_dir, status, progress.iteration, progress.lm_loss, tuple(progress.evaluations))
        for hook in hooks:
            hook.on_finish(result)
    except BaseException as error:
        _fail(hooks, error)
        raise
    return result


def _fail(hooks: Sequence[Hook], error: BaseException) -> None:
    for hook in hooks:
        # The error that ended the run is the one to show, not one of the clean-up after it.
        with contextlib.suppress(Exception):
            hook.on_failure(error)


def _abandon(writer: RunWriter, hooks: Sequence[Hook], error: BaseException) -> None:
    """End a run whose set-up failed: without a trace where the user has something to mend, on the record otherwise."""
    if not isinstance(error, UserError):
        _fail(hooks, error)
        return
    (writer.run_dir / RUN_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for empty in (writer.run_dir / "tb_logs", writer.run_dir / "checkpoints", writer.run_dir):
            empty.rmdir()
