"""The curves of a comparison inside its page: lines that stretch to any screen, labels that keep their size.

Lines are SVG without a script; labels are text of the page, so that they have its size, its colours in light and dark,
and can be read aloud.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from lockstep.lab.cells import difference_text
from lockstep.lab.compare import Comparison
from lockstep.lab.numbers import Row
from lockstep.lab.thinning import kept

STYLE = """
figure { margin: 0; padding: 14px 16px 12px; background: #fff; border-radius: 6px; border: 1px solid #dde2e8;
  --a: #1f5fa8; --b: #d96c00; --d: #b3261e; --band: #7d8894; --line: #dde2e8; --ink: #55606b }
figcaption { font-size: 14px; margin-bottom: 10px }
.axis { display: flex; flex-wrap: wrap; gap: 2px 18px; justify-content: space-between; font-size: 13px;
  margin: 8px 0 4px }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; color: var(--ink) }
.legend i { display: inline-block; width: 22px; margin-right: 6px; vertical-align: middle }
.plot { position: relative; margin-bottom: 26px; margin-right: 12px }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round }
.plot .area { fill: var(--band); fill-opacity: .25; stroke: none }
.plot .grid { stroke: var(--line); stroke-width: 1 } .plot .zero { stroke: var(--ink); stroke-width: 1 }
.plot .a { stroke: var(--a); stroke-width: 6; stroke-opacity: .4 } .plot .b { stroke: var(--b); stroke-width: 1.6 }
.plot .d { stroke: var(--d); stroke-width: 1.4 } .plot .dots { stroke-width: 5 }
.plot span { position: absolute; font-size: 12px; line-height: 1; color: var(--ink); white-space: nowrap;
  font-variant-numeric: tabular-nums }
.plot .y { right: 100%; margin-right: 6px; transform: translateY(-50%) }
.plot .x { top: 100%; margin-top: 6px; transform: translateX(-50%) }
.legend .a { border-top: 6px solid var(--a); opacity: .5 } .legend .b { border-top: 2px solid var(--b) }
.legend .d { border-top: 2px solid var(--d) } .legend .area { height: 11px; background: var(--band); opacity: .4 }
@media screen and (prefers-color-scheme: dark) {
  figure { background: #1b222a; border-color: #36414c;
    --a: #6aa9f0; --b: #ffa94d; --d: #ff8a80; --band: #a7b2bd; --line: #303a45; --ink: #a7b2bd }
}
@media screen and (max-width: 600px) { figure { padding: 12px 10px 10px } }
@media print { figure { break-inside: avoid } }
"""

_SIZE = 10000
"""Units of a plot on either side; the browser stretches them."""
_DOTTED = 60
"""Up to so many iterations each has a dot."""


@dataclass(frozen=True)
class Scale:
    """A range of values and the round numbers in it."""

    low: float
    high: float
    step: float

    @classmethod
    def over(cls, low: float, high: float, ticks: int, whole: bool = False) -> "Scale":
        """Return a scale with about so many round numbers."""
        if not high > low:
            low, high = low - (abs(low) or 1) / 100, high + (abs(high) or 1) / 100
        raw = (high - low) / ticks
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw * (1 - 1e-9))
        return cls(low, high, max(step, 1.0) if whole else step)

    def place(self, value: float) -> int:
        """Return where a value lies, in units of the plot."""
        return round((value - self.low) / (self.high - self.low) * _SIZE)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the round numbers with their spelling."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        small = self.step < 1e-3 or self.step >= 1e6
        digits = max(0, -math.floor(math.log10(self.step)))
        values = [n * self.step for n in range(first, last + 1)]
        return [(v, "0" if v == 0 else f"{v:.3g}" if small else f"{v:.{digits}f}") for v in values]


def figure(found: Comparison) -> str:
    """Return both plots with what they show in words; empty where there is no iteration."""
    rows = found.findings.numbers.rows
    if not rows:
        return ""
    at = [row.iteration for row in rows]
    a, b = [_finite(row.loss_a) for row in rows], [_finite(row.loss_b) for row in rows]
    apart, band = [_finite(row.difference) for row in rows], [row.band for row in rows]
    measured = found.findings.band is not None
    name = f"band measured on {found.findings.band_of}" if measured else found.findings.numbers.loss_rule
    x = Scale.over(at[0], at[-1], 5, whole=True) if len(at) > 1 else Scale(at[0] - 1, at[0] + 1, 1.0)
    around = _band(at, a, band) if measured else []
    curves = [("area", "band around A", around)] if measured else []
    curves += [("a", "A", _points(at, a)), ("b", "B", _points(at, b))]
    there = [0.0 if math.isfinite(value) else math.nan for value in apart]
    differences = [("area", name, _band(at, there, band)), ("d", "B \u2212 A", _points(at, apart))]
    scales = _heights(curves), _heights(differences)
    # Both plots leave as much room for labels, so that equal iterations stand below each other.
    space = max(len(text) for scale in scales for _, text in scale.ticks()) + 1
    dotted = len(at) <= _DOTTED
    caption = escape(describe(rows, name.removeprefix("band ")))
    return (
        f'<figure aria-label="Loss curves and their difference"><figcaption>{caption}</figcaption>'
        + _plot("Loss", 260, curves, x, scales[0], space, dotted=dotted)
        + _plot("B \u2212 A", 170, differences, x, scales[1], space, dotted=dotted)
        + '<div class="axis"><span></span><span>iteration</span></div></figure>'
    )


def describe(rows: Sequence[Row], band: str) -> str:
    """Say what the curves show: where they begin and end, how far apart they are, what is not drawn."""
    first, last = rows[0], rows[-1]
    text = f"Losses of A and B, in nats per token, over iterations {first.start} to {last.iteration}."
    ends = [
        f"{label} goes from {one:.5g} to {other:.5g}"
        for label, one, other in (("A", first.loss_a, last.loss_a), ("B", first.loss_b, last.loss_b))
        if one is not None and other is not None
    ]
    text += f" {', '.join(ends)}." if ends else ""
    known = [row for row in rows if math.isfinite(_finite(row.difference))]
    missing = [row.iteration for row in rows if not math.isfinite(_finite(row.difference))]
    if known:
        far = max(known, key=lambda row: abs(row.difference or 0.0))
        if far.difference:
            text += f" They are farthest apart at iteration {far.iteration}: {difference_text(far.difference)},"
            text += f" where the band ({band}) is \u00b1{far.band:.3g}."
        else:
            text += " Both are the same where both have one." if missing else " Both are the same."
    if missing:
        count = "1 iteration" if len(missing) == 1 else f"{len(missing)} iterations"
        text += f" A gap stands for a side without a finite loss: {count}, first {missing[0]}."
    return text


Points = list[tuple[int, float]]
Curves = list[tuple[str, str, Points]]
"""Kind, name and points of what a plot shows, the hindmost first."""


def _points(at: Sequence[int], values: Sequence[float]) -> Points:
    return [(at[i], values[i]) for i in kept(at, values)]


def _band(at: Sequence[int], middle: Sequence[float], band: Sequence[float]) -> Points:
    """Return the outline of a band: its upper edge, and the lower one back."""
    edges = [[m + sign * width for m, width in zip(middle, band, strict=True)] for sign in (1, -1)]
    upper, lower = ([p for p in _points(at, edge) if math.isfinite(p[1])] for edge in edges)
    return [*upper, *reversed(lower)]


def _heights(curves: Curves) -> Scale:
    values = [value for _, _, points in curves for _, value in points if math.isfinite(value)] or [0.0]
    low, high = min(values), max(values)
    margin = (high - low) * 0.04
    return Scale.over(low - margin, high + margin, 6)


def _plot(title: str, height: int, curves: Curves, x: Scale, y: Scale, space: int, *, dotted: bool) -> str:
    ticks = y.ticks()
    lines = [f'<path class="grid" d="{"".join(f"M0 {_SIZE - y.place(v)}h{_SIZE}" for v, _ in ticks)}"/>']
    if curves[-1][0] == "d":
        lines.append(f'<path class="zero" d="M0 {_SIZE - y.place(0.0)}h{_SIZE}"/>')
    for kind, _, points in curves:
        lines.append(f'<path class="{kind}" d="{"".join(_path(points, x, y, closed=kind == "area"))}"/>')
        if dotted and kind in "bd":
            dots = "".join(f"M{x.place(i)} {_SIZE - y.place(value)}h0" for i, value in points if math.isfinite(value))
            lines.append(f'<path class="{kind} dots" d="{dots}"/>')
    labels = [f'<span class="y" style="top:{100 - y.place(v) / _SIZE * 100:.2f}%">{text}</span>' for v, text in ticks]
    labels += [f'<span class="x" style="left:{x.place(v) / _SIZE * 100:.2f}%">{text}</span>' for v, text in x.ticks()]
    shown = sorted(curves, key=lambda curve: curve[0] == "area")
    legend = "".join(f'<span><i class="{kind}"></i>{escape(name)}</span>' for kind, name, _ in shown)
    return (
        f'<div class="axis"><b>{title}</b><span class="legend">{legend}</span></div>'
        f'<div class="plot" aria-hidden="true" style="height:{height}px;margin-left:{space}ch">'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none">{"".join(lines)}</svg>'
        f"{''.join(labels)}</div>"
    )


def _path(points: Points, x: Scale, y: Scale, *, closed: bool) -> Iterator[str]:
    """Yield the steps of a path: a line through neighbours, a point where one stands alone."""
    joined = False
    for i, value in points:
        if not math.isfinite(value):
            joined = False
            continue
        yield f"{'L' if joined else 'M'}{x.place(i)} {_SIZE - y.place(value)}"
        if not joined:
            yield "h0"
        joined = True
    if closed and points:
        yield "Z"


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan
