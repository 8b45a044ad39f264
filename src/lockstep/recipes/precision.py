"""Bridge's mixed-precision presets, as fields of the tree."""

from typing import Any

from lockstep.errors import ConfigError, nearest

_BF16 = {
    "mixed_precision.bf16": True,
    "mixed_precision.fp16": False,
    "ddp.grad_reduce_in_fp32": True,
}


def _current_scaling(layers: int) -> dict[str, Any]:
    """Return float8 in all but so many first and last layers; weights are gathered in BF16, where Bridge's are not."""
    return {
        **_BF16,
        "mixed_precision.fp8": "hybrid",
        "mixed_precision.fp8_recipe": "tensorwise",
        "mixed_precision.first_last_layers_bf16": True,
        "mixed_precision.num_layers_at_start_in_bf16": layers,
        "mixed_precision.num_layers_at_end_in_bf16": layers,
    }


_PRESETS: dict[str, dict[str, Any]] = {
    "bf16_mixed": _BF16,
    "bf16_with_fp8_current_scaling_mixed": _current_scaling(1),
    "nemotron_h_bf16_with_fp8_current_scaling_mixed": _current_scaling(2),
    "fp16_mixed": {
        "mixed_precision.bf16": False,
        "mixed_precision.fp16": True,
        "ddp.grad_reduce_in_fp32": False,
    },
}

_REFUSED = (
    "bf16_with_fp8_delayed_scaling_mixed",
    "fp16_with_fp8_delayed_scaling_mixed",
    "bf16_with_mxfp8_mixed",
    "fp16_with_mxfp8_mixed",
    "nanov2_bf16_with_fp8_current_scaling_mixed",
    "fp16_with_fp8_current_scaling_mixed",
    "bf16_with_fp8_subchannel_scaling_mixed",
    "fp16_with_fp8_subchannel_scaling_mixed",
    "bf16_with_nvfp4_mixed",
    "nemotron_3_super_bf16_with_nvfp4_mixed",
)


def preset(name: str) -> dict[str, Any]:
    """Return the fields that a mixed-precision preset sets; hyphens and underscores are one.

    Raises:
        ConfigError: unknown preset, or one of FP4 or of FP8 that is scaled in a way that is not supported.
    """
    known = name.replace("-", "_")
    if known in _REFUSED:
        raise ConfigError(
            f"mixed_precision={name} is not supported; use bf16_mixed, fp16_mixed or, of FP8, "
            "bf16_with_fp8_current_scaling_mixed"
        )
    if known not in _PRESETS:
        hint = nearest(known, [*_PRESETS, *_REFUSED])
        raise ConfigError(f"mixed_precision={name}: unknown preset; use bf16_mixed or fp16_mixed.{hint}")
    return _PRESETS[known]
