"""Stand-ins for packages that a peer imports and that a step on random tokens does not use."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful

# Of torchtitan: data, logs and the command line, so that the same is imported on every machine.
NOT_USED = ("datasets", "torchdata", "tyro", "tensorboard", "torch.utils.tensorboard", "wandb")


class _Names(type(Stateful)):  # type: ignore[misc]
    """The class of classes that have every name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Names(name, (), {"__init__": lambda self, *_args, **_named: None, "__call__": lambda self, it: it})

    def __getitem__(cls, _: object) -> Any:
        return cls


class StandIns:
    """Imports packages, and all in them, as modules whose every name is an empty class."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        """Return a spec for the packages alone."""
        if not any(name == package or name.startswith(f"{package}.") for package in self.packages):
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        module = ModuleType(spec.name)
        names = _Names("Names", (), {})
        module.__getattr__ = lambda name: getattr(names, name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty."""


def stand_in() -> None:
    """Have the packages stood in for from now on, whether they are installed or not."""
    sys.meta_path.insert(0, StandIns(NOT_USED))
