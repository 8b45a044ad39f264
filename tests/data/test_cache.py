from pathlib import Path

import numpy as np
import pytest

from lockstep.data.cache import Arrays, IndexCache
from lockstep.errors import UserError
from tests.data.helpers import flip


class Builder:
    """Counts how often it is asked to build."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Arrays:
        self.calls += 1
        return {"a": np.arange(6, dtype=np.int32).reshape(3, 2), "b": np.arange(4, dtype=np.uint32)}


def load(folder: Path, build: Builder, seed: int = 1) -> Arrays:
    return IndexCache(folder, required=True).load_or_build("Test", {"seed": seed}, build)


def test_second_time_is_read(tmp_path: Path) -> None:
    build = Builder()
    first, second = load(tmp_path, build), load(tmp_path, build)
    assert build.calls == 1
    for name, values in first.items():
        assert np.array_equal(values, second[name])
        assert values.dtype == second[name].dtype


def test_another_key_is_built(tmp_path: Path) -> None:
    build = Builder()
    load(tmp_path, build, seed=1)
    load(tmp_path, build, seed=2)
    assert build.calls == 2


@pytest.mark.parametrize("pattern", ["*-a.npy", "*-b.npy", "*.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, pattern: str, damage: str) -> None:
    build = Builder()
    load(tmp_path, build)
    (path,) = tmp_path.glob(pattern)
    if damage == "gone":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        flip(path, lambda raw: raw.__delitem__(slice(-3, None)))
    else:
        flip(path, lambda raw: raw.__setitem__(len(raw) - 4, raw[-4] ^ 0xFF))
    assert load(tmp_path, build)["b"].tolist() == [0, 1, 2, 3]
    assert build.calls == 2
    load(tmp_path, build)
    assert build.calls == 2


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    build = Builder()
    load(tmp_path, build)
    (path,) = tmp_path.glob("*-a.npy")
    np.save(path, np.array([object()], dtype=object), allow_pickle=True)
    assert load(tmp_path, build)["a"].shape == (3, 2)
    assert build.calls == 2


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    build = Builder()
    arrays = IndexCache(occupied, required=False).load_or_build("Test", {}, build)
    assert arrays["b"].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"cannot write index files to .*file .*--data-cache-path"):
        IndexCache(occupied, required=True).load_or_build("Test", {}, build)


def test_no_temporary_files_stay(tmp_path: Path) -> None:
    load(tmp_path, Builder())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy", ".npy"]
