"""The logits of both models of the same weights: in float32, in bfloat16, and where they part if they do.

Shape legend: b batch, s sequence, v vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.config.model import ModelConfig
from lockstep.errors import UserError
from lockstep.hf.checkpoint import Checkpoint
from lockstep.hf.families import Family, family_of
from lockstep.hf.folder import Weights
from lockstep.hf.rules import listed
from lockstep.hf.settings import vocabulary
from lockstep.models import GPTModel
from lockstep.models.init import fill

TOLERANCE = 1e-5
_SEED = 1234
_USUAL = 0.9
_BLOCKS = {"self_attention": "attention", "mlp": "MLP"}


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was compared, what came out, and whether it is as it should be."""

    what: str
    result: str
    same: bool


@dataclass(frozen=True)
class _Sides:
    """Both models, built when asked for, one in memory at a time; ``ids`` [b, s] is what they are asked about."""

    weights: Weights
    checkpoint: Checkpoint
    ids: Tensor

    @property
    def family(self) -> Family:
        return family_of(self.weights.folder.config)

    @torch.no_grad()
    def theirs(self, dtype: torch.dtype, watch: Callable[[nn.Module], None] | None = None) -> Tensor:
        """Return the logits [b, s, v] of transformers, in float32; ``watch`` gets the model before."""
        model = transformers_model(self.weights.folder.path, dtype)
        if watch is not None:
            watch(model)
        logits: Tensor = model(self.ids).logits
        return logits.float()

    @torch.no_grad()
    def ours(self, dtype: torch.dtype, watch: Callable[[nn.Module], None] | None = None) -> Tensor:
        """Return the logits [b, s, v] of Lockstep for real tokens, in float32."""
        model = build(self.checkpoint.model, self.checkpoint.whole, dtype)
        if watch is not None:
            watch(model)
        logits = model(self.ids, torch.arange(self.ids.shape[1]).expand_as(self.ids))
        return logits[..., : vocabulary(self.weights.folder.config)].float()


def compare_logits(weights: Weights, checkpoint: Checkpoint, tokens: int) -> Iterator[Finding]:
    """Compare the models on two samples of so many random tokens: logits in float32, next tokens in both formats."""
    model = checkpoint.model
    assert model.max_position_embeddings is not None, "a saved model has positions"
    shape = (2, min(tokens, model.max_position_embeddings))
    generator = torch.Generator().manual_seed(_SEED)
    sides = _Sides(weights, checkpoint, torch.randint(0, vocabulary(weights.folder.config), shape, generator=generator))
    theirs, ours = sides.theirs(torch.float32), sides.ours(torch.float32)
    relative = _relative(ours, theirs)
    advice = "" if relative <= TOLERANCE else f": the weights are the same, but {_where_they_part(sides)}"
    yield Finding(
        "logits in float32", f"relative difference {relative:.1e} (limit {TOLERANCE}){advice}", relative <= TOLERANCE
    )
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    count = sides.ids.numel()
    yield Finding("next token in float32", f"the same for {same} of {count} positions", same == count)
    yield next_tokens(theirs, sides.theirs(torch.bfloat16), sides.ours(torch.bfloat16))


def next_tokens(exact: Tensor, theirs: Tensor, ours: Tensor) -> Finding:
    """Judge the next tokens of two models in bfloat16 by the logits [b, s, v] of one of them in float32.

    Where the two best logits are closer than twice what rounding moves logits by, it may choose either. What it moves
    them by is measured on transformers' own model: the largest change at the position, or that which nine of ten
    positions stay below where it is more. At all other positions both have to choose the same token.
    """
    moves = (theirs - exact).abs().amax(dim=-1)
    usual = moves.flatten().quantile(_USUAL)
    best = exact.topk(2, dim=-1).values
    decided = best[..., 0] - best[..., 1] > 2 * moves.clamp(min=usual)
    same = ours.argmax(-1) == theirs.argmax(-1)
    count, agreeing = int(decided.sum()), int((same & decided).sum())
    rest, others = int((~decided).sum()), int((same & ~decided).sum())
    what, not_decided = "next token in bfloat16", f"that rounding (about {usual:.2g}) cannot decide"
    if not count:
        return Finding(what, f"there is no position {not_decided}; give more --tokens", False)
    text = f"the same for {agreeing} of {count} positions {not_decided}, and for {others} of the other {rest}"
    return Finding(what, text, agreeing == count)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def _where_they_part(sides: _Sides) -> str:
    """Name the first block whose output differs, and its tensors."""
    theirs, ours = _Outputs(), _Outputs()
    blocks = sides.family.blocks
    layers = range(sides.checkpoint.model.num_layers or 0)
    sides.theirs(torch.float32, lambda model: theirs.watch(model, blocks, layers))
    sides.ours(
        torch.float32, lambda model: ours.watch(model, {n: f"decoder.layers.{{layer}}.{n}" for n in blocks}, layers)
    )
    if len(theirs.found) < len(ours.found):
        return "the models compute something else"
    for layer, block in ours.found:
        if not _alike(ours.found[layer, block], theirs.found[layer, block]):
            if layer < 0:
                return "the embeddings differ"
            inside = f"decoder.layers.{layer}.{block}."
            tensors = [t for name, e in sides.weights.mapping.items() if name.startswith(inside) for t in e.theirs]
            return (
                f"the models part in the {_BLOCKS[block]} of layer {layer}: either the places of {listed(tensors)} are "
                "mistaken, or one of the two computes something else"
            )
    return "the models part after the last layer, in the final norm or the output layer"


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and _relative(ours, theirs) <= TOLERANCE


class _Outputs:
    """What blocks returned in a forward pass, by layer and block, in their order; layer -1 is what comes before."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str], Tensor] = {}

    def watch(self, model: nn.Module, blocks: dict[str, str], layers: range) -> None:
        """Note the input of the first layer and the output of some modules of every layer."""
        there = {name for name, _ in model.named_modules()}
        for layer in layers:
            for block, pattern in blocks.items():
                name = pattern.format(layer=layer)
                if name not in there:  # another version of transformers may call it otherwise
                    continue
                if layer == 0 and block == next(iter(blocks)):
                    model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(self._note_input)
                model.get_submodule(name).register_forward_hook(self._noting(layer, block))

    def _note_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.found[-1, "embedding"] = inputs[0]

    def _noting(self, layer: int, block: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            first, second = (*output, None)[:2] if isinstance(output, tuple) else (output, None)
            # Lockstep's blocks return their bias beside the output.
            biased = isinstance(second, Tensor) and second.ndim == 1
            self.found[layer, block] = first + second if biased else first

        return note


def transformers_model(path: Path, dtype: torch.dtype) -> Any:
    """Return the model of a folder as transformers loads it, without running code of the folder.

    Raises:
        UserError: it cannot.
    """
    import transformers

    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    except Exception as error:  # the library raises what its parts raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"transformers cannot load {path}: {reason}") from None


def build(model: ModelConfig, whole: Callable[[str], Tensor], dtype: torch.dtype = torch.float32) -> GPTModel:
    """Return a model of one process with weights that ``whole`` gives by name."""
    result = GPTModel(model, dtype=dtype, device=torch.device("meta"))
    names = [name for name, _ in result.named_parameters()]
    # Fused optimizers go through weights in the order of memory, so a transposed view will not do.
    fill(result, ((name, whole(name).to(dtype).contiguous()) for name in names))
    return result.eval()
