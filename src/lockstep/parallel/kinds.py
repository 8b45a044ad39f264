"""The kinds of parameters whose gradients are measured apart."""

from lockstep.parallel.plan import is_expert

KINDS = ("embedding", "attention", "mlp", "router", "experts", "norms", "output", "other")
"""What ``kind_of`` returns, in the order of a forward pass."""

_PARTS = (
    (".router.", "router"),
    (".shared_experts.", "experts"),
    ("self_attention.", "attention"),
    (".mlp.", "mlp"),
    ("embedding.", "embedding"),
    ("output_layer.", "output"),
)


def kind_of(name: str) -> str:
    """Return the kind of a parameter by its name; a norm is one wherever it stands."""
    if any("norm" in part for part in name.split(".")):
        return "norms"
    if is_expert(name):
        return "experts"
    return next((kind for part, kind in _PARTS if part in name), "other")
