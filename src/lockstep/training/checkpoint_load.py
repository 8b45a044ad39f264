"""Continuing from a checkpoint: which one, whether it fits the run, and putting its state into the run's parts."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lockstep.config import ConfigContainer
from lockstep.errors import UserError
from lockstep.models.init import Fingerprint
from lockstep.parallel import Mesh
from lockstep.parallel.dropout import stream_layout, stream_number
from lockstep.parallel.placement import Placed, Placement
from lockstep.peft.apply import is_adapter
from lockstep.record.schema import encode
from lockstep.training import checkpoint_files as files
from lockstep.training.checkpoint_args import is_hf_folder, named_source, names_weights, taken_lines
from lockstep.training.checkpoint_base import (
    BasePrints,
    check_adapters,
    check_base,
    check_kind,
    missing_places,
    set_magnitudes,
)
from lockstep.training.checkpoint_index import Stored, read_index, read_whole
from lockstep.training.checkpoint_peers import Peers
from lockstep.training.checkpoint_state import (
    MODEL,
    OPTIMIZER,
    check_tensors,
    make_optimizer_state,
    model_tensors,
    take_model_tensors,
)
from lockstep.training.console import say
from lockstep.training.evaluate import Evaluator
from lockstep.training.hooks import Progress
from lockstep.training.loop import Trainer
from lockstep.training.precision import params_dtype
from lockstep.training.schedule import LearningRateSchedule, WeightDecaySchedule
from lockstep.training.setup import Parts


@dataclass(frozen=True)
class Source:
    """A checkpoint that a run continues from, its head read and its files verified.

    ``root`` is the folder that was named, ``folder`` the checkpoint in it; ``weights_only`` where a run starts anew
    with its weights.
    """

    root: Path
    folder: Path
    manifest: dict[str, Any]
    config: dict[str, dict[str, Any]]
    weights_only: bool = False

    def index(self, config: ConfigContainer) -> dict[str, Stored]:
        """Return its tensors by name, as a run of the resolved ``config`` finds them."""
        return read_index(self.folder)

    def read(self, tensors: dict[str, Placed], config: ConfigContainer) -> None:
        """Fill tensors of this process in place."""
        from lockstep.training.checkpoint_storage import read_tensors  # PyTorch's checkpoints are slow to import

        read_tensors(self.folder, tensors)

    def whole(self, name: str, stored: Stored, config: ConfigContainer) -> Tensor:
        """Return a whole tensor."""
        return read_whole(self.folder, stored)

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


def open_source(config: ConfigContainer, peers: Peers) -> Source | None:
    """Return the checkpoint that a configuration asks to continue from, or None where it asks for a fresh run.

    The processes share out the verification of its files.

    Raises:
        UserError: there is none, it is damaged, or its model is another one.
    """
    settings = config.checkpoint
    if settings.load is None and settings.pretrained_checkpoint is None:
        return None
    source = peers.by_leader(lambda: _continued(config))
    if source is not None:
        _verify(source, peers)
    return source


def open_base(config: ConfigContainer, peers: Peers) -> Source | None:
    """Return the checkpoint with the weights that adapters are trained for, None where all weights are trained.

    Raises:
        UserError: there is none, it is damaged, or its model is another one.
    """
    if config.peft.scheme is None:
        return None
    assert config.checkpoint.pretrained_checkpoint is not None, "validation asks for it"
    root = Path(config.checkpoint.pretrained_checkpoint)
    source = peers.by_leader(lambda: _head(config, root, pretrained=True))
    _verify(source, peers)
    return source


def _verify(source: Source, peers: Peers) -> None:
    peers.everywhere(lambda: files.verify(source.folder, source.manifest, peers.rank, peers.size))


def _continued(config: ConfigContainer) -> Source | None:
    root, pretrained = named_source(config.checkpoint)
    if pretrained and config.peft.scheme is not None:
        return None  # new adapters, for weights that `open_base` finds
    return _head(config, root, pretrained)


def _head(config: ConfigContainer, root: Path, pretrained: bool) -> Source:
    settings = config.checkpoint
    if pretrained and not root.is_dir():
        raise UserError(f"--pretrained-checkpoint {root}: there is no such folder")
    if pretrained and is_hf_folder(root):
        # Imported here only: few runs need the conversion.
        from lockstep.hf.source import open_hf_source

        return open_hf_source(root, config)
    folder = files.find(root, None if pretrained else settings.ckpt_step)
    weights_only = pretrained or settings.finetune
    source = Source(root, folder, files.read_manifest(folder), files.read_config(folder), weights_only)
    check_kind(config, folder, source.manifest, pretrained)
    if not pretrained and config.peft.scheme is not None:
        check_adapters(config, folder, source.config)
    if not weights_only:
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
        if not names_weights(info) or info.name not in saved:
            continue
        unknown_yet = info.name == "vocab_size" and ours is None
        if saved[info.name] != encode(ours) and not unknown_yet:
            differing.append(f"{info.path} is {ours}, in the checkpoint {saved[info.name]}")
    if differing:
        raise UserError(
            f"the model of {source.folder} is another one: {'; '.join(differing)}. Give this run the checkpoint's "
            "values, or take the weights alone with --finetune"
        )


def beginning(source: Source | None, config: ConfigContainer) -> str:
    """Return how a run begins: fresh, or from what."""
    if source is None:
        what = "weights" if config.peft.scheme is None else "adapters"
        return f"fresh run from initial {what}, seed {config.rng.seed}"
    if source.weights_only:
        return f"fine-tuning from iteration 0 with the weights of {source.root}, iteration {source.iteration}"
    return f"resuming from {source.root} at iteration {source.iteration}"


def announce(source: Source, config: ConfigContainer) -> None:
    """Say what a checkpoint brought into the configuration, and what beside it is not used."""
    for line in taken_lines(config):
        say(line)
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


def note_layout(source: Source, mesh: Mesh) -> None:
    """Name what of the layout differs from that of the checkpoint."""
    saved = source.manifest.get("layout", {})
    changed = [
        f"{key} = {value} (checkpoint: {saved.get(key, 1)})"
        for key, value in mesh.describe().items()
        if saved.get(key, 1) != value  # one without a size that it does not know
    ]
    if changed:
        say(f"another layout than the checkpoint's: {', '.join(changed)}")


def restore(
    source: Source, config: ConfigContainer, mesh: Mesh, parts: Parts, progress: Progress, peers: Peers
) -> Parts:
    """Put a checkpoint's state into the parts of a run and move ``progress`` to it; return the parts to go on with.

    Raises:
        UserError: on all processes, where the checkpoint does not fit the run.
    """
    placement = Placement(config.model, mesh, config.peft)
    if parts.base is not None:
        facts, base = source.manifest[files.ADAPTERS], parts.base
        peers.everywhere(lambda: check_base(facts, source.folder, base))
    if not source.weights_only:
        note_changes(source, config)
        note_layout(source, mesh)
    restored: list[Trainer | None] = []

    def fill() -> dict[str, dict[str, Any]]:
        index = _restore_tensors(source, config, placement, parts)
        restored.append(_restore_rest(source, config, mesh, parts, progress))
        return _fingerprint(source, config, placement, index, parts) if mesh.leads else {}

    weights = peers.everywhere(fill)[0]
    return replace(parts, trainer=restored[0], initial_weights=weights if mesh.leads else {})


def restore_base(source: Source, config: ConfigContainer, mesh: Mesh, parts: Parts, peers: Peers) -> Parts:
    """Fill the frozen weights of a run that trains adapters; return the parts with the name of these weights.

    Raises:
        UserError: on all processes, where the checkpoint does not fit the run.
    """
    placement = Placement(config.model, mesh, config.peft)
    dtype = params_dtype(config)

    def fill() -> tuple[str, dict[str, dict[str, Any]]]:
        index = source.index(config)
        wanted = {n: placed for n, placed in model_tensors(parts.model, placement).items() if not is_adapter(n)}
        check_tensors(wanted, index, "name another with --pretrained-checkpoint", convert=True)
        source.read(wanted, config)
        take_model_tensors(parts.model, wanted)

        def whole(name: str) -> Tensor:
            return source.whole(MODEL + name, index[MODEL + name], config)

        set_magnitudes(config, mesh, parts, whole, dtype)
        if parts.trainer is not None:
            parts.trainer.step.optimizer.weights.copy_from_model()
        if not mesh.leads:
            return "", {}
        prints = BasePrints(config, dtype)
        for name in placement.shapes:
            if is_adapter(name):
                prints.add_adapter(name, parts.initial_weights[name])
            else:
                prints.add(name, whole(name))
        return prints.stored, prints.model.result()

    fingerprint, weights = peers.everywhere(fill)[0]
    base = {"base": str(source.root.absolute()), "fingerprint": fingerprint}
    return replace(parts, initial_weights=weights if mesh.leads else {}, base=base)


def _fingerprint(
    source: Source, config: ConfigContainer, placement: Placement, index: dict[str, Stored], parts: Parts
) -> dict[str, dict[str, Any]]:
    """Return the fingerprint of the whole model, in the dtype of this run."""
    prints = Fingerprint()
    for name in placement.shapes:
        if parts.base is not None and not is_adapter(name):
            prints.take(name, parts.initial_weights[name])
            continue
        prints.add(name, source.whole(MODEL + name, index[MODEL + name], config).to(params_dtype(config)))
    return prints.result()


def _restore_tensors(source: Source, config: ConfigContainer, placement: Placement, parts: Parts) -> dict[str, Stored]:
    """Fill weights and optimizer state of this process; return the index of the checkpoint."""
    trainer = parts.trainer
    if not source.weights_only:
        check_model(config, source)
    index = source.index(config)
    wanted = model_tensors(parts.model, placement)
    if parts.base is not None:
        wanted = {name: placed for name, placed in wanted.items() if is_adapter(name)}
        surplus = missing_places(index, placement)
        if surplus:
            raise UserError(
                f"{source.folder} has adapters for linears that get none here, such as {surplus[0]}; give this run its "
                "peft.target_modules and peft.exclude_modules"
            )
    with_optimizer = _takes_optimizer(source, config, trainer)
    if with_optimizer:
        assert trainer is not None
        wanted |= _optimizer_state(source, trainer, placement, index)
    hint = "add --no-load-optim to continue without the optimizer's state, or --finetune to take the weights alone"
    check_tensors(wanted, index, hint, convert=not with_optimizer)
    source.read(wanted, config)
    if trainer is None or not (with_optimizer and trainer.step.optimizer.weights.copies):
        take_model_tensors(parts.model, wanted)
        if trainer is not None:
            trainer.step.optimizer.weights.copy_from_model()
    return index


def _takes_optimizer(source: Source, config: ConfigContainer, trainer: Trainer | None) -> bool:
    return config.checkpoint.load_optim and not source.weights_only and trainer is not None


def _restore_rest(
    source: Source, config: ConfigContainer, mesh: Mesh, parts: Parts, progress: Progress
) -> Trainer | None:
    """Move ``progress``, data, random streams, loss scale and schedules; return the trainer to go on with."""
    settings, trainer = config.checkpoint, parts.trainer
    if source.weights_only:
        return trainer
    _restore_progress(source, trainer, parts.evaluator, progress)
    if trainer is None:
        return None
    if settings.load_rng:
        _restore_streams(source, config, trainer, mesh)
    if not _takes_optimizer(source, config, trainer):
        # As in Megatron-LM: the position in the schedules belongs to the optimizer's state.
        progress.stepped_samples = 0
        return trainer
    _restore_scaler(source, trainer)
    return _with_schedules(source, config, trainer, progress)


def _optimizer_state(source: Source, trainer: Trainer, placement: Placement, names: Iterable[str]) -> dict[str, Placed]:
    facts = source.manifest.get("optimizer")
    if not isinstance(facts, dict):
        raise UserError(f"{source.folder} was saved without optimizer state; add --no-load-optim or --finetune")
    saved = (name for name in names if name.startswith(OPTIMIZER))
    return make_optimizer_state(trainer.step.optimizer, placement, saved, facts.get("step"))


def _restore_progress(source: Source, trainer: Trainer | None, evaluator: Evaluator | None, progress: Progress) -> None:
    saved = source.manifest["progress"]
    progress.iteration = source.iteration
    progress.consumed_samples = int(saved["consumed_samples"])
    progress.stepped_samples = int(saved["stepped_samples"])
    if trainer is not None:
        trainer.feed.seek(progress.consumed_samples)
    if evaluator is not None:
        evaluator.seek(saved["evaluated_samples"])


def _restore_streams(source: Source, config: ConfigContainer, trainer: Trainer, mesh: Mesh) -> None:
    """Go on with the random streams, where the checkpoint has as many as this layout; start new ones where not."""
    if trainer.step.dropout is None:
        return
    saved, ours = source.manifest["streams"], stream_layout(mesh)
    if not saved:
        raise UserError(f"{source.folder} was saved without random streams; add --no-load-rng")
    if saved != ours:
        # Without dropout nothing is ever drawn from them.
        if max(config.model.hidden_dropout, config.model.attention_dropout, config.peft.dropout) > 0:
            say(f"dropout starts new random streams: those of the checkpoint are of {_spelled(saved)}")
        return
    path = source.folder / files.rng_file(stream_number(mesh))
    try:
        trainer.step.dropout.load_state_dict(load_file(path))
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise UserError(
            f"the random streams of {source.folder} do not fit this run's device ({error}); add --no-load-rng"
        ) from None


def _spelled(layout: dict[str, int]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in layout.items())


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
