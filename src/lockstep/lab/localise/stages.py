"""The stages of the walk in the order of execution, and the order of the tensors within each."""

import re

ENVIRONMENT = "code and environment"
CONFIG = "config"
FEATURES = "requested and active"
DATA = "data"
WEIGHTS = "weights before"
STATE = "state before"
SCHEDULE = "schedule"
FORWARD = "forward"
LOSS = "loss"
GRADIENTS = "gradients"
REDUCED = "gradients after reduction"
NORM = "gradient norm"
CLIPPED = "clipping"
UPDATE = "optimizer update"
AFTER = "weights after"

FACTS = (ENVIRONMENT, CONFIG, FEATURES)
"""Stages of the run as a whole."""

ITERATION = (DATA, WEIGHTS, STATE, SCHEDULE, FORWARD, LOSS, GRADIENTS, REDUCED, NORM, CLIPPED, UPDATE, AFTER)
"""Stages of every iteration."""

MAIN = "main weights after"
"""Where the optimizer's own weights after the update stand; the walk compares what the update added to them."""

OUTPUT = "of the output of"
"""What the names of gradients of activations begin with."""

STREAM = "random stream"
"""What the numbers of the states of random streams begin with."""

_BACKWARD = (GRADIENTS,)
_IN_LAYER = (
    "input_layernorm",
    "linear_q_down_proj",
    "linear_kv_down_proj",
    "linear_qkv",
    "linear_q_proj",
    "q_layernorm",
    "linear_q_up_proj",
    "kv_layernorm",
    "k_layernorm",
    "linear_kv_up_proj",
    "linear_proj",
    "self_attention",
    "pre_mlp_layernorm",
    "router",
    "experts",
    "shared_experts",
    "linear_fc1",
    "linear_fc2",
    "mlp",
)
_FIRST = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "document_ids",
    "rotary_positions",
    "lr",
    "weight decay",
    "loss scale",
)
_LAST = ("final_layernorm", "output_layer", "loss of each token", "loss numerator", "valid tokens", "divisor")


def in_order(stage: str, names: list[str]) -> list[str]:
    """Return names in the order in which a run computes them: that of the layers, in a backward pass from the end."""
    return sorted(names, key=_place, reverse=stage in _BACKWARD)


def _place(name: str) -> tuple[int, int, int, str]:
    layer = re.search(r"layers\.(\d+)", name)
    if layer:
        output = re.search(r"layers\.\d+$", name) is not None
        return 2, int(layer[1]), len(_IN_LAYER) + 1 if output else _within(name), name
    for number, known in enumerate(_LAST):
        if known in name:
            return 3, number, 0, name
    if name in _FIRST:
        return 0, _FIRST.index(name), 0, name
    if name.startswith(("attention", "rotary")):
        return 1, 1, 0, name
    return (1, 2, 0, name) if name.startswith(OUTPUT) else (1, 0, 0, name)


def _within(name: str) -> int:
    """Return the place in a layer: the most specific part of the name counts."""
    parts = name.split(".")
    found = [number for number, known in enumerate(_IN_LAYER) if known in parts]
    if "router" in parts or "experts" in parts or "shared_experts" in parts:
        found = [number for number in found if _IN_LAYER[number] in ("router", "experts", "shared_experts")]
    elif len(found) > 1:
        found = [number for number in found if _IN_LAYER[number] not in ("self_attention", "mlp")]
    return found[0] if found else 0
