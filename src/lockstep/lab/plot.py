"""The picture of a comparison: both loss curves over each other, and their difference below."""

import io
import math
from typing import TYPE_CHECKING

from lockstep.lab.compare import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _RED = "#1f5fa8", "#e07b00", "#b3261e"


def draw(found: Comparison) -> bytes:
    """Return the picture as PNG."""
    buffer = io.BytesIO()
    figure(found).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def figure(found: Comparison) -> "Figure":
    """Return the picture: both curves in the upper plot, their difference in the lower one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = found.findings.numbers.rows
    drawn = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    top, bottom = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    at = [row.iteration for row in rows]
    marker = "o" if len(rows) <= 60 else ""
    # A is wide and pale under B, so that two equal curves are both seen.
    top.plot(at, [_finite(row.loss_a) for row in rows], color=_BLUE, linewidth=5, alpha=0.35, label="A")
    top.plot(at, [_finite(row.loss_b) for row in rows], color=_ORANGE, linewidth=1.5, marker=marker, ms=3, label="B")
    if found.findings.band:
        low, high = ([_finite(row.loss_a) + sign * row.band for row in rows] for sign in (-1, 1))
        top.fill_between(at, low, high, color="#888888", alpha=0.3, linewidth=0, label="band around A")
    top.set_ylabel("lm loss")
    top.legend(frameon=False)
    top.set_title(f"verdict: {found.decision.verdict}", loc="left")
    bottom.plot(at, [_finite(row.difference) for row in rows], color=_RED, linewidth=1.2, marker=marker, ms=3)
    bottom.fill_between(
        at,
        [-row.band for row in rows],
        [row.band for row in rows],
        color="#888888",
        alpha=0.2,
        linewidth=0,
        label=f"band measured on {found.findings.band_of}" if found.findings.band else found.findings.numbers.loss_rule,
    )
    bottom.axhline(0, color="#444444", linewidth=0.6)
    bottom.set_ylabel("loss B - loss A")
    bottom.set_xlabel("iteration")
    # Above the plot: inside, it would lie across the curve.
    bottom.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    if len(rows) <= 20:
        bottom.set_xticks(at)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _finite(value: float | None) -> float:
    """Return the value, or NaN where there is nothing to draw."""
    return value if value is not None and math.isfinite(value) else math.nan
