"""A run read in one language, written in the other: classes of its options, differing defaults, and what to write."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep.config import ConfigContainer, Origin, all_fields
from lockstep.config.derive import derive, interpolate
from lockstep.errors import ConfigError
from lockstep.recipes.catalog import get_recipe
from lockstep.translation import bridge, nemo
from lockstep.translation.classify import CLASSES, Class, Side, Verdict, classify, refusals
from lockstep.translation.differing import effect_reason, matters, reason
from lockstep.translation.flags import Reading

Target = Literal["lockstep", "megatron-bridge", "megatron-lm"]


@dataclass(frozen=True)
class Difference:
    """An option that nobody set: its path, both effective values, what is written for it, and why it matters."""

    path: str
    here: Any
    there: Any
    written: dict[str, Any]
    reason: str


@dataclass
class Translation:
    """A translated run.

    Attributes:
        target: the system it is written for.
        recipe: the recipe that overrides are relative to, or that was translated.
        verdicts: every option of the user with its class.
        differing: options nobody set whose effective values differ, written out.
        assignments: what to write: keys with values, or flags with their words.
        deferred: keys whose value only the job's shell knows.
        notes: what else the user has to know, one sentence each.
    """

    target: Target
    recipe: str
    verdicts: list[Verdict]
    differing: list[Difference]
    assignments: dict[str, Any]
    deferred: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def of_class(self, kind: Class) -> list[Verdict]:
        """Return the verdicts of one class."""
        return [verdict for verdict in self.verdicts if verdict.kind == kind]

    def counts(self) -> dict[str, int]:
        """Return how many options each class has, and how many differing defaults there are."""
        return {kind: len(self.of_class(kind)) for kind in CLASSES} | {"differing": len(self.differing)}


def to_lockstep(reading: Reading, recipe: str, waived: Iterable[str] = (), waive_refused: bool = False) -> Translation:
    """Return the overrides of a recipe of Lockstep that are the same run as some flags.

    What Lockstep's trainer refuses is written like everything else. It is left out where it is in ``waived``, and with
    ``waive_refused`` where it changes speed, logging or paths only.

    Raises:
        ConfigError: no such recipe.
    """
    config, base, names = reading.config.copy(), get_recipe(recipe), set(waived)
    interpolate(config)
    there = {path: base.get(path) for path in all_fields()}
    verdicts = classify(reading.options, Side("Lockstep", there, lambda path, _: (path,), {}), names)
    verdicts = [_of_trainer(verdict, names, waive_refused) for verdict in verdicts]
    for verdict in verdicts:
        if verdict.kind == "waived":
            for path in verdict.option.sets:
                config.set(path, all_fields()[path].default, Origin())
    assignments = {i.path: value for i, value, _ in config.items() if value != there[i.path]} | reading.deferred
    given, unsaid = reading.given(), _unsaid(reading)
    assignments = {path: assignments[path] for path in all_fields() if path in assignments and path not in unsaid}
    differing = [
        _difference(path, value, there[path], {path: value}) for path, value in assignments.items() if path not in given
    ]
    notes = _unsaid_notes(unsaid, there)
    return Translation("lockstep", recipe, verdicts, differing, assignments, set(reading.deferred), notes)


def _of_trainer(verdict: Verdict, waived: set[str], waive_refused: bool) -> Verdict:
    """Return a verdict that says what Lockstep's trainer makes of the option."""
    option, refused = verdict.option, refusals(verdict.option.sets)
    if verdict.kind != "mapped" or not refused:
        return verdict
    effects = {all_fields()[path].spec.effect for path in option.sets}
    why = "; ".join(dict.fromkeys(refused.values()))
    if option.written.flag in waived:
        return Verdict(option, "waived", {}, f"waived by the user: Lockstep refuses it, because {why}")
    if waive_refused and "run" not in effects:
        return Verdict(option, "waived", {}, f"{effect_reason(effects.pop())}, and Lockstep refuses it: {why}")
    return Verdict(option, "mapped", verdict.there, f"{REFUSED}: {why}")


REFUSED = "Lockstep does not train with it"


def _difference(path: str, here: Any, there: Any, written: dict[str, Any]) -> Difference:
    return Difference(path, here, there, written, reason(path, all_fields()[path].spec.effect))


_REQUIRED = (
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.seq_length",
    "train.micro_batch_size",
    "train.train_iters",
    "optimizer.lr",
)


def _unsaid(reading: Reading) -> list[str]:
    """Return what Megatron-LM needs to be told and was not: there the recipe's value stays."""
    if any(option.elsewhere is not None and option.written.flag == nemo.RECIPE for option in reading.options):
        return []
    given = reading.given()
    spoken = given | ({"train.train_iters"} if "train.train_samples" in given else set())
    spoken |= {"model.num_layers"} if reading.config.model.hybrid_layer_pattern else set()
    return [path for path in _REQUIRED if path not in spoken]


def _unsaid_notes(unsaid: Iterable[str], there: Mapping[str, Any]) -> list[str]:
    flags = [(all_fields()[path].spec.flags[0], there[path]) for path in unsaid if there[path] is not None]
    return [f"{flag} is not given, which Megatron-LM needs; the recipe's {value} stays" for flag, value in flags]


def to_bridge(
    reading: Reading, recipe: str, version: str, world_size: int | None = None, waived: Iterable[str] = ()
) -> Translation:
    """Return the overrides of a recipe of Megatron Bridge that are the same run as some flags.

    Raises:
        ConfigError: a recipe whose values are not known, or a value that follows from an unknown number of processes.
    """
    there = bridge.recipe_values(recipe)
    given = reading.given()
    config = reading.config.copy()
    for path in _unsaid(reading):
        config.set(path, there[path], Origin("recipe", recipe))
    here = _effective(config, world_size)
    other = ConfigContainer()
    for path, value in there.items():
        other.set(path, here.get(path) if path in given else value, Origin("recipe", recipe))
    other = _effective(other, world_size)
    values = {p: here.get(p) for p in all_fields() if p in given and p not in reading.deferred}
    values = {path: value for path, value in values.items() if value != there[path]} | reading.deferred
    keyless = bridge.NOT_OF_FINE_TUNING if here.dataset.sft else ()
    values = {path: value for path, value in values.items() if path not in keyless}
    unsaid = [*_unsaid(reading), *keyless]
    unset = [path for path in all_fields() if path not in given and path not in unsaid and _differs(path, here, other)]
    follows = "train.global_batch_size" in unset and here.train.step_batch_size_schedule is None
    if follows and world_size is None:
        raise ConfigError(
            "--global-batch-size is not given, so it follows from the number of processes; give --world-size"
        )
    values |= {path: here.get(path) for path in unset}
    assignments = bridge.assignments(values, version)
    differing = [
        _difference(
            path,
            here.get(path),
            other.get(path),
            {k: assignments[k] for k in bridge.keys(path, version) if k in assignments},
        )
        for path in unset
    ]
    deferred = {key for path in reading.deferred for key in bridge.keys(path, version)}
    verdicts = classify(reading.options, _bridge_side(here, there, version), waived)
    notes = bridge.needs_recipe(values, recipe) + _unsaid_notes(_unsaid(reading), there)
    return Translation(
        "megatron-bridge", bridge.long_name(recipe, version), verdicts, differing, assignments, deferred, notes
    )


def _effective(config: ConfigContainer, world_size: int | None) -> ConfigContainer:
    effective = config.copy()
    interpolate(effective)
    derive(effective, world_size or 1)
    return effective


def _differs(path: str, here: ConfigContainer, other: ConfigContainer) -> bool:
    if all_fields()[path].spec.effect != "run" or not bridge.keys(path):
        return False
    return here.get(path) != other.get(path) and matters(path, here)


def _bridge_side(here: ConfigContainer, there: Mapping[str, Any], version: str) -> Side:
    def keys(path: str, value: Any) -> tuple[str, ...]:
        if here.dataset.sft and path in bridge.NOT_OF_FINE_TUNING:
            return ()
        return () if (path, value) in bridge.VALUES_WITHOUT_KEY else bridge.keys(path, version)

    learned = here.model.position_embedding_type == "learned_absolute"
    rows = here.model.seq_length if learned else ...
    fixed = {
        "model.use_mcore_models": (True, "Megatron Bridge builds its models from Megatron Core"),
        "model.add_position_embedding": (..., "follows from model.position_embedding_type"),
        "model.max_position_embeddings": (
            rows,
            "follows from the sequence length, or is not read with these positions",
        ),
    }
    if there["dataset.sft"]:
        fixed["dataset.sft"] = (True, "the recipe's data is a GPTSFTDatasetConfig")
    return Side(bridge.NAME, there, keys, fixed)
