"""Answers what a configuration needs on a number of GPUs, with changes to it or without."""

import contextlib
import io
from dataclasses import dataclass

from lockstep.config import ConfigContainer, Origin, Ref, resolve
from lockstep.config.derive import has_data
from lockstep.data.tokenizers import build_tokenizer
from lockstep.errors import ConfigError
from lockstep.plan.gpus import Gpu
from lockstep.plan.layouts import Changes, Layout, layout_of, layouts_for
from lockstep.plan.measure import Memory, measure
from lockstep.plan.tracker import OverLimit
from lockstep.training.setup import set_vocab_size

_NOT_MEASURED = {
    "dist.use_torch_fsdp2": False,
    "dist.use_megatron_fsdp": False,
}
_Question = tuple[int, frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Answer:
    """What a layout needs on each GPU.

    Attributes:
        layout: sizes of its axes.
        memory: of the process that needs most.
        room_bytes: what a GPU has for the peak.
    """

    layout: Layout
    memory: Memory
    room_bytes: int

    @property
    def fits(self) -> bool:
        """Whether every process finds room on its GPU."""
        return self.memory.peak_bytes <= self.room_bytes


class Planner:
    """Measures a configuration, as a door has read it, on GPUs of one type; every question is measured once."""

    def __init__(self, config: ConfigContainer, gpu: Gpu) -> None:
        self._config = _standing_in(config)
        self.gpu = gpu
        self._answers: dict[_Question, Answer] = {}
        self._unfit: set[_Question] = set()

    def resolved(self, gpus: int, changes: Changes | None = None) -> ConfigContainer:
        """Return the configuration for so many GPUs, with changes, as a run would have it.

        Raises:
            UserError: it cannot run.
        """
        changed = self._config.copy()
        for path, value in (changes or {}).items():
            changed.set(path, value, Origin("derived", "lockstep plan"))
        resolved = resolve(changed, gpus)
        for path, alone in _NOT_MEASURED.items():
            if resolved.get(path) != alone:
                raise ConfigError(f"{path} = {resolved.get(path)}: lockstep plan cannot measure this yet")
        if resolved.model.vocab_size is not None:
            return resolved
        with contextlib.redirect_stdout(io.StringIO()):  # what is said of the padding belongs to a run
            set_vocab_size(resolved, build_tokenizer(resolved.tokenizer).vocab_size)
        self._config.set("model.vocab_size", resolved.model.vocab_size, resolved.origin("model.vocab_size"))
        return self.resolved(gpus, changes)  # whether the layout divides the vocabulary can be told only now

    def ask(self, gpus: int, changes: Changes | None = None) -> Answer:
        """Return what the configuration needs on so many GPUs.

        Raises:
            UserError: it cannot run.
        """
        key = _key(gpus, changes or {})
        if key not in self._answers:
            config = self.resolved(gpus, changes)
            self._answers[key] = Answer(layout_of(config, gpus), measure(config, gpus, self.gpu), self._room(gpus))
        return self._answers[key]

    def fitting(self, gpus: int, changes: Changes) -> Answer | None:
        """Return what the configuration needs with changes; None where it cannot run so or does not fit."""
        key = _key(gpus, changes)
        if key not in self._answers and key not in self._unfit:
            try:
                config = self.resolved(gpus, changes)
                memory = measure(config, gpus, self.gpu, limit=self._room(gpus))
                self._answers[key] = Answer(layout_of(config, gpus), memory, self._room(gpus))
            except (ConfigError, OverLimit):
                self._unfit.add(key)
        answer = self._answers.get(key)
        return answer if answer is not None and answer.fits else None

    def _room(self, gpus: int) -> int:
        return self.gpu.memory_bytes - self.gpu.outside_bytes(gpus)

    def layouts(self, gpus: int) -> list[Answer]:
        """Return the layouts that can run on so many GPUs: those that fit first, least model parallelism first."""
        asked, answers = layout_of(self.resolved(gpus), gpus), []
        for layout in layouts_for(gpus, asked):
            with contextlib.suppress(ConfigError):
                answers.append(self.ask(gpus, layout.changes(asked)))
        return sorted(answers, key=lambda a: (not a.fits, a.layout.model_parallel if a.fits else a.memory.peak_bytes))


def _standing_in(config: ConfigContainer) -> ConfigContainer:
    """Return a copy in which what a run of fine-tuning reads has a stand-in where it is not named yet.

    Samples, the tokenizer and the weights that adapters are for do not change what is held of them.
    """
    changed, origin = config.copy(), Origin("derived", "lockstep plan")
    if changed.dataset.sft and changed.dataset.mock is None and not has_data(changed):
        changed.set("dataset.mock", True, origin)
    settings = changed.checkpoint
    if settings.use_checkpoint_args or changed.model.vocab_size is None:
        return changed
    if changed.peft.scheme is not None and settings.pretrained_checkpoint is None:
        changed.set("checkpoint.pretrained_checkpoint", "not named yet", origin)
        if changed.tokenizer.tokenizer_model is None:
            changed.set("tokenizer.tokenizer_type", "NullTokenizer", origin)
            changed.set("tokenizer.vocab_size", Ref("model.vocab_size"), origin)
    return changed


def _key(gpus: int, changes: Changes) -> _Question:
    return gpus, frozenset((path, repr(value)) for path, value in changes.items())
