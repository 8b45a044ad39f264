"""Choice of what computes attention, for a model on a device."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.config.model import ModelConfig
from lockstep.errors import UserError
from lockstep.models.attention import Attention
from lockstep.models.flash4 import is_installed
from lockstep.models.kernels import Kernel, fused_attention
from lockstep.models.layers import required
from lockstep.models.mask import CausalMask
from lockstep.models.ops import given_gradient
from lockstep.training.precision import params_dtype

_NAMES: dict[Kernel, str] = {
    "explicit": "explicit scores",
    "cudnn": "cuDNN",
    "flash": "FlashAttention-2",
    "flash4": "FlashAttention-4",
    "sdpa": "scaled_dot_product_attention",
}
_IN_ORDER: tuple[Kernel, ...] = ("flash4", "cudnn", "flash")  # docs/performance.md has the measurement
_FLASH4_CAPABILITY = 9, 0  # of the GPUs that it was measured on
_FLASH4_WIDTHS = 64  # it was measured on heads of multiples of so many channels
_LONG = 2048  # tokens of a sequence below which compiling FlashAttention-4 costs more than it saves
_TRIAL_LENGTH = 128


@dataclass(frozen=True)
class Choice:
    """A kernel and why it was taken."""

    kernel: Kernel
    reason: str

    def __str__(self) -> str:
        return f"{_NAMES[self.kernel]} ({self.reason})"


def choose_attention(config: ConfigContainer, device: torch.device) -> Choice:
    """Return what `model.attention_backend` means on a device; the meta device stands for a GPU that has all kernels.

    `auto` is the same for the same configuration, device and packages. On a CPU it takes explicit scores. On a GPU it
    takes the first of FlashAttention-4, cuDNN's kernel and FlashAttention-2 that can do what is asked and runs on heads
    of these widths; explicit scores where none can: with attention dropout, whose masks do not depend on the layout,
    and outside of BF16 and FP16.

    Raises:
        UserError: a kernel that is named does not run here.
    """
    wanted, model, dtype = config.model.attention_backend, config.model, params_dtype(config)
    if wanted in ("local", "unfused"):
        return Choice("explicit", f"model.attention_backend={wanted}")
    if wanted != "auto":
        return _named(config, device)
    if device.type == "cpu":
        return Choice("explicit", "auto, on a CPU")
    if model.attention_dropout > 0:
        return Choice("explicit", "auto, with attention dropout")
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("explicit", f"auto, in {str(dtype).removeprefix('torch.')}")
    reasons = ["auto"]
    for kernel in _IN_ORDER:
        obstacle = _obstacle(kernel, config, device, named=False)
        if obstacle is None and _runs(kernel, *_widths(model), dtype, device):
            return Choice(kernel, "; ".join(reasons))
        reasons.append(f"{_NAMES[kernel]} {obstacle or 'does not take these heads'}")
    return Choice("explicit", "auto, no kernel takes these heads")


def _obstacle(kernel: Kernel, config: ConfigContainer, device: torch.device, named: bool) -> str | None:
    """Return why a kernel is not taken, after its name; None where it can do what is asked."""
    if kernel == "cudnn":
        obstacle = cudnn_obstacle(config)
        return None if obstacle is None else f"does not work {obstacle}"
    version = config.model.flash_attention_version
    if version not in (None, {"flash": 2, "flash4": 4}[kernel]):
        return f"is not what model.flash_attention_version={version} names"
    if kernel == "flash":
        return None
    if config.model.deterministic_mode:
        return "does not work in deterministic mode"
    if any(width % _FLASH4_WIDTHS for width in _widths(config.model)):
        return f"takes heads of {_FLASH4_WIDTHS}, 128, 192 or 256 channels"
    if not named and required(config.model.seq_length) < _LONG:
        return f"pays from sequences of {_LONG} tokens on"
    if not is_installed():
        return "is not installed"
    if device.type == "meta" or torch.cuda.get_device_capability(device) != _FLASH4_CAPABILITY:
        return "is not measured on this GPU"
    return None


def cudnn_obstacle(config: ConfigContainer) -> str | None:
    """Return what cuDNN's kernel cannot do of what is asked; None where it can do all."""
    if config.model.context_parallel_size > 1:
        return "with context parallelism"
    if keeps_documents_apart(config):
        return "with documents apart"
    if config.model.deterministic_mode:
        return "in deterministic mode"
    return None


def keeps_documents_apart(config: ConfigContainer) -> bool:
    """Tell whether batches say which tokens belong together."""
    dataset = config.dataset
    return dataset.reset_attention_mask or (dataset.sft and dataset.enable_offline_packing)


def use_attention(model: nn.Module, choice: Choice) -> None:
    """Have all attention of a model computed as chosen."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = choice.kernel


def _named(config: ConfigContainer, device: torch.device) -> Choice:
    model, dtype, version = config.model, params_dtype(config), config.model.flash_attention_version
    reason = f"model.attention_backend={model.attention_backend}"
    if device.type == "cpu":
        if model.attention_backend == "fused":
            raise UserError(f"{reason} is cuDNN's attention, which needs a GPU; use auto, flash or unfused on a CPU")
        return Choice("sdpa", reason)
    if dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"{reason} needs BF16 or FP16; use --bf16, or model.attention_backend=auto")
    if model.attention_backend == "fused":
        kernels: tuple[Kernel, ...] = ("cudnn",)
    else:
        kernels = ("flash4", "flash")
    problems: list[str] = []
    for kernel in kernels:
        obstacle = _obstacle(kernel, config, device, named=True)
        if obstacle is None and _runs(kernel, *_widths(model), dtype, device):
            return Choice(kernel, "; ".join([reason, *problems]))
        key, value = _widths(model)
        obstacle = obstacle or f"does not run on this GPU for heads of width {key} (values: {value})"
        problems.append(f"{_NAMES[kernel]} {obstacle}")
    remedy = "model.attention_backend=auto" if version is None else "model.flash_attention_version=null"
    raise UserError(f"{reason}: {'; '.join(problems)}; use {remedy}")


def _widths(model: ModelConfig) -> tuple[int, int]:
    """Return the width of a key and of a value."""
    if model.multi_latent_attention:
        return model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim
    width = required(model.kv_channels)
    return width, width


@cache
def _runs(kernel: Kernel, key_width: int, value_width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell by a trial whether a kernel runs forward and backward on heads of these widths.

    Raises:
        UserError: its package is there and cannot be imported.
    """
    if device.type == "meta":
        return True
    query, key, value = (
        torch.ones(1, _TRIAL_LENGTH, 2, width, dtype=dtype, device=device, requires_grad=True)
        for width in (key_width, key_width, value_width)
    )
    try:
        with torch.enable_grad():
            result = fused_attention(kernel, query, key, value, CausalMask(_TRIAL_LENGTH, device), None)
            given_gradient(result, torch.ones_like(result)).backward()
        torch.cuda.synchronize(device)
    except ImportError as error:
        raise UserError(
            f"{_NAMES[kernel]} cannot be imported ({error}); reinstall it with pip install 'lockstep-lm[flash4]', "
            "or give --flash-attention-version 2"
        ) from error
    except (RuntimeError, AssertionError):
        return False
    # All values are alike, so each result is that value.
    found = result.detach()
    return bool(torch.allclose(found, torch.ones_like(found), atol=0.05))
