"""Bridge's mixed-precision presets, as fields of the tree."""

from typing import Any

from lockstep.errors import ConfigError, nearest

_PRESETS: dict[str, dict[str, Any]] = {
    "bf16_mixed": {
        "mixed_precision.bf16": True,
        "mixed_precision.fp16": False,
        "ddp.grad_reduce_in_fp32": True,
    },
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
    "bf16_with_fp8_current_scaling_mixed",
    "nemotron_h_bf16_with_fp8_current_scaling_mixed",
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
        ConfigError: unknown preset, or one of FP8 or FP4.
    """
    known = name.replace("-", "_")
    if known in _REFUSED:
        raise ConfigError(f"mixed_precision={name}: FP8 and FP4 are not supported yet; use bf16_mixed or fp16_mixed")
    if known not in _PRESETS:
        hint = nearest(known, [*_PRESETS, *_REFUSED])
        raise ConfigError(f"mixed_precision={name}: unknown preset; use bf16_mixed or fp16_mixed.{hint}")
    return _PRESETS[known]
