"""The ledgers of two runs: the first micro-batch, rank and number in which they differ."""

from typing import Any

from lockstep.lab.bands import bf16_ulp
from lockstep.lab.side import Pairs, Side
from lockstep.lab.stages import Stage

NAME = "ledger"
_EXACT = (
    ("hashes", "token hash"),
    ("tokens", "number of tokens with a loss"),
    ("divisors", "divisor of the loss"),
)
"""Entries of which there is one a micro-batch; equal in two runs of one contract, whatever their layouts."""


def ledger_stage(a: Side, b: Side, pairs: Pairs, parted: bool) -> Stage:
    """Compare what losses and gradient norms are made of; ``differs`` only where rounding cannot be the reason.

    Where numbers ``parted`` by more than rounding, the evidence names the kind of parameters whose gradients did first.
    """
    ledgers = [_by_iteration(side) for side in (a, b)]
    shared = [pair[0].iteration for pair in pairs.pairs if all(pair[0].iteration in known for known in ledgers)]
    if not shared:
        return Stage(NAME, "unknown", "no ledger is known of both sides")
    for iteration in shared:
        detail = _first_difference(ledgers[0][iteration], ledgers[1][iteration])
        if detail:
            return Stage(NAME, "differs", f"{detail}, at iteration {iteration}", iteration)
    same = f"micro-batches and divisors of {len(shared)} iterations are equal"
    return Stage(NAME, "equal", same, evidence=_kinds_apart(ledgers, shared) if parted else [])


def _by_iteration(side: Side) -> dict[int, dict[str, Any]]:
    lines = side.run.train if side.run else []
    return {line.iteration: line.ledger for line in lines if line.ledger}


def _first_difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    if len(a.get("tokens", ())) == len(b.get("tokens", ())):
        for key, spelled in _EXACT:
            for i, (one, other) in enumerate(zip(a.get(key, ()), b.get(key, ()), strict=False)):
                if one != other:
                    return f"the {spelled} of micro-batch {i + 1}{_ranks(i, a, b)} is {one} against {other}"
        weights = a.get("router_weight"), b.get("router_weight")
        if None not in weights and weights[0] != weights[1]:
            return f"the factor on router losses is {weights[0]:.9g} against {weights[1]:.9g}"
    return None


def _ranks(index: int, a: dict[str, Any], b: dict[str, Any]) -> str:
    ranks = a.get("ranks", 1), b.get("ranks", 1)
    if ranks == (1, 1):
        return ""
    if ranks[0] == ranks[1]:
        return f" (data-parallel rank {index % ranks[0]})"
    return f" (data-parallel rank {index % ranks[0]} of A, {index % ranks[1]} of B)"


def _kinds_apart(ledgers: list[dict[int, dict[str, Any]]], shared: list[int]) -> list[str]:
    """Name the kinds of parameters whose gradient norms part by more than one BF16 ulp, at the first such iteration."""
    for iteration in shared:
        a, b = (known[iteration].get("grad_norms", {}) for known in ledgers)
        kinds = [kind for kind in a if kind in b] + [kind for kind in {**a, **b} if (kind in a) != (kind in b)]
        apart = [kind for kind in kinds if not abs(a.get(kind, 0.0) - b.get(kind, 0.0)) <= _ulp(a, b, kind)]
        if apart:
            alone = " alone" if len(apart) == 1 and len(kinds) > 1 else ""
            numbers = f"{a.get(apart[0], 0.0):.7g} against {b.get(apart[0], 0.0):.7g}"
            return [f"of gradients, {' and '.join(apart)}{alone} part first, at iteration {iteration} ({numbers})"]
    return []


def _ulp(a: dict[str, float], b: dict[str, float], kind: str) -> float:
    return bf16_ulp(min(abs(a.get(kind, 0.0)), abs(b.get(kind, 0.0))))
