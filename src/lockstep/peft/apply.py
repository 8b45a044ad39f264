"""Adapters on a model of one process: which linears get them, their initial values; everything else is frozen."""

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lockstep.config.experts import has_whole_experts
from lockstep.config.model import ModelConfig
from lockstep.config.peft import PEFTConfig
from lockstep.errors import UserError, nearest
from lockstep.models import DropoutStreams, GPTModel
from lockstep.models.attention import SelfAttention
from lockstep.models.dropout import stream_seed
from lockstep.models.layers import Linear, required
from lockstep.models.moe import Experts
from lockstep.peft.adapter import Adapter, Rows, Settings

CANONICAL = {
    "linear_qkv": ("linear_q", "linear_k", "linear_v"),
    "linear_fc1": ("linear_fc1_gate", "linear_fc1_up"),
}
"""Linears that are several of Hugging Face's, and the names of these: each may get an adapter of its own."""

_ADAPTER = ".adapter."
_NORMAL_STD = 0.2  # of Megatron Bridge


def is_adapter(name: str) -> bool:
    """Tell whether a parameter is one of an adapter."""
    return _ADAPTER in name


def is_magnitude(name: str) -> bool:
    """Tell whether a parameter holds the magnitudes of DoRA."""
    return is_adapter(name) and name.endswith(".magnitude")


def weight_of(name: str) -> str:
    """Return the name of the weight that a parameter of an adapter belongs to; that of shared ones is of no weight."""
    return name.partition(_ADAPTER)[0] + ".weight"


def add_adapters(model: GPTModel, peft: PEFTConfig) -> None:
    """Give the linears that a configuration names adapters, in place, and freeze all other weights.

    The model is whole and may be on the meta device; nothing changes without a scheme.

    Raises:
        UserError: a name or pattern is of no linear, or a linear would get two adapters for the same outputs.
    """
    if peft.scheme is None:
        return
    model.requires_grad_(False)
    settings = Settings(
        peft.dim, peft.alpha / peft.dim, peft.dropout, peft.dropout_position == "pre", peft.scheme == "dora"
    )
    for name, names in _targets(model, peft).items():
        owner, found = model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)
        assert isinstance(found, Linear), "only linears are targets"
        _check_experts(name, peft, model.config)
        rows = _rows(name.rpartition(".")[2], owner, found, names, model.config)
        outputs, inputs = found.weight.shape
        assert sum(rows.sizes) == outputs, "the rows are those of the linear"
        made = Adapter(inputs, rows, names, settings, dtype=model.dtype, device=found.weight.device)
        holder = _shared_holder(model, name) if peft.share_expert_adapters else None
        if holder is None:
            found.adapter = made
        elif holder.adapter is None:
            holder.adapter = made


def _check_experts(name: str, peft: PEFTConfig, model: ModelConfig) -> None:
    """Refuse what adapters of experts cannot do.

    Raises:
        UserError: names it.
    """
    if ".local_experts." not in name:
        return
    remedy = "exclude them with peft.exclude_modules=['*.local_experts.*']"
    if has_whole_experts(model):
        raise UserError(
            "model.expert_tensor_parallel_size = 1 with tensor parallelism: whole experts get no adapters; drop it, or "
            f"{remedy}"
        )
    if peft.dropout > 0:
        raise UserError(f"peft.dropout = {peft.dropout}: adapters of experts have no dropout; set it to 0, or {remedy}")
    if peft.scheme == "dora" and peft.share_expert_adapters:
        raise UserError(
            "peft.scheme = dora: experts that share an adapter have no magnitudes; set "
            f"peft.share_expert_adapters=false, or {remedy}"
        )


def _shared_holder(model: GPTModel, name: str) -> "SharedAdapter | None":
    """Return where the one adapter for a linear of all experts is; None for other linears."""
    path, _, rest = name.partition(".local_experts.")
    if not rest:
        return None
    experts = model.get_submodule(path)
    assert isinstance(experts, Experts), "local experts are part of experts"
    leaf = rest.partition(".")[2]
    if getattr(experts, leaf) is None:
        setattr(experts, leaf, SharedAdapter())
    holder = getattr(experts, leaf)
    assert isinstance(holder, SharedAdapter), "just made"
    return holder


class SharedAdapter(nn.Module):
    """Holds the adapter of one linear of all experts."""

    adapter: Adapter | None

    def __init__(self) -> None:
        super().__init__()
        self.adapter = None

    def forward(self, x: Tensor) -> Tensor:
        """Return what it adds [r, o] for rows x [r, i] of any experts."""
        assert self.adapter is not None, "made for it"
        return self.adapter.added(x)


def _targets(model: GPTModel, peft: PEFTConfig) -> dict[str, list[str]]:
    """Return the linears that get adapters, by full name, each with the names of the outputs that get one."""
    linears = _linears(model)
    gated = model.config.gated_linear_unit
    found: dict[str, list[str]] = {}
    excluded = {pair for pattern in peft.exclude_modules for pair in _matching(pattern, linears, gated)}
    for pattern in peft.target_modules:
        for linear, output in _matching(pattern, linears, gated):
            fused = linear.rpartition(".")[2]
            if (linear, output) not in excluded and (linear, fused) not in excluded:
                found.setdefault(linear, [])
                if output not in found[linear]:
                    found[linear].append(output)
    for linear, outputs in found.items():
        fused = linear.rpartition(".")[2]
        if fused in outputs and len(outputs) > 1:
            raise UserError(
                f"peft.target_modules gives {linear} two adapters: {', '.join(outputs)}; name one or the other"
            )
    if not found:
        raise UserError("peft.exclude_modules leaves no linear of peft.target_modules; exclude fewer")
    return found


def _matching(pattern: str, linears: list[str], gated: bool) -> list[tuple[str, str]]:
    """Return linears by full name, with the name of the outputs that a name or pattern is of.

    Raises:
        UserError: there is none.
    """
    path, dot, leaf = pattern.rpartition(".")
    fused = next((name for name, parts in CANONICAL.items() if leaf in parts), leaf)
    matched = []
    if fused == leaf or gated or fused != "linear_fc1":
        whole = f"{path}{dot}{fused}"
        matched = [name for name in linears if name.rpartition(".")[2] == whole or fnmatchcase(name, whole)]
    if not matched:
        known = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
        parts = [part for name in known for part in CANONICAL.get(name, ()) if gated or name != "linear_fc1"]
        raise UserError(
            f"peft: {pattern} is no linear of this model.{nearest(pattern, [*known, *parts])} "
            f"There are {', '.join([*known, *parts])}"
        )
    return [(name, leaf if fused != leaf else name.rpartition(".")[2]) for name in matched]


def _rows(leaf: str, owner: nn.Module, found: Linear, names: list[str], config: ModelConfig) -> Rows:
    """Return whose output each row of a linear is, as its adapters see it."""
    if names == [leaf]:
        return Rows((leaf,), (len(found.weight),))
    parts = CANONICAL[leaf]
    if leaf == "linear_qkv":
        assert isinstance(owner, SelfAttention), "only plain attention has one projection for all"
        key = owner.groups * owner.head_dim
        return Rows(parts, (owner.heads * owner.head_dim, key, key), owner.groups)
    return Rows(parts, (len(found.weight) // 2,) * 2)


def linears_of(config: ModelConfig) -> list[str]:
    """Return the linears of a model that can have adapters, by full name."""
    return _linears(GPTModel(config, dtype=torch.float32, device=torch.device("meta")))


def _linears(model: GPTModel) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, Linear) and name.startswith("decoder.")]


def adapter_names(model: GPTModel) -> dict[str, tuple[int, ...]]:
    """Return the parameters of the adapters of a model with their shapes."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if is_adapter(name)}


def adapters(model: nn.Module) -> Iterator[Adapter]:
    """Yield the adapters of a model."""
    return (module for module in model.modules() if isinstance(module, Adapter))


def draw_from(model: nn.Module, streams: DropoutStreams) -> None:
    """Have the adapters of a model draw their dropout masks from ``streams``."""
    for adapter in adapters(model):
        adapter.streams = streams


def whole_adapters(config: ModelConfig, peft: PEFTConfig) -> GPTModel:
    """Return the whole model with its adapters on the meta device."""
    model = GPTModel(config, dtype=torch.float32, device=torch.device("meta"))
    add_adapters(model, peft)
    return model


@torch.no_grad()
def initial_adapters(
    config: ModelConfig, peft: PEFTConfig, seed: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and initial value of every parameter of the adapters of the whole model.

    Each is drawn from a generator of its own on the CPU, seeded with its name: no layout and no other parameter changes
    it. Magnitudes are one until the weights that they belong to are known.
    """
    if peft.scheme is None:
        return
    for name, parameter in whole_adapters(config, peft).named_parameters():
        if is_adapter(name):
            yield name, initial_value(name, parameter.shape, peft, seed).to(device=device, dtype=dtype)


def initial_value(name: str, shape: torch.Size, peft: PEFTConfig, seed: int) -> Tensor:
    """Return the initial value of one parameter of an adapter, in float32 on the CPU."""
    if is_magnitude(name):
        return torch.ones(shape)
    method = peft.lora_A_init_method if name.endswith("linear_in.weight") else peft.lora_B_init_method
    generator = torch.Generator().manual_seed(stream_seed(seed, name))
    value = torch.zeros(shape)
    if method == "xavier":
        value.normal_(0.0, math.sqrt(2.0 / (shape[0] + shape[1])), generator=generator)
    elif method == "kaiming":
        bound = 1.0 / math.sqrt(required(shape[1]))
        value.uniform_(-bound, bound, generator=generator)
    elif method == "normal":
        value.normal_(0.0, _NORMAL_STD, generator=generator)
    return value
