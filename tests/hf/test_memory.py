"""A model larger than memory converts: how much memory a process takes for it depends on its files alone."""

import ctypes
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lockstep.hf import convert
from lockstep.training import checkpoint_storage

FILE_BYTES = 16_000_000
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 32, "vocab_size": 1000}


def anonymous_bytes() -> int:
    """Return the memory of this process that is no part of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def growth(job: Callable[[], Any]) -> int:
    """Return by how many bytes the memory of this process grew at most while a job ran."""
    # What was freed before would be used again, and not be counted.
    ctypes.CDLL(None).malloc_trim(0)
    before, most, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        job()
    finally:
        done.set()
        watcher.join()
    return most[0] - before


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read as Linux tells it")
def test_memory_depends_on_the_size_of_files(tmp_path, monkeypatch) -> None:
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, max_position_embeddings=64, **SIZES))
    total = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "hf", max_shard_size="16MB")
    del model
    monkeypatch.setattr(checkpoint_storage, "FILE_BYTES", FILE_BYTES)
    imported = growth(lambda: convert.import_model(tmp_path / "hf", tmp_path / "ours"))
    exported = growth(lambda: convert.export_model(tmp_path / "ours", tmp_path / "back", shard_bytes=FILE_BYTES))
    assert total > 6 * FILE_BYTES
    # A file that is read and one that is written, and half a file that the allocator keeps for itself.
    assert max(imported, exported) < 2.5 * FILE_BYTES, (imported, exported)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 6
