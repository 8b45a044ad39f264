"""Tensors on disk: files of bounded size, conversion, and an index that lacks nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lockstep.errors import UserError
from lockstep.parallel.placement import Placed, place
from lockstep.training import checkpoint_storage as storage
from lockstep.training.checkpoint_peers import Peers


def _whole(tensor: torch.Tensor) -> Placed:
    return place(tensor, tuple(tensor.shape), None, 1, 0)


def test_files_are_of_bounded_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "FILE_BYTES", 1000)
    tensors = {f"t{n}": torch.full((100,), float(n)) for n in range(5)}
    written = storage.write_tensors(tmp_path, {name: _whole(tensor) for name, tensor in tensors.items()}, None)
    files = [f"tensors-00000-{n:05d}.safetensors" for n in (1, 2, 3)]
    assert written == [*files, "tensors.json"]
    assert [set(load_file(tmp_path / file)) for file in files] == [{"t0", "t1"}, {"t2", "t3"}, {"t4"}]
    loaded = {name: _whole(torch.zeros(100)) for name in tensors}
    storage.read_tensors(tmp_path, loaded)
    assert all(torch.equal(loaded[name].tensor, tensors[name]) for name in tensors)


def test_reading_converts_and_fills_pieces_in_place(tmp_path) -> None:
    weights = torch.randn(5, 7)
    storage.write_tensors(tmp_path, {"w": _whole(weights), "scalar": _whole(torch.tensor(3.0))}, None)
    memory = torch.zeros(20, dtype=torch.bfloat16)
    piece = place(memory[2:15], (5, 7), None, 1, 0, (4, 17))
    scalar = _whole(torch.tensor(0.0))
    storage.read_tensors(tmp_path, {"w": piece, "scalar": scalar})
    assert torch.equal(memory[2:15], weights.flatten()[4:17].bfloat16())
    assert not memory[:2].any()
    assert not memory[15:].any()
    assert scalar.tensor == 3.0


def test_parts_have_names_of_their_own_in_a_file(tmp_path) -> None:
    flat = torch.arange(24.0)
    storage.write_tensors(tmp_path, {"w": place(flat[:10], (4, 6), None, 1, 0, (0, 10))}, None)
    assert set(load_file(tmp_path / "tensors-00000-00001.safetensors")) == {"w[0,0]", "w[1,0]"}
    with pytest.raises(UserError, match=r"tensors\.json is damaged: it lacks parts of w"):
        storage.read_index(tmp_path)


def test_an_index_that_is_none_is_refused(tmp_path) -> None:
    (tmp_path / "tensors.json").write_text(json.dumps({"tensors": {"w": {"shape": [2]}}}))
    with pytest.raises(UserError, match=r"tensors\.json is damaged: it does not say where tensors lie"):
        storage.read_index(tmp_path)


def test_a_folder_that_a_host_does_not_see_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"process 0 does not see .*nowhere; all hosts have to share it"):
        storage.write_tensors(tmp_path / "nowhere", {"w": _whole(torch.zeros(2))}, None)


def test_one_process_fails_as_it_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        Peers().everywhere(lambda: 1 // 0)
    assert Peers().by_leader(lambda: 5) == 5
