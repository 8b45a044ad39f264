"""A model of transformers as a side, under the names of Lockstep's parameters.

The names and layouts below are the lab's own, beside those that ``lockstep.hf`` converts by: a mistake in either shows
as weights or activations that differ.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.errors import UserError
from lockstep.lab.localise.reference import Note

_OURS = "decoder.layers.{0}"
_LLAMA = {
    "model.embed_tokens": "embedding.word_embeddings",
    "model.layers.{0}.input_layernorm": f"{_OURS}.input_layernorm",
    "model.layers.{0}.self_attn.q_proj": f"{_OURS}.self_attention.linear_qkv#0",
    "model.layers.{0}.self_attn.k_proj": f"{_OURS}.self_attention.linear_qkv#1",
    "model.layers.{0}.self_attn.v_proj": f"{_OURS}.self_attention.linear_qkv#2",
    "model.layers.{0}.self_attn.q_norm": f"{_OURS}.self_attention.q_layernorm",
    "model.layers.{0}.self_attn.k_norm": f"{_OURS}.self_attention.k_layernorm",
    "model.layers.{0}.self_attn.o_proj": f"{_OURS}.self_attention.linear_proj",
    "model.layers.{0}.post_attention_layernorm": f"{_OURS}.pre_mlp_layernorm",
    "model.layers.{0}.mlp.gate_proj": f"{_OURS}.mlp.linear_fc1#0",
    "model.layers.{0}.mlp.up_proj": f"{_OURS}.mlp.linear_fc1#1",
    "model.layers.{0}.mlp.down_proj": f"{_OURS}.mlp.linear_fc2",
    "model.norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
}
_GPT2 = {
    "transformer.wte": "embedding.word_embeddings",
    "transformer.wpe": "embedding.position_embeddings",
    "transformer.h.{0}.ln_1": f"{_OURS}.input_layernorm",
    "transformer.h.{0}.attn.c_attn": f"{_OURS}.self_attention.linear_qkv#all",
    "transformer.h.{0}.attn.c_proj": f"{_OURS}.self_attention.linear_proj",
    "transformer.h.{0}.ln_2": f"{_OURS}.pre_mlp_layernorm",
    "transformer.h.{0}.mlp.c_fc": f"{_OURS}.mlp.linear_fc1",
    "transformer.h.{0}.mlp.c_proj": f"{_OURS}.mlp.linear_fc2",
    "transformer.ln_f": "decoder.final_layernorm",
    "lm_head": "output_layer",
}
# Modules whose output a run shows under another name than that of their parameters.
_OUTPUTS = {
    "model.embed_tokens": "embedding",
    "transformer.drop": "embedding",
    "model.layers.{0}": _OURS,
    "transformer.h.{0}": _OURS,
    "model.layers.{0}.self_attn": f"{_OURS}.self_attention",
    "model.layers.{0}.mlp": f"{_OURS}.mlp",
}
_SHOWN = (
    "input_layernorm",
    "pre_mlp_layernorm",
    "final_layernorm",
    "q_layernorm",
    "k_layernorm",
    ".self_attention",
    ".mlp",
)
_FAMILIES = {"gpt2": _GPT2, "llama": _LLAMA, "qwen3": _LLAMA}

Build = Callable[[Mapping[str, Tensor], torch.dtype], nn.Module]


class TransformersDecoder:
    """A causal model of transformers; ``build`` returns it with given weights of ours, or with its own."""

    inner = "float32"  # norms, softmax and angles are float32 whatever the weights are

    def __init__(self, build: Build, title: str) -> None:
        self._build, self.title = build, title

    def load(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Take weights."""
        model: Any = self._build(weights, dtype)
        self._model = model.to(dtype).train()
        config: Any = self._model.config
        names = _FAMILIES.get(config.model_type)
        if names is None:
            raise UserError(
                f"the lab cannot align a model of type {config.model_type}; it knows {', '.join(_FAMILIES)}"
            )
        self._names, self._gpt2 = names, config.model_type == "gpt2"
        heads = config.num_attention_heads
        self._groups: int = getattr(config, "num_key_value_heads", None) or heads
        self._rows = {name: len(weight) for name, weight in weights.items()}
        self._tied = config.tie_word_embeddings

    def weights(self) -> dict[str, Tensor]:
        """Return its weights under our names."""
        return self._ours({name: p.detach() for name, p in self._model.named_parameters()})

    def gradients(self) -> dict[str, Tensor]:
        """Return what backward passes have left, and forget it."""
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self._model.named_parameters()}
        self._model.zero_grad(set_to_none=True)
        return self._ours(found)

    def _ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in theirs.items():
            module, _, kind = name.rpartition(".")
            target = _renamed(module, self._names)
            if target is None:
                raise UserError(f"the lab cannot align the tensor {name} of {self.title}")
            if self._gpt2 and tensor.dim() == 2 and ".h." in name:
                tensor = tensor.t()
            ours, _, part = target.partition("#")
            parts.setdefault(f"{ours}.{kind}", {})[part] = tensor
        return {name: self._padded(name, self._joined(name, found)) for name, found in parts.items()}

    def _joined(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Put the parts of a parameter together, along dimension 0."""
        if "all" in parts:
            return self._by_group(*parts["all"].chunk(3))
        if "0" not in parts:
            return parts[""]
        if ".linear_qkv." in name:
            return self._by_group(parts["0"], parts["1"], parts["2"])
        return torch.cat([parts["0"], parts["1"]])

    def _by_group(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return for every group the rows of its query heads, of its key and of its value."""
        queries, keys, values = (each.chunk(self._groups) for each in (query, key, value))
        return torch.cat([row for group in zip(queries, keys, values, strict=True) for row in group])

    def _padded(self, name: str, tensor: Tensor) -> Tensor:
        """Add rows of zeros up to our vocabulary."""
        rows = self._rows.get(name, len(tensor))
        if not name.endswith(("word_embeddings.weight", "output_layer.weight")) or rows <= len(tensor):
            return tensor
        return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])

    def logits(self, tokens: Tensor, positions: Tensor, documents: Tensor | None, note: Note) -> Tensor:
        """Return logits [b, s, v]."""
        settings: dict[str, Any] = {"use_cache": False}
        if documents is not None:
            length = tokens.shape[1]
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1) | (
                documents[:, :, None] != documents[:, None]
            )
            kind = self._model.dtype
            settings["attention_mask"] = torch.zeros(hidden.shape, dtype=kind).masked_fill(
                hidden, torch.finfo(kind).min
            )[:, None]
        settings["position_ids"] = positions if self._gpt2 else torch.arange(tokens.shape[1]).expand_as(positions)
        joined: dict[str, dict[str, Tensor]] = {}
        handles = []
        for name, module in self._model.named_modules():
            target = _renamed(name, _OUTPUTS) or _renamed(name, self._names)
            if target is not None:
                hook = partial(self._note, target, note, joined)
                handles.append(module.register_forward_hook(hook))
        try:
            return self._model(input_ids=tokens, **settings).logits
        finally:
            for handle in handles:
                handle.remove()

    def _note(
        self, target: str, note: Note, joined: dict[str, dict[str, Tensor]], module: nn.Module, _: Any, output: Any
    ) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        ours, _, part = target.partition("#")
        if ours.endswith("linear_qkv"):
            found = joined.setdefault(ours, {})
            found[part] = tensor.movedim(-1, 0)
            if part == "all" or len(found) == 3:
                note(ours, self._joined(f"{ours}.weight", found).movedim(0, -1))
        elif ours == "embedding" or ours.endswith(_SHOWN) or re.fullmatch(r"decoder\.layers\.\d+", ours):
            note(ours, tensor)


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    layer = re.search(r"\.(\d+)(?=\.|$)", name)
    number = layer[1] if layer else ""
    pattern = name if layer is None else f"{name[: layer.start(1)]}{{0}}{name[layer.end(1) :]}"
    target = names.get(pattern)
    return None if target is None else target.format(number)


def from_folder(folder: Path) -> TransformersDecoder:
    """Return the model in a Hugging Face folder, with its own weights.

    Raises:
        UserError: transformers cannot load it.
    """
    return TransformersDecoder(lambda _, dtype: _loaded(folder, dtype), f"transformers with {folder}")


def _loaded(folder: Path, dtype: torch.dtype) -> nn.Module:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # the library raises what its parts raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"transformers cannot load {folder}: {reason}") from None
    return model


def from_conversion(model: Mapping[str, Any], scratch: Path) -> TransformersDecoder:
    """Return the model that Lockstep's conversion makes of the weights of a run, by way of a folder in ``scratch``.

    Raises:
        UserError: no family of transformers computes what the run does.
    """
    return TransformersDecoder(partial(_converted, model, scratch), "transformers with converted weights")


def _converted(model: Mapping[str, Any], scratch: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    from lockstep.hf.convert import target_of
    from lockstep.hf.folder import split_all, write_folder
    from lockstep.hf.rules import mapped
    from lockstep.hf.settings import vocabulary
    from lockstep.lab.localise.worker import config_of

    config = config_of({"model": model}).model
    target = target_of(config, None)
    mapping = mapped(target.family.rules, config, vocabulary(target.config))
    sizes = {
        name: dtype.itemsize * torch.Size(shape).numel()
        for entry in mapping.values()
        for name, shape in entry.theirs.items()
    }
    folder = scratch / f"hf-{len(list(scratch.glob('hf-*')))}"
    written = target.config | {"dtype": str(dtype).removeprefix("torch.")}
    write_folder(folder, written, sizes, split_all(mapping, lambda name: weights[name], dtype), 10**12, [])
    return _loaded(folder, dtype)
