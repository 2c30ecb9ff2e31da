"""A curve for each of several runs as SVG: sharp at any size, in the page's own colours, and nothing to load.

Its numbers go along in `data-curves`, so that the page can tell them where the pointer is (CHART_JS): in pixels of the
SVG's own frame, W x H.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

W, H = 380, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24  # around the plot
MOST_COLOURS = 6  # .c0 to .c5 in the CSS

CHART_JS = """
const readOut = (svg, x) => {
    const curves = JSON.parse(svg.dataset.curves);
    const epochs = [...new Set(curves.flatMap((curve) => curve.points.map((point) => point[0])))];
    if (!epochs.length) return;
    const place = (epoch) => Number(svg.dataset.x0) + epoch * Number(svg.dataset.scale);
    const nearest = epochs.reduce((a, b) => (Math.abs(place(b) - x) < Math.abs(place(a) - x) ? b : a));
    const line = svg.querySelector(".cursor");
    line.setAttribute("x1", place(nearest));
    line.setAttribute("x2", place(nearest));
    svg.classList.add("read");
    svg.dataset.at = nearest;
    const told = curves.flatMap(({ name, points }) => {
        const point = points.find((one) => one[0] === nearest);
        return point ? [curves.length > 1 ? `${name} ${point[1]}` : point[1]] : [];
    });
    svg.parentElement.querySelector(".reading").textContent = `epoch ${nearest}: ${told.join(", ")}`;
};
const leave = (svg) => {
    svg.classList.remove("read");
    delete svg.dataset.at;
    svg.parentElement.querySelector(".reading").textContent = "";
};
element.addEventListener("pointermove", (event) => {
    const svg = event.target.closest("svg[data-curves]");
    if (!svg) return;
    const box = svg.getBoundingClientRect();
    readOut(svg, ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width);
});
element.addEventListener("pointerout", (event) => {
    const svg = event.target.closest("svg[data-curves]");
    if (svg && !svg.contains(event.relatedTarget)) leave(svg);
});
element.addEventListener("keydown", (event) => {
    const svg = event.target.closest("svg[data-curves]");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!svg || !step) return;
    event.preventDefault();
    const points = JSON.parse(svg.dataset.curves).flatMap((curve) => curve.points.map((point) => point[0]));
    const epochs = [...new Set(points)].sort((a, b) => a - b);
    const now = epochs.indexOf(Number(svg.dataset.at));
    const next = now < 0 ? epochs.length - 1 : Math.min(epochs.length - 1, Math.max(0, now + step));
    readOut(svg, Number(svg.dataset.x0) + epochs[next] * Number(svg.dataset.scale));
});
element.addEventListener("focusout", (event) => {
    const svg = event.target.closest("svg[data-curves]");
    if (svg) leave(svg);
});
"""

CSS = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 22px 28px; }
.chart { margin: 0; min-width: 0; }
.chart figcaption { display: flex; gap: 10px; justify-content: space-between; font-size: 13px; min-height: 20px; }
.chart figcaption b { font-weight: 600; white-space: nowrap; }
.chart .reading {
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; text-align: right; min-width: 0;
}
.chart svg { display: block; width: 100%; height: auto; border-radius: 8px; overflow: visible; }
.chart svg:focus-visible { outline: 2px solid var(--primary-500); outline-offset: 4px; }
.chart text { font-size: 11px; fill: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.chart .rule { stroke: var(--border-color-primary); stroke-width: 1; }
.chart .chance { stroke: var(--body-text-color-subdued); stroke-width: 1; stroke-dasharray: 3 4; }
.chart .cursor { stroke: var(--body-text-color-subdued); stroke-width: 1; visibility: hidden; }
.chart .read .cursor { visibility: visible; }
.chart .curve { fill: none; stroke: var(--curve); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart circle { fill: var(--curve); }
.c0 { --curve: #0f766e; } .c1 { --curve: #b45309; } .c2 { --curve: #4f46e5; }
.c3 { --curve: #be185d; } .c4 { --curve: #4d7c0f; } .c5 { --curve: #57534e; }
.dark .c0 { --curve: #2dd4bf; } .dark .c1 { --curve: #fbbf24; } .dark .c2 { --curve: #a5b4fc; }
.dark .c3 { --curve: #f9a8d4; } .dark .c4 { --curve: #bef264; } .dark .c5 { --curve: #d6d3d1; }
"""


@dataclass(frozen=True)
class Curve:
    name: str
    colour: int
    """Of the classes .c0 to .c5."""
    points: Sequence[tuple[float, float]]
    """Epoch, value; finite, by rising epoch."""


def chart(
    title: str, curves: Sequence[Curve], last: float, say: Callable[[float], str], chance: float | None = None
) -> str:
    """A <figure>.

    curves  of which one at least has a point
    last    epoch at which the axis ends; it begins with 0
    say     a value in words
    chance  a level that is drawn dashed
    """
    curves = [curve for curve in curves if curve.points]
    values = [value for curve in curves for _, value in curve.points] + ([chance] if chance is not None else [])
    marks = _marks(min(values), max(values))
    low, high = min(marks[0], *values), max(marks[-1], *values)
    scale = (W - LEFT - RIGHT) / max(last, 1)

    def x(epoch: float) -> float:
        return round(LEFT + epoch * scale, 1)

    def y(value: float) -> float:
        return round(H - BOTTOM - (value - low) / (high - low) * (H - TOP - BOTTOM), 1)

    parts = [
        f'<line class="rule" x1="{LEFT}" x2="{W - RIGHT}" y1="{y(mark)}" y2="{y(mark)}"/>'
        f'<text x="{LEFT - 8}" y="{y(mark) + 4}" text-anchor="end">{escape(say(mark))}</text>'
        for mark in marks
    ]
    for mark in _marks(0, max(last, 1), 5):
        if mark == int(mark) and mark <= last:
            parts.append(f'<text x="{x(mark)}" y="{H - 6}" text-anchor="middle">{mark:g}</text>')
    if chance is not None:
        parts.append(f'<line class="chance" x1="{LEFT}" x2="{W - RIGHT}" y1="{y(chance)}" y2="{y(chance)}"/>')
        parts.append(
            f'<text x="{W - RIGHT}" y="{y(chance) + 13}" text-anchor="end">chance {escape(say(chance))}</text>'
        )
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{H - BOTTOM}"/>')
    for curve in curves:
        path = " ".join(f"{x(epoch)},{y(value)}" for epoch, value in curve.points)
        dots = curve.points if len(curve.points) <= 12 else ()
        parts.append(f'<g class="c{curve.colour % MOST_COLOURS}"><polyline class="curve" points="{path}"/>')
        parts += [f'<circle cx="{x(epoch)}" cy="{y(value)}" r="3"/>' for epoch, value in dots]
        parts.append("</g>")
    told = [{"name": curve.name, "points": [[epoch, say(value)] for epoch, value in curve.points]} for curve in curves]
    ends = "; ".join(f"{curve.name} ends at {say(curve.points[-1][1])}" for curve in curves)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b><span class="reading" aria-live="polite"></span>'
        f'</figcaption><svg viewBox="0 0 {W} {H}" role="img" tabindex="0" data-x0="{LEFT}" '
        f'data-scale="{scale:.5f}" data-curves="{escape(json.dumps(told))}" '
        f'aria-label="{escape(f"{title} by epoch: {ends}")}">{"".join(parts)}</svg></figure>'
    )


def _marks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers from below low to above high, about `most` steps."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    return [round(i * step, 10) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
