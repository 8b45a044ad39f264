"""Adapters in the format of Hugging Face's PEFT library: adapter_config.json and adapter_model.safetensors.

Hugging Face has the projections of query, key and value apart, and those of a gated MLP. An adapter of all of them
together becomes one of each with the same first matrix; the way back needs first matrices that are equal.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lockstep.config import ConfigContainer, Origin
from lockstep.config.model import ModelConfig
from lockstep.errors import ConfigError, UserError
from lockstep.hf.checkpoint import write_weights
from lockstep.hf.families import family_for, family_of
from lockstep.hf.folder import read_json, whole_folder
from lockstep.hf.rules import Form, Gated, Grouped, GroupedInOne, Mapped, Same, Transposed, listed, mapped
from lockstep.models.layers import required
from lockstep.peft.apply import CANONICAL, adapter_names, linears_of, whole_adapters
from lockstep.peft.files import AdapterCheckpoint, BaseWeights
from lockstep.training.checkpoint_args import is_hf_folder
from lockstep.training.checkpoint_files import ADAPTERS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_LEAVES = {"lora_A": "linear_in.weight", "lora_B": "linear_out.weight", "lora_magnitude_vector": "magnitude"}

# Keys of adapter_config.json that are read, or that change nothing of a finished adapter. All others must be unset.
_TAKEN = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "bias", "init_lora_weights", "target_modules"),
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode"),
    *("fan_in_fan_out", "exclude_modules", "megatron_core", "layers_pattern", "qalora_group_size"),
}


def _rows_in_order(form: Form) -> Form | None:
    """Return how rows of an adapter's second matrix become Hugging Face's; None where that is not known."""
    if isinstance(form, Same | Transposed):
        return Same()
    if isinstance(form, GroupedInOne):
        return GroupedInOne(transposed=False)
    return form if isinstance(form, Grouped | Gated) else None


@dataclass(frozen=True)
class _Place:
    """A linear in Hugging Face's model: its modules, and how rows become theirs."""

    modules: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[[list[Tensor]], Tensor]


def _places(model: ModelConfig, config: dict[str, Any] | None) -> dict[str, _Place]:
    """Return where the linears of a model that can have adapters are in Hugging Face's, by full name."""
    family = family_of(config) if config is not None else family_for(model)
    places: dict[str, _Place] = {}
    every: dict[str, Mapped] = mapped(family.rules, model, required(model.vocab_size))
    for path in linears_of(model):
        entry = every[f"{path}.weight"]
        form = _rows_in_order(entry.form)
        if form is None or ".local_experts." in path:
            continue
        modules = tuple(name.removesuffix(".weight") for name in entry.theirs)
        places[path] = _Place(modules, partial(form.split, sizes=entry.sizes), partial(form.join, sizes=entry.sizes))
    return places


def export_adapters(source: Path, target: Path, *, base: Path | None = None, step: int | None = None) -> list[str]:
    """Write a checkpoint of adapters in the format of PEFT; return the names of the files.

    Args:
        source: folder of checkpoints of adapters, or one checkpoint.
        target: folder that does not exist yet.
        base: what the written adapters name as their model; the weights they were trained for when None.
        step: iteration instead of the newest.

    Raises:
        UserError: an adapter has no counterpart in PEFT; nothing is written.
    """
    adapters = AdapterCheckpoint.open(source, step)
    named = base or Path(adapters.base["base"])
    config = read_json(named / "config.json") if is_hf_folder(named) else None
    places = _places(adapters.config.model, config)
    tensors: dict[str, Tensor] = {}
    homeless = []
    for path, _ in adapters.adapters():
        found = _their_tensors(adapters, path, places.get(path))
        if found is None:
            homeless.append(path)
        else:
            tensors |= found
    if homeless:
        raise UserError(
            f"PEFT has no place for the adapters of {listed(homeless)}; merge them instead (lockstep adapter merge)"
        )
    modules = sorted({_module_of(name) for name in tensors})
    peft = adapters.config.peft
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(named),
        "r": peft.dim,
        "lora_alpha": peft.alpha,
        "lora_dropout": peft.dropout if peft.dropout_position == "pre" else 0.0,
        "target_modules": _shortened(modules, [name for place in places.values() for name in place.modules]),
        "use_dora": peft.scheme == "dora",
        "bias": "none",
        "fan_in_fan_out": config is not None and config.get("model_type") == "gpt2",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return _write(target, written, tensors)


def _their_tensors(adapters: AdapterCheckpoint, path: str, place: _Place | None) -> dict[str, Tensor] | None:
    """Return PEFT's tensors of an adapter by key; None where PEFT has no place for it."""
    if place is None:
        return None
    adapter = dict(adapters.adapters())[path]
    pairs, lengths = adapters.pairs(path, adapter), adapters.magnitudes(path, adapter)
    leaf = path.rpartition(".")[2]
    tensors: dict[str, Tensor] = {}

    def put(module: str, inner: Tensor, out: Tensor, length: Tensor | None) -> None:
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = inner.clone()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = out.contiguous()
        if length is not None:
            tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = length.contiguous()

    if leaf in pairs:
        inner, out = pairs[leaf]
        parts = place.split(lengths[leaf]) if lengths else (None,) * len(place.modules)
        for module, rows, length in zip(place.modules, place.split(out), parts, strict=True):
            put(module, inner, rows, length)
        return tensors
    if len(place.modules) != len(CANONICAL[leaf]):
        return None
    for name, (inner, out) in pairs.items():
        put(place.modules[CANONICAL[leaf].index(name)], inner, out, lengths.get(name))
    return tensors


def _module_of(key: str) -> str:
    match = _KEY.fullmatch(key)
    assert match is not None, "keys are written here"
    return match[1]


def _shortened(chosen: list[str], every: list[str]) -> list[str]:
    """Return last names that stand for all modules so called where all are chosen, and full names of the others."""
    wanted = set(chosen)
    last: dict[str, set[str]] = {}
    for name in every:
        last.setdefault(name.rpartition(".")[2], set()).add(name)
    return sorted({(leaf if last[leaf := name.rpartition(".")[2]] <= wanted else name) for name in chosen})


def _write(target: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    with whole_folder(target) as scratch:
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, scratch / TENSORS, metadata={"format": "pt"})
    return sorted(path.name for path in target.iterdir())


def import_adapters(source: Path, base: Path, target: Path, *, fused: bool = False) -> Path:
    """Write adapters in the format of PEFT as a checkpoint of adapters for the weights of ``base``; return its folder.

    With ``fused`` those of query, key and value, and of both halves of a gated MLP, become one each.

    Raises:
        UserError: PEFT's files ask for something else, or are not for such a model; nothing is written.
    """
    settings = read_json(source / CONFIG)
    _check_settings(source, settings)
    weights = BaseWeights.open(base)
    config = weights.config.copy()
    origin = Origin("hf", CONFIG)
    for name, key in (("dim", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")):
        try:
            config.set(f"peft.{name}", settings.get(key, 0), origin)
        except ConfigError as error:
            raise UserError(f"{source / CONFIG}: {key} = {settings.get(key)}: {error}") from None
    config.set("peft.scheme", "dora" if settings.get("use_dora") else "lora", origin)
    places = _places(config.model, read_json(base / "config.json") if is_hf_folder(base) else None)
    ours = _our_tensors(_read(source), places, fused)
    config.set("peft.target_modules", _targets(set(ours), config), origin)
    expected = dict(adapter_names(whole_adapters(config.model, config.peft)))
    given = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    wrong = [name for name in {**expected, **given} if expected.get(name) != given.get(name)]
    if wrong:
        raise UserError(f"{source / TENSORS}: missing, without a place, or of another shape: {listed(sorted(wrong))}")
    entries = [
        (name, given[name], str(ours[name].dtype).removeprefix("torch."), partial(ours.__getitem__, name))
        for name in expected
    ]
    facts = {"base": str(base.absolute()), "fingerprint": weights.fingerprint()}
    return write_weights(target, config, entries, [], {ADAPTERS: facts, "imported_from": str(source.absolute())})


def _check_settings(source: Path, settings: dict[str, Any]) -> None:
    """Refuse what a LoRA or DoRA of plain linears is not.

    Raises:
        UserError: names every key.
    """
    wrong = [key for key, value in settings.items() if key not in _TAKEN and value not in (None, False, 0, "", [], {})]
    if settings.get("peft_type") != "LORA":
        wrong.append("peft_type")
    if settings.get("bias", "none") != "none":
        wrong.append("bias")
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        wrong.append("init_lora_weights")
    if wrong:
        raise UserError(
            f"{source / CONFIG} asks for {', '.join(f'{key} = {settings.get(key)}' for key in wrong)}, which is not "
            "supported; only LoRA and DoRA with one rank and alpha are"
        )


def _read(source: Path) -> dict[str, dict[str, Tensor]]:
    """Return PEFT's tensors by module and kind.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """
    try:
        loaded = load_file(source / TENSORS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source / TENSORS} cannot be read: {error}") from None
    modules: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in loaded.items():
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
        else:
            modules.setdefault(match[1], {})[match[2]] = tensor
    if foreign:
        raise UserError(f"{source / TENSORS} holds what is no part of an adapter: {listed(foreign)}")
    return modules


def _our_tensors(
    modules: Mapping[str, Mapping[str, Tensor]], places: Mapping[str, _Place], fused: bool
) -> dict[str, Tensor]:
    """Return our tensors by name.

    Raises:
        UserError: a module has no place here; names all. Or adapters cannot become one.
    """
    known = {module for place in places.values() for module in place.modules}
    homeless = [module for module in modules if module not in known]
    if homeless:
        raise UserError(f"this model has no linear for the adapters of {listed(homeless)}")
    ours: dict[str, Tensor] = {}
    for path, place in places.items():
        found = [modules.get(module) for module in place.modules]
        leaf = path.rpartition(".")[2]
        if len(found) > 1 and not fused:
            for name, parts in zip(CANONICAL[leaf], found, strict=True):
                ours |= {f"{path}.adapter.{name}.{_LEAVES[kind]}": t for kind, t in (parts or {}).items()}
        elif any(found):
            prefix = f"{path}.adapter.{leaf}."
            ours |= {prefix + name: tensor for name, tensor in _joined(place, found).items()}
    return ours


def _joined(place: _Place, found: list[Mapping[str, Tensor] | None]) -> dict[str, Tensor]:
    """Return the tensors of one adapter for what PEFT has in several modules."""
    parts = [part for part in found if part is not None and "lora_A" in part and "lora_B" in part]
    equal = all(torch.equal(part["lora_A"], parts[0]["lora_A"]) for part in parts)
    if len(parts) != len(found) or not equal:
        raise UserError(
            f"the adapters of {', '.join(place.modules)} are not one: all must be there, with the same lora_A; import "
            "them without --fused"
        )
    joined = {
        "linear_in.weight": parts[0]["lora_A"],
        "linear_out.weight": place.join([part["lora_B"] for part in parts]).contiguous(),
    }
    if all("lora_magnitude_vector" in part for part in parts):
        joined["magnitude"] = place.join([part["lora_magnitude_vector"] for part in parts]).contiguous()
    return joined


def _targets(names: set[str], config: ConfigContainer) -> list[str]:
    """Return what peft.target_modules must be for these parameters of adapters."""
    chosen = {(name.partition(".adapter.")[0], name.partition(".adapter.")[2].partition(".")[0]) for name in names}
    every = linears_of(config.model)
    targets = []
    for path, name in sorted(chosen):
        leaf = path.rpartition(".")[2]
        alike = {each for each in every if each.rpartition(".")[2] == leaf}
        whole = {each for each, other in chosen if other == name} >= alike
        targets.append(name if whole else f"{path.rpartition('.')[0]}.{name}")
    return list(dict.fromkeys(targets))
