"""The section of adapters: small trained weights beside frozen ones (LoRA, DoRA)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lockstep.config.fields import opt
from lockstep.config.section import Section

if TYPE_CHECKING:
    from lockstep.config.container import ConfigContainer

Init = Literal["xavier", "kaiming", "normal", "zero"]


@dataclass(kw_only=True)
class PEFTConfig(Section):
    """Adapters; Megatron-LM has none, so the flags are Lockstep's own and the keys those of Megatron Bridge."""

    section_name: ClassVar[str] = "peft"

    scheme: Literal["lora", "dora"] | None = opt(
        None, "--peft-scheme", help="Train adapters of this kind and nothing else; unset: train all weights."
    )
    target_modules: list[str] = opt(
        ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        "--peft-target-modules",
        help="Linears that get adapters: names, or patterns of full names such as *.layers.0.*.linear_qkv.",
    )
    exclude_modules: list[str] = opt([], "--peft-exclude-modules", help="Linears that get none, likewise.")
    dim: int = opt(32, "--lora-dim", help="Rank of the adapters.")
    alpha: int = opt(32, "--lora-alpha", help="What an adapter adds is scaled by alpha / dim.")
    dropout: float = opt(0.0, "--lora-dropout", help="Dropout probability of adapters.")
    dropout_position: Literal["pre", "post"] = opt(
        "pre", "--lora-dropout-position", help="Drop elements of an adapter's input, or of its output."
    )
    lora_A_init_method: Init = opt(  # noqa: N815  # Bridge's name
        "xavier", "--lora-a-init-method", help="How the first matrix of an adapter is drawn."
    )
    lora_B_init_method: Init = opt(  # noqa: N815
        "zero", "--lora-b-init-method", help="How the second matrix of an adapter is drawn."
    )
    lora_dtype: str | None = opt(
        None, "--lora-dtype", refused="adapters have the dtype of the model, and FP32 main weights beside it"
    )
    share_expert_adapters: bool = opt(
        True,
        "--no-lora-share-expert-adapters",
        negated=True,
        help="One adapter for all experts of a layer instead of one for each.",
    )
    sequence_parallel_input_regather: bool = opt(
        False,
        "--lora-sequence-parallel-input-regather",
        holds="adapters work on the parts of the sequence and never keep it gathered",
        effect="speed",
    )
    a2a_experimental: bool = opt(False, "--lora-a2a-experimental", refused="this kind of exchange is not supported")
    normalize_moe_lora: bool = opt(
        False, "--lora-normalize-moe", refused="adapters of experts have the rank of all others"
    )
    experts_shared_outer_loras: bool = opt(
        False, "--lora-experts-shared-outer", refused="experts share whole adapters or none"
    )


def peft_problems(c: "ConfigContainer", name: Callable[[str], str]) -> Iterator[str]:
    """Yield what is wrong with the adapters that a resolved tree asks for; ``name`` spells a path as the user does."""
    p = c.peft
    if p.scheme is None:
        for info, value, _ in p.items():
            if value != info.default:
                yield f"{name(info.path)} has no effect without {name('peft.scheme')}; give lora or dora, or drop this"
        return
    if c.checkpoint.pretrained_checkpoint is None:
        yield (
            f"{name('peft.scheme')} = {p.scheme} needs {name('checkpoint.pretrained_checkpoint')}: the checkpoint or "
            "Hugging Face folder whose weights the adapters are for"
        )
    for path in ("peft.dim", "peft.alpha"):
        if c.get(path) < 1:
            yield f"{name(path)} = {c.get(path)}: give 1 or more"
    if not 0 <= p.dropout < 1:
        yield f"{name('peft.dropout')} = {p.dropout}: give a value from 0 up to, but not including, 1"
    if c.model.moe_router_enable_expert_bias:
        yield (
            f"{name('model.moe_router_enable_expert_bias')}: the bias of experts moves while a model is trained, and "
            f"{name('peft.scheme')} = {p.scheme} freezes it; drop one"
        )
    if p.dropout > 0 and "shared_experts" in (c.model.recompute_modules or ()):
        yield (
            f"{name('peft.dropout')} = {p.dropout}: shared experts that are recomputed would drop other elements; "
            f"set it to 0, or drop shared_experts from {name('model.recompute_modules')}"
        )
    if not p.target_modules:
        yield f"{name('peft.target_modules')} is empty, so nothing would be trained; name some linears"
    if p.lora_A_init_method == p.lora_B_init_method == "zero":
        yield f"{name('peft.lora_A_init_method')} and {name('peft.lora_B_init_method')} = zero: neither would ever move"
