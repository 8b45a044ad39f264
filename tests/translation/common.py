"""What the tests of translation share."""

import json
from pathlib import Path
from typing import Any

from lockstep.config import ConfigContainer, all_fields
from lockstep.config.derive import derive, interpolate
from lockstep.translation import bridge
from lockstep.translation.flags import Reading, read_flags
from lockstep.translation.nemo import is_nemo, read_nemo
from lockstep.translation.sources import define
from lockstep.translation.words import plain

RECIPE = "vanilla_gpt_pretrain_config"
SIZES = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --lr 1e-3 "
    "--global-batch-size 4 --train-iters 3 --tokenizer-type NullTokenizer --vocab-size 64 --mock-data"
).split()
ENVIRONMENT = {"REPEAT": "1", "TOKENIZER_TYPE": "NullTokenizer"}
"""Variables that stand where the parser wants a number or a choice."""


def effective(config: ConfigContainer, world_size: int = 16) -> dict[str, Any]:
    """Return the values a tree comes to, without the checks that refuse what Lockstep does not train."""
    config = config.copy()
    interpolate(config)
    derive(config, world_size)
    values = {path: config.get(path) for path in all_fields()}
    for path in bridge.PATTERNS:
        if isinstance(values[path], str):
            values[path] = bridge.layer_list(values[path]) or values[path]
    return values


def configurations(shared: Path) -> dict[str, list[str]]:
    """Return Megatron-LM's own configurations by name."""
    lines = (shared / "peer_configs/megatron_lm.jsonl").read_text().splitlines()
    return {config["name"]: config["args"] for config in map(json.loads, lines)}


def read(words: list[str], defined: bool = True) -> Reading:
    """Read a command line of Megatron-LM or NeMo."""
    given = define(plain(words), ENVIRONMENT) if defined else plain(words)
    return read_nemo(given) if is_nemo(given) else read_flags(given)
