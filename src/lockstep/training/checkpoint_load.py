"""Continuing from a checkpoint: which one, whether it fits the run, and putting its state into the run's parts."""

import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.config.model_parallel import ModelParallel
from lockstep.errors import UserError
from lockstep.record.schema import encode
from lockstep.training import checkpoint_files as files
from lockstep.training.checkpoint_state import (
    OPTIMIZER,
    cause,
    check_tensors,
    make_optimizer_state,
    model_tensors,
    reload_main_weights,
)
from lockstep.training.console import say
from lockstep.training.evaluate import Evaluator
from lockstep.training.hooks import Progress
from lockstep.training.loop import Trainer
from lockstep.training.schedule import LearningRateSchedule, WeightDecaySchedule

_FREE = {
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
    "embedding_init_method_std",
    "use_cpu_initialization",
    "deterministic_mode",
    "make_vocab_size_divisible_by",
    *(field.name for field in fields(ModelParallel)),
}
"""Settings of the model that may change at a resume: they do not say what the weights are weights of."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that a run continues from, its head read and its files verified.

    ``root`` is the folder that was named, ``folder`` the checkpoint in it.
    """

    root: Path
    folder: Path
    manifest: dict[str, Any]
    config: dict[str, dict[str, Any]]

    @property
    def iteration(self) -> int:
        """The iteration it was saved after."""
        return int(self.manifest["iteration"])

    def as_fact(self) -> dict[str, Any]:
        """Return what the run record says of it."""
        return {
            "checkpoint": str(self.folder.absolute()),
            "iteration": self.iteration,
            "run_dir": self.manifest.get("run_dir"),
        }


def open_source(config: ConfigContainer) -> Source | None:
    """Return the checkpoint that a configuration asks to continue from, or None where it asks for a fresh run.

    Raises:
        UserError: there is none, it is damaged, or its model is another one.
    """
    settings = config.checkpoint
    if settings.load is None:
        return None
    root = Path(settings.load)
    folder = files.find(root, settings.ckpt_step)
    manifest = files.read_manifest(folder)
    files.verify(folder, manifest)
    source = Source(root, folder, manifest, files.read_config(folder))
    if not settings.finetune:
        check_model(config, source)
    return source


def check_save_folder(config: ConfigContainer) -> None:
    """Refuse to mix the checkpoints of two runs: a folder that holds some takes more only from a run that resumes.

    Raises:
        UserError: ``checkpoint.save`` holds checkpoints of a run that this one does not continue.
    """
    settings = config.checkpoint
    if settings.save is None or not files.holds_checkpoints(Path(settings.save)):
        return
    loads = settings.load is not None and Path(settings.load).resolve() == Path(settings.save).resolve()
    if not loads or settings.finetune:
        raise UserError(
            f"{settings.save} already holds checkpoints of another run; continue it with --load {settings.save}, or "
            "give another --save"
        )


def check_model(config: ConfigContainer, source: Source) -> None:
    """Check that the model of a checkpoint is the one of this run.

    Raises:
        UserError: it is another one; names every setting that differs.
    """
    saved = source.config.get("model", {})
    differing = []
    for info, ours, _ in config.model.items():
        if info.spec.effect != "run" or info.name in _FREE or info.name not in saved:
            continue
        unknown_yet = info.name == "vocab_size" and ours is None
        if saved[info.name] != encode(ours) and not unknown_yet:
            differing.append(f"{info.path} is {ours}, in the checkpoint {saved[info.name]}")
    if differing:
        raise UserError(
            f"the model of {source.folder} is another one: {'; '.join(differing)}. Give this run the checkpoint's "
            "values, or take the weights alone with --finetune"
        )


def announce(source: Source, config: ConfigContainer) -> None:
    """Say what is continued from."""
    if config.checkpoint.finetune:
        say(f"fine-tuning from iteration 0 with the weights of {source.root}, iteration {source.iteration}")
    else:
        say(f"resuming from {source.root} at iteration {source.iteration}")
    for name in files.unfinished(source.root):
        say(f"the unfinished save {name} in {source.root} is not used")


def note_changes(source: Source, config: ConfigContainer) -> None:
    """Name settings of data, batches and precision that differ from those of the checkpoint, as far as they matter."""
    changed = []
    for info, ours, _ in config.items():
        saved = source.config.get(info.section, {})
        relevant = info.section in ("dataset", "tokenizer", "train", "rng", "mixed_precision", "optimizer")
        if relevant and info.spec.effect == "run" and info.name in saved and saved[info.name] != encode(ours):
            changed.append(f"{info.path} = {ours} (checkpoint: {saved[info.name]})")
    if changed:
        say(f"settings that differ from the checkpoint's: {', '.join(changed)}")


def restore(
    source: Source,
    config: ConfigContainer,
    model: nn.Module,
    trainer: Trainer | None,
    evaluator: Evaluator | None,
    progress: Progress,
) -> Trainer | None:
    """Put a checkpoint's state into the parts of a run and move ``progress`` to it; return the trainer to go on with.

    Raises:
        UserError: the checkpoint does not fit the run.
    """
    settings = config.checkpoint
    if not settings.finetune:
        check_model(config, source)
        note_changes(source, config)
    with_optimizer = settings.load_optim and not settings.finetune and trainer is not None
    wanted = model_tensors(model)
    if with_optimizer:
        assert trainer is not None
        wanted |= _optimizer_state(source, trainer)
    hint = "add --no-load-optim to continue without the optimizer's state, or --finetune to take the weights alone"
    check_tensors(wanted, source.manifest["tensors"], hint, convert=not with_optimizer)
    _read_tensors(source, wanted)
    if trainer is not None and not with_optimizer:
        reload_main_weights(trainer.step.optimizer)
    if settings.finetune:
        return trainer
    _restore_progress(source, trainer, evaluator, progress)
    if trainer is None:
        return None
    if settings.load_rng:
        _restore_streams(source, trainer)
    if not with_optimizer:
        # As in Megatron-LM: the position in the schedules belongs to the optimizer's state.
        progress.stepped_samples = 0
        return trainer
    _restore_scaler(source, trainer)
    return _with_schedules(source, config, trainer, progress)


def _optimizer_state(source: Source, trainer: Trainer) -> dict[str, torch.Tensor]:
    facts = source.manifest.get("optimizer")
    if not isinstance(facts, dict):
        raise UserError(f"{source.folder} was saved without optimizer state; add --no-load-optim or --finetune")
    names = (name for name in source.manifest["tensors"] if name.startswith(OPTIMIZER))
    return make_optimizer_state(trainer.step.optimizer, names, facts.get("step"))


@torch.no_grad()
def _read_tensors(source: Source, wanted: dict[str, torch.Tensor]) -> None:
    """Fill the wanted tensors in place; safetensors files run no code when read."""
    reader = dcp.HuggingFaceStorageReader(str(source.folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(wanted, storage_reader=reader, no_dist=True)
    except (dcp.CheckpointException, SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{source.folder} cannot be read: {cause(error)}; load another with --ckpt-step") from error


def _restore_progress(source: Source, trainer: Trainer | None, evaluator: Evaluator | None, progress: Progress) -> None:
    saved = source.manifest["progress"]
    progress.iteration = source.iteration
    progress.consumed_samples = int(saved["consumed_samples"])
    progress.stepped_samples = int(saved["stepped_samples"])
    if trainer is not None:
        trainer.feed.seek(progress.consumed_samples)
    if evaluator is not None:
        evaluator.seek(saved["evaluated_samples"])


def _restore_streams(source: Source, trainer: Trainer) -> None:
    if trainer.step.dropout is None:
        return
    path = source.folder / files.RNG
    if not path.is_file():
        raise UserError(f"{source.folder} was saved without random streams; add --no-load-rng")
    try:
        trainer.step.dropout.load_state_dict(load_file(path))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the random streams of {source.folder} do not fit this run's device ({error}); add --no-load-rng"
        ) from None


def _restore_scaler(source: Source, trainer: Trainer) -> None:
    scaler, saved = trainer.step.optimizer.scaler, source.manifest.get("loss_scaler")
    if scaler is not None and isinstance(saved, dict):
        scaler.load_state_dict(saved)


def _with_schedules(source: Source, config: ConfigContainer, trainer: Trainer, progress: Progress) -> Trainer:
    """Return the trainer with the schedules to go on with: this run's, if they are the checkpoint's or override it."""
    s = config.scheduler
    if s.override_opt_param_scheduler:
        progress.stepped_samples = progress.consumed_samples
        return trainer
    saved = source.manifest["schedules"]
    if s.use_checkpoint_opt_param_scheduler:
        rate, decay = LearningRateSchedule(**saved["learning_rate"]), WeightDecaySchedule(**saved["weight_decay"])
        return replace(trainer, learning_rate=rate, weight_decay=decay)
    ours = {"learning_rate": asdict(trainer.learning_rate), "weight_decay": asdict(trainer.weight_decay)}
    differing = [
        f"{name.replace('_', ' ')} {key} is {value}, in the checkpoint {saved[name].get(key)}"
        for name, values in ours.items()
        for key, value in values.items()
        if saved[name].get(key) != value
    ]
    if differing:
        raise UserError(
            f"the schedules are not those of {source.folder} (lengths in samples): {'; '.join(differing)}. Give this "
            "run the checkpoint's, add --override-opt_param-scheduler to take this run's, or "
            "--use-checkpoint-opt_param-scheduler to take the checkpoint's"
        )
    return trainer
