"""Rotary positions, in the spelling of either version of transformers."""

from dataclasses import dataclass
from typing import Any

from lockstep.config.model import ModelConfig
from lockstep.errors import UserError
from lockstep.hf.families.family import Said

# Lockstep knows the scaling of Llama 3.1 and YaRN with these numbers alone.
_LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of plain attention, perhaps with Llama 3.1's scaling; ``base`` where none is stated."""

    base: float = 10000.0

    def read(self, hf: dict[str, Any]) -> list[Said]:
        """Return base, share of channels and scaling."""
        name, rope, base = _stated(hf, self.base)
        kind = _kind(rope)
        partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
        result = [base, ("rotary_percent", partial, "partial_rotary_factor")]
        if kind == "default":
            return [*result, ("rope_scaling", False, name)]
        if kind != "llama3":
            raise UserError(f"config.json: {name} of type {kind} is not supported (supported: default, llama3)")
        _check(name, rope, _LLAMA3)
        factor = ("rope_scaling_factor", _factor(name, rope), f"{name}.factor")
        return [*result, ("rope_scaling", True, name), factor]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys."""
        scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3}
        hf = {"rope_theta": float(model.rotary_base), "rope_scaling": scaling if model.rope_scaling else None}
        return hf if model.rotary_percent == 1.0 else {**hf, "partial_rotary_factor": model.rotary_percent}


class LatentRotary:
    """Rotary positions of multi-latent attention, perhaps with YaRN."""

    def read(self, hf: dict[str, Any]) -> list[Said]:
        """Return base and YaRN's factors."""
        name, rope, base = _stated(hf, 10000.0)
        kind = _kind(rope)
        if kind == "default":
            return [base, ("rope_type", "rope", name), ("rotary_scaling_factor", 1.0, name)]
        if kind != "yarn":
            raise UserError(f"config.json: {name} of type {kind} is not supported (supported: default, yarn)")
        _check(name, {"beta_fast": 32, "beta_slow": 1, **rope}, _YARN)
        _check(name, {"attention_factor": None, "truncate": True, **rope}, {"attention_factor": None, "truncate": True})
        mscale, whole = rope.get("mscale"), rope.get("mscale_all_dim")
        if not (mscale and whole):
            # transformers then leaves mscale out, other readers of config.json do not.
            if mscale not in (None, 1) or whole not in (None, 0):
                raise UserError(
                    f"config.json: {name}.mscale = {mscale} with mscale_all_dim = {whole} is not supported (supported: "
                    "both above 0, or neither)"
                )
            mscale, whole = 1.0, 0.0
        return [
            base,
            ("rope_type", "yarn", name),
            ("rotary_scaling_factor", _factor(name, rope), f"{name}.factor"),
            ("mscale", mscale, f"{name}.mscale"),
            ("mscale_all_dim", whole, f"{name}.mscale_all_dim"),
        ]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys."""
        scales = {"mscale": model.mscale, "mscale_all_dim": model.mscale_all_dim}
        yarn = {"rope_type": "yarn", "factor": model.rotary_scaling_factor, **_YARN, **scales}
        return {
            "rope_theta": float(model.rotary_base),
            "rope_scaling": yarn if model.rope_type == "yarn" else None,
        }


def _stated(hf: dict[str, Any], base: float) -> tuple[str, dict[str, Any], Said]:
    name = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope: dict[str, Any] = hf.get(name) or {}
    return name, rope, ("rotary_base", rope.get("rope_theta", hf.get("rope_theta", base)), "rope_theta")


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _factor(name: str, rope: dict[str, Any]) -> Any:
    if rope.get("factor") is None:
        raise UserError(f"config.json does not state {name}.factor")
    return rope["factor"]


def _check(name: str, rope: dict[str, Any], supported: dict[str, Any]) -> None:
    for key, value in supported.items():
        if rope.get(key) != value:
            raise UserError(f"config.json: {name}.{key} = {rope.get(key)} is not supported (supported: {value})")
