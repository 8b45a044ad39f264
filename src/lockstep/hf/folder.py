"""Folders of Hugging Face models: reading their tensors one by one, strictly, and writing them in shards."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lockstep.errors import UserError
from lockstep.hf.families import Family
from lockstep.hf.rules import Mapped, listed

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CARRIED = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "spiece.model",
)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give the folder of a Hugging Face model") from None
    except ValueError:
        raise UserError(f"{path} is cut off or no JSON; fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object; fetch it again")
    return value


def carried_files(folder: Path) -> list[Path]:
    """Return the files of a model that go with it as they are: configuration, tokenizer, generation; never code."""
    found = {path for pattern in _CARRIED for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.suffix != ".py")


class Folder:
    """A Hugging Face model on disk: its config.json and, read when asked for, its tensors by name.

    Raises:
        UserError: there is no such model, it is not in safetensors files, or a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self._open: dict[str, Any] = {}

    @cached_property
    def files(self) -> dict[str, str]:
        """The file of every tensor."""
        if not (self.path / INDEX).is_file():
            return {name: file for file in self._single() for name in self._handle(file).keys()}  # noqa: SIM118
        index = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise UserError(f"{self.path / INDEX} has no weight_map; fetch it again")
        for file in sorted(set(index.values()), key=str):
            named = {name for name, where in index.items() if where == file}
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{self.path / INDEX} names {file!r}, which is no file of this folder; fetch it again")
            if not (self.path / file).is_file():
                raise UserError(f"{self.path} lacks the shard {file} with {listed(sorted(named), 3)}; fetch it")
            there = set(self._handle(file).keys())
            if named != there:
                raise UserError(
                    f"{self.path / file} and {INDEX} disagree on {listed(sorted(named ^ there))}; fetch both again"
                )
        return dict(index)

    def _single(self) -> list[str]:
        if (self.path / "model.safetensors").is_file():
            return ["model.safetensors"]
        shards = sorted(path.name for path in self.path.glob("*.safetensors"))
        if shards:
            raise UserError(f"{self.path} has {listed(shards, 2)} but neither model.safetensors nor {INDEX}; fetch it")
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*")):
            raise UserError(
                f"{self.path} holds pickled weights, which can run code when they are read, and are refused; fetch the "
                "model's safetensors files, or convert it where you trust it: save_pretrained of transformers writes "
                "them"
            )
        raise UserError(f"{self.path} holds no safetensors files; fetch the model's weights")

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.path / file} is damaged ({error}); fetch it again") from None
        return self._open[file]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._handle(self.files[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as PyTorch spells it.

        Raises:
            UserError: it is not of weights that can be trained.
        """
        kind = self._handle(self.files[name]).get_slice(name).get_dtype()
        if kind not in _DTYPES:
            raise UserError(f"{self.path}: {name} is {kind}: only {', '.join(_DTYPES.values())} are supported")
        return _DTYPES[kind]

    def tensor(self, name: str) -> Tensor:
        """Read a tensor."""
        return self._handle(self.files[name]).get_tensor(name)


@dataclass(frozen=True)
class Weights:
    """The weights of a Hugging Face model as parameters of Lockstep, read one by one.

    ``spelled`` is the name in the files of every tensor of the mapping.
    """

    folder: Folder
    mapping: dict[str, Mapped]
    spelled: dict[str, str]

    @classmethod
    def match(cls, folder: Folder, mapping: dict[str, Mapped], family: Family) -> "Weights":
        """Match the tensors of a folder with a mapping, none left over on either side, all of them in shape.

        Raises:
            UserError: a tensor is missing, has no place, or has another shape or an unknown dtype; names all of them.
        """
        wanted = {name: shape for entry in mapping.values() for name, shape in entry.theirs.items()}
        spelled, surplus = {}, []
        for name in folder.files:
            full = name if name in wanted or name.startswith(family.prefix) else family.prefix + name
            if full in wanted:
                spelled[full] = name
            elif not any(re.fullmatch(pattern, name) for pattern in family.buffers):
                surplus.append(name)
        missing = [name for name in wanted if name not in spelled]
        if surplus == ["lm_head.weight"] and not missing:
            _check_tied(folder, spelled[next(iter(wanted))])
            surplus = []
        problems = []
        if missing:
            problems.append(f"missing: {listed(missing)}")
        if surplus:
            problems.append(f"without a place in {family.architecture}: {listed(surplus)}")
        shapes = {name: folder.shape(there) for name, there in spelled.items()}
        wrong = [
            f"{name} is {list(s)} instead of {list(wanted[name])}" for name, s in shapes.items() if s != wanted[name]
        ]
        if wrong:
            problems.append(f"of another shape than config.json tells: {listed(wrong)}")
        if problems:
            raise UserError(f"the tensors of {folder.path} are not those of its config.json; {'; '.join(problems)}")
        weights = cls(folder, mapping, spelled)
        for name in mapping:
            weights.dtype(name)
        return weights

    def dtype(self, name: str) -> str:
        """Return the dtype of a parameter.

        Raises:
            UserError: its tensors have several.
        """
        kinds = {theirs: self.folder.dtype(self.spelled[theirs]) for theirs in self.mapping[name].theirs}
        if len(set(kinds.values())) > 1:
            raise UserError(f"{', '.join(f'{k} is {v}' for k, v in kinds.items())}, but they make up one {name}")
        return next(iter(kinds.values()))

    def whole(self, name: str) -> Tensor:
        """Read a parameter."""
        entry = self.mapping[name]
        return entry.join([self.folder.tensor(self.spelled[theirs]) for theirs in entry.theirs])


def _check_tied(folder: Folder, embedding: str) -> None:
    """Check that an output layer which config.json ties to the embedding is stored as the same numbers."""
    if not torch.equal(folder.tensor("lm_head.weight"), folder.tensor(embedding)):
        raise UserError(
            f"config.json of {folder.path} ties lm_head.weight to {embedding}, but their numbers differ; set "
            "tie_word_embeddings to false there if the model has an output layer of its own"
        )


def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Cut tensors, given their bytes, into runs of at most ``limit`` bytes; a larger one stands alone."""
    runs: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if runs[-1] and filled + size > limit:
            runs.append([])
            filled = 0
        runs[-1].append(name)
        filled += size
    return runs


def write_folder(
    target: Path,
    config: dict[str, Any],
    sizes: Mapping[str, int],
    tensors: Iterable[tuple[str, Tensor]],
    limit: int,
    carried: Iterable[Path],
) -> list[str]:
    """Write a Hugging Face model, whole or not at all, from tensors in the order of ``sizes``; return its files.

    Raises:
        UserError: the folder holds something already, or cannot be written.
    """
    with whole_folder(target) as scratch:
        for path in carried:
            shutil.copyfile(path, scratch / path.name)
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_shards(scratch, sizes, iter(tensors), limit)
    return sorted(path.name for path in target.iterdir())


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write into; it becomes ``target`` when all is written, and vanishes on any error.

    Raises:
        UserError: the target holds something already, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already; give another folder")
    scratch = target.parent / f".{target.name}.writing"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_shards(folder: Path, sizes: Mapping[str, int], tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    runs = shards(sizes, limit)
    places: dict[str, str] = {}
    for number, names in enumerate(runs, start=1):
        file = f"model-{number:05d}-of-{len(runs):05d}.safetensors" if len(runs) > 1 else "model.safetensors"
        contents = {}
        for expected in names:
            name, tensor = next(tensors)
            assert name == expected, f"{name} comes in place of {expected}"
            contents[name] = tensor.clone(memory_format=torch.contiguous_format)  # of views: files share nothing
            places[name] = file
        save_file(contents, folder / file, metadata={"format": "pt"})
    if len(runs) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def split_all(
    mapping: Mapping[str, Mapped], whole: Callable[[str], Tensor], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield their tensors of all parameters, one parameter in memory at a time."""
    for name, entry in mapping.items():
        value = whole(name)
        yield from entry.split(value if dtype is None else value.to(dtype)).items()
