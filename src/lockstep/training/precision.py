"""Precision: weight dtype, FP32 main weights and gradients beside low-precision ones, loss scaling."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.config.training import MixedPrecisionConfig
from lockstep.models import GPTModel
from lockstep.parallel.buckets import GradientBuckets, Reduction
from lockstep.parallel.mixed import put


def params_dtype(config: ConfigContainer) -> torch.dtype:
    """Return the dtype of the model's weights and activations."""
    precision = config.mixed_precision
    if precision.bf16:
        return torch.bfloat16
    return torch.float16 if precision.fp16 else torch.float32


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model computes in: that of its weights, or what it says where they have more digits."""
    return model.dtype if isinstance(model, GPTModel) else next(model.parameters()).dtype


class MainWeights:
    """The FP32 weights an optimizer updates, and the gradients summed over micro-batches and processes.

    An FP32 or FP64 model is its own main weights, and its gradients have its dtype. For a low-precision model they are
    FP32 copies; its gradients are summed in ``grad_dtype``.
    """

    sharded = False

    def __init__(self, model: nn.Module, grad_dtype: torch.dtype, reduction: Reduction | None = None) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.model_params = [p for _, p in named]
        dtype = self.model_params[0].dtype
        assert all(p.dtype == dtype for p in self.model_params), "all weights have one dtype"
        self._gradients = GradientBuckets(
            named, grad_dtype if _is_low(dtype) else dtype, reduction or Reduction(), self.sharded
        )
        self._build_main()

    def _build_main(self) -> None:
        """Set the main weights; for each the name and shape of its parameter, and which elements it has (None: all)."""
        self.main_names = self.names
        self.main_spans: list[tuple[int, int] | None] = [None] * len(self.names)
        self.main_shapes = [p.shape for p in self.model_params]
        self.main_params = [_main_copy(p) if _is_low(p.dtype) else p for p in self.model_params]

    @property
    def copies(self) -> bool:
        """Whether the main weights have more digits than the model's."""
        return any(_is_low(p.dtype) for p in self.model_params)

    def start_step(self, micro_batches: int | None = None) -> None:
        """Forget the gradients of the step before; ``micro_batches`` are the backward passes to come, where known."""
        self._gradients.start_step(micro_batches)

    @property
    def gradients(self) -> GradientBuckets:
        """Where gradients are added up."""
        return self._gradients

    def collect_grads(self) -> list[torch.Tensor]:
        """Return what the backward passes left for every parameter, before it is added up over processes."""
        return self._gradients.collected()

    def hand_over(self) -> list[torch.Tensor]:
        """Return the sum of the gradients of every main weight, in the dtype they were added up in."""
        return self._gradients.finish()

    def wait(self) -> None:
        """Wait until the model has its weights; a GPU waits, not the host."""

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the main weights to the model's dtype."""
        for main, param in zip(self.main_params, self.model_params, strict=True):
            if main is not param:
                put(param, main)

    @torch.no_grad()
    def copy_from_model(self) -> None:
        """Set the main weights to the model's."""
        for main, param in zip(self.main_params, self.model_params, strict=True):
            if main is not param:
                main.copy_(param)


def _is_low(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _main_copy(param: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(param.detach().float())


class LossScaler(Protocol):
    """Factor on the loss that keeps small FP16 gradients above zero."""

    scale: float

    def update(self, overflow: bool) -> None:
        """Adjust the scale after a step whose gradients did or did not overflow."""

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs to scale on alike."""

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue where ``state_dict`` was taken."""


class ConstantLossScaler:
    """A loss scale that never changes."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def update(self, overflow: bool) -> None:
        """Change nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return nothing: the scale is a setting."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Keep the scale that was set."""


class DynamicLossScaler:
    """A loss scale that halves on overflows and doubles after ``window`` steps in a row without one.

    ``hysteresis`` overflows are needed before the scale halves; a doubling restores the tolerance.
    """

    growth_factor = 2.0
    backoff_factor = 0.5

    def __init__(self, initial: float, minimum: float, window: int, hysteresis: int) -> None:
        self.scale = initial
        self._minimum = minimum
        self._window = window
        self._hysteresis = hysteresis
        self._tolerance = hysteresis
        self._clean_steps = 0

    def update(self, overflow: bool) -> None:
        """Adjust the scale after a step whose gradients did or did not overflow."""
        if overflow:
            self._clean_steps = 0
            self._tolerance -= 1
            if self._tolerance <= 0:
                self.scale = max(self.scale * self.backoff_factor, self._minimum)
            return
        self._clean_steps += 1
        if self._clean_steps == self._window:
            self._clean_steps = 0
            self._tolerance = self._hysteresis
            self.scale *= self.growth_factor

    def state_dict(self) -> dict[str, float]:
        """Return scale, overflows still tolerated and steps since the last one."""
        return {"scale": self.scale, "tolerance": self._tolerance, "clean_steps": self._clean_steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue where ``state_dict`` was taken; the state of a constant scale changes nothing."""
        if state:
            self.scale = float(state["scale"])
            self._tolerance = int(state["tolerance"])
            self._clean_steps = int(state["clean_steps"])


def build_loss_scaler(precision: MixedPrecisionConfig) -> LossScaler | None:
    """Return the loss scaler a precision needs; None for FP32, and for BF16 without a static scale."""
    if precision.loss_scale is not None and (precision.fp16 or precision.bf16):
        return ConstantLossScaler(precision.loss_scale)
    if not precision.fp16:
        return None
    return DynamicLossScaler(
        initial=precision.initial_loss_scale,
        minimum=precision.min_loss_scale,
        window=int(precision.loss_scale_window),
        hysteresis=precision.hysteresis,
    )
