"""Rotary position embedding.

Shape legend: b batch, s sequence, n heads, d head dim, r rotated channels of a head.
"""

import math

import torch
from torch import Tensor

from lockstep.config.model import ModelConfig

# Llama 3.1's scaling: wavelengths the original context holds more than four times stay, those it does not hold once
# are stretched by the factor, and between the two the frequency is interpolated.
_ORIGINAL_CONTEXT = 8192
_LOW_FREQUENCY_FACTOR = 1.0
_HIGH_FREQUENCY_FACTOR = 4.0

# YaRN as Megatron-core has it in multi-latent attention: channels that turn more than 32 times within the original
# context keep their frequency, those that turn less than once have it divided by the factor.
_YARN_ORIGINAL_CONTEXT = 4096
_YARN_MOST_TURNS = 32.0
_YARN_FEWEST_TURNS = 1.0


def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Return the rotation per position in radians, float32 [r / 2]."""
    assert config.kv_channels is not None
    channels = config.kv_channels
    if config.rotary_percent < 1.0:
        channels = int(channels * config.rotary_percent)
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    frequencies = 1.0 / (config.rotary_base**exponents)
    return scaled_frequencies(frequencies, config.rope_scaling_factor) if config.rope_scaling else frequencies


def scaled_frequencies(frequencies: Tensor, factor: float) -> Tensor:
    """Return frequencies stretched for long contexts as Llama 3.1 does."""
    wavelengths = 2 * math.pi / frequencies
    periods = _ORIGINAL_CONTEXT / wavelengths
    smooth = (periods - _LOW_FREQUENCY_FACTOR) / (_HIGH_FREQUENCY_FACTOR - _LOW_FREQUENCY_FACTOR)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = torch.where(periods < _LOW_FREQUENCY_FACTOR, frequencies / factor, between)
    return torch.where(periods > _HIGH_FREQUENCY_FACTOR, frequencies, stretched)


def rotary_cos_sin(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [..., s, 1, r] for int64 positions [..., s], computed in float32, rounded to `dtype`."""
    device, positions = positions.device, positions.float()
    if config.seq_len_interpolation_factor is not None:
        positions = positions * (1 / config.seq_len_interpolation_factor)
    angles = positions[..., None] * inverse_frequencies(config, device)
    angles = angles.repeat_interleave(2, dim=-1) if config.rotary_interleaved else torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype)[..., None, :], angles.sin().to(dtype)[..., None, :]


def latent_cos_sin(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the same for multi-latent attention."""
    channels, yarn = config.qk_pos_emb_head_dim, config.rope_type == "yarn"
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
    turns = config.rotary_base**exponents
    frequencies = _yarn_frequencies(turns, config.rotary_base, config.rotary_scaling_factor) if yarn else 1.0 / turns
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    size = _yarn_mscale(config, config.mscale) / _yarn_mscale(config, config.mscale_all_dim) if yarn else 1.0
    return (angles.cos() * size).to(dtype)[..., None, :], (angles.sin() * size).to(dtype)[..., None, :]


def latent_score_scale(config: ModelConfig) -> float:
    """Return the factor on the scores of multi-latent attention."""
    mscale = _yarn_mscale(config, config.mscale_all_dim)
    return mscale * mscale / math.sqrt(config.qk_head_dim + config.qk_pos_emb_head_dim)


def _yarn_mscale(config: ModelConfig, mscale: float) -> float:
    """Return how much a longer context sharpens attention."""
    factor = config.rotary_scaling_factor
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_frequencies(turns: Tensor, base: int, factor: float) -> Tensor:
    """Return frequencies [r / 2]; between the channels that stay and those that are stretched a ramp mixes the two."""
    first, last = (
        2 * len(turns) * math.log(_YARN_ORIGINAL_CONTEXT / (number * 2 * math.pi)) / (2 * math.log(base))
        for number in (_YARN_MOST_TURNS, _YARN_FEWEST_TURNS)
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), 2 * len(turns) - 1)
    steps = torch.arange(len(turns), dtype=torch.float32, device=turns.device)
    kept = 1.0 - ((steps - low) / (high - low or 0.001)).clamp(0, 1)
    return 1.0 / (factor * turns) * (1 - kept) + 1.0 / turns * kept


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first r channels of x [b, s, n, d]; every product and the sum are rounded to the dtype of x."""
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = rotated * cos + _quarter_turn(rotated, interleaved) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
