"""Choice of what computes attention, for a model on a device."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.config.model import ModelConfig
from lockstep.errors import UserError
from lockstep.models.attention import Attention
from lockstep.models.kernels import Kernel, fused_attention
from lockstep.models.layers import required
from lockstep.models.mask import CausalMask
from lockstep.training.precision import params_dtype

_NAMES: dict[Kernel, str] = {
    "explicit": "explicit scores",
    "cudnn": "cuDNN",
    "flash": "FlashAttention",
    "sdpa": "scaled_dot_product_attention",
}
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

    `auto` is the same for the same configuration, device and PyTorch. On a CPU it takes explicit scores. On a GPU it
    takes the first of cuDNN's kernel and FlashAttention that can do what is asked and runs on heads of these widths;
    explicit scores where none can: with attention dropout, whose masks do not depend on the layout, and outside of
    BF16 and FP16.

    Raises:
        UserError: a kernel that is named does not run here.
    """
    wanted, model, dtype = config.model.attention_backend, config.model, params_dtype(config)
    if wanted in ("local", "unfused"):
        return Choice("explicit", f"model.attention_backend={wanted}")
    if wanted != "auto":
        return _named(wanted, model, dtype, device)
    if device.type == "cpu":
        return Choice("explicit", "auto, on a CPU")
    if model.attention_dropout > 0:
        return Choice("explicit", "auto, with attention dropout")
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("explicit", f"auto, in {str(dtype).removeprefix('torch.')}")
    obstacle = cudnn_obstacle(config)
    if obstacle is None and _runs("cudnn", *_widths(model), dtype, device):
        return Choice("cudnn", "auto")
    reason = f"auto, {obstacle or 'cuDNN does not take these heads'}"
    if _runs("flash", *_widths(model), dtype, device):
        return Choice("flash", reason)
    return Choice("explicit", "auto, no kernel takes these heads")


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


def _named(wanted: str, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Choice:
    reason = f"model.attention_backend={wanted}"
    if device.type == "cpu":
        if wanted == "fused":
            raise UserError(f"{reason} is cuDNN's attention, which needs a GPU; use auto, flash or unfused on a CPU")
        return Choice("sdpa", reason)
    kernel: Kernel = "cudnn" if wanted == "fused" else "flash"
    if dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"{reason} needs BF16 or FP16; use --bf16, or model.attention_backend=auto")
    if not _runs(kernel, *_widths(model), dtype, device):
        key, value = _widths(model)
        raise UserError(
            f"{reason}: {_NAMES[kernel]} does not run on this GPU for heads of width {key} (values: {value}); "
            "use model.attention_backend=auto"
        )
    return Choice(kernel, reason)


def _widths(model: ModelConfig) -> tuple[int, int]:
    """Return the width of a key and of a value."""
    if model.multi_latent_attention:
        return model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim
    width = required(model.kv_channels)
    return width, width


@cache
def _runs(kernel: Kernel, key_width: int, value_width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell by a trial whether a kernel runs forward and backward on heads of these widths."""
    if device.type == "meta":
        return True
    query, key, value = (
        torch.ones(1, _TRIAL_LENGTH, 2, width, dtype=dtype, device=device, requires_grad=True)
        for width in (key_width, key_width, value_width)
    )
    try:
        with torch.enable_grad():
            result = fused_attention(kernel, query, key, value, CausalMask(_TRIAL_LENGTH, device), None)
            result.backward(torch.ones_like(result))
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    # All values are alike, so each result is that value.
    found = result.detach()
    return bool(torch.allclose(found, torch.ones_like(found), atol=0.05))
