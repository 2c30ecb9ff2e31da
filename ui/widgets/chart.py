"""Line charts as SVG, in the page's own colours: the curves of training runs, and how far h moves.

The values of a run's chart are also in `data-lines`, so that chart.js can show those at the pointer.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from serving.client import Curve, Invariance

MOST_COLOURS = 6  # classes .c0 to .c5 of chart.css
MOST_DOTS = 12  # a line with more points has no dots


@dataclass(frozen=True)
class Line:
    """A curve of a chart of runs."""

    name: str
    colour: int
    """0 to 5, for the CSS classes .c0 to .c5."""
    points: Sequence[tuple[float, float]]
    """(epoch, value), finite, by rising epoch."""


@dataclass(frozen=True)
class Plot:
    """Places values in an SVG of width x height pixels; the margins hold the labels of the axes."""

    end: float
    """Greatest x; the least is 0."""
    low: float
    high: float
    width: int = 380
    height: int = 200
    left: int = 44
    right: int = 10
    top: int = 10
    bottom: int = 24

    @property
    def scale(self) -> float:
        """Pixels per unit of x."""
        return (self.width - self.left - self.right) / self.end

    def x(self, value: float) -> float:
        return round(self.left + value * self.scale, 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 1)

    def level(self, value: float, css: str) -> str:
        """A horizontal line."""
        y = self.y(value)
        return f'<line class="{css}" x1="{self.left}" x2="{self.width - self.right}" y1="{y}" y2="{y}"/>'

    def polyline(self, points: Iterable[tuple[float, float]], css: str) -> str:
        path = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        return f'<polyline class="{css}" points="{path}"/>'

    def text(self, x: float, y: float, text: str, anchor: str = "middle") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'

    def svg(self, parts: Iterable[str], label: str, attributes: str = "") -> str:
        frame = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}"'
        return f"<svg {frame}{attributes}>{''.join(parts)}</svg>"


# Training runs --------------------------------------------------------------------------------------------------------


def chart(
    title: str,
    lines: Sequence[Line],
    last: float,
    say: Callable[[float], str],
    chance: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> str:
    """A <figure>.

    lines   at least one of them has a point
    last    epoch at which the axis ends; it begins with 0
    say     formats a value
    chance  a level that is drawn dashed, if known
    bounds  the least and the greatest value that are possible: the axis stays within them, and shows at least a fifth
            of that range, so that noise looks small
    """
    lines = [line for line in lines if line.points]
    values = [value for line in lines for _, value in line.points] + ([] if chance is None else [chance])
    marks = _marks(*_range(min(values), max(values), bounds))
    if bounds:
        marks = [mark for mark in marks if bounds[0] <= mark <= bounds[1]]
    plot = Plot(max(last, 1), min(marks[0], *values), max(marks[-1], *values))
    parts = [plot.level(mark, "rule") + plot.text(plot.left - 8, plot.y(mark) + 4, say(mark), "end") for mark in marks]
    for mark in _marks(0, max(last, 1), 5):
        if mark == int(mark) and mark <= last:
            parts.append(plot.text(plot.x(mark), plot.height - 6, f"{mark:g}"))
    if chance is not None:
        text = plot.text(plot.width - plot.right, plot.y(chance) + 13, f"chance {say(chance)}", "end")
        parts += [plot.level(chance, "chance"), text]
    parts.append(f'<line class="cursor" y1="{plot.top}" y2="{plot.height - plot.bottom}"/>')
    for line in lines:
        dots = line.points if len(line.points) <= MOST_DOTS else ()
        circles = "".join(f'<circle cx="{plot.x(epoch)}" cy="{plot.y(value)}" r="3"/>' for epoch, value in dots)
        parts.append(f'<g class="c{line.colour % MOST_COLOURS}">{plot.polyline(line.points, "curve")}{circles}</g>')
    data = [{"name": line.name, "points": [[epoch, say(value)] for epoch, value in line.points]} for line in lines]
    ends = "; ".join(f"{line.name} ends at {say(line.points[-1][1])}" for line in lines)
    attributes = (
        f' tabindex="0" data-x0="{plot.left}" data-scale="{plot.scale:.5f}" data-lines="{escape(json.dumps(data))}"'
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b><span class="reading" aria-live="polite"></span>'
        f"</figcaption>{plot.svg(parts, f'{title} by epoch: {ends}', attributes)}</figure>"
    )


def _range(low: float, high: float, bounds: tuple[float, float] | None) -> tuple[float, float]:
    """Widened to a fifth of the bounds, around its middle, and within them."""
    if bounds is None:
        return low, high
    least, most = bounds
    missing = max(0.0, (most - least) / 5 - (high - low))
    low = min(max(low - missing / 2, least), most - (high - low + missing))
    return low, max(high, low + (most - least) / 5)


def _marks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers from below low to above high, in about `most` steps."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    return [round(i * step, 10) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


# Invariance -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Lines of one kind of pictures, one for each augmentation."""

    css: str
    legend: str
    curves: Sequence[Curve]


def panels_html(invariance: Invariance, own: str | None) -> str:
    """A panel for each augmentation: how far h moves, and the followed picture at each strength; then a table.

    own  name of a picture that has lines of its own
    """
    trained = invariance.trained
    kinds = [Kind("line-trained", f"This encoder, mean of {trained.pictures} pictures", trained.curves)]
    if invariance.untrained:
        kinds.append(Kind("line-untrained", "The same before training", invariance.untrained.curves))
    if own is not None:
        kinds.append(Kind("line-own", f"This encoder, {own.rpartition('/')[2]} alone", invariance.picture.curves))
    highest = max(1.0, *(value for kind in kinds for curve in kind.curves for value in curve.moved))
    panels = "".join(
        f'<figure class="panel"><h3>{escape(curve.augmentation)}</h3>'
        f"{_panel_svg({kind.css: kind.curves[i] for kind in kinds}, highest)}"
        f'<ul class="strip">{_strip(curve, invariance)}</ul></figure>'
        for i, curve in enumerate(trained.curves)
    )
    legend = "".join(
        f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><line class="{kind.css}" x1="0" x2="26" y1="4" y2="4"/></svg>'
        f"{escape(kind.legend)}</li>"
        for kind in kinds
    )
    return f'<ul class="legend">{legend}</ul><div class="panels">{panels}</div>{_table(kinds)}'


def _strip(curve: Curve, invariance: Invariance) -> str:
    picture = invariance.picture
    sources = (picture.pixels, *picture.strips[curve.augmentation])
    alts = ("as it is", *(f"{curve.augmentation} {strength:g}" for strength in curve.strengths))
    return "".join(
        f'<li><img src="{escape(source)}" alt="{escape(alt)}">{strength:g}</li>'
        for strength, source, alt in zip((0, *curve.strengths), sources, alts, strict=True)
    )


def _panel_svg(curves: dict[str, Curve], highest: float) -> str:
    """One augmentation. curves: by CSS class, the first is drawn on top; highest: top of the scale, at least 1."""
    first = next(iter(curves.values()))
    end = first.strengths[-1]
    plot = Plot(end, 0, highest, width=240, height=160, left=34, bottom=34)
    bottom, right = plot.height - plot.bottom, plot.width - plot.right
    parts = []
    for level, text in ((0, "0"), (0.5, "50%"), (1, "100%")):
        parts.append(plot.level(level, "whole" if level == 1 else "axis"))
        parts.append(plot.text(plot.left - 6, plot.y(level) + 3.5, text, "end"))
    parts += [plot.text(plot.x(strength), bottom + 14, f"{strength:g}") for strength in (0, *first.strengths)]
    parts.append(plot.text((plot.left + right) / 2, plot.height - 4, first.unit))
    for css, curve in reversed(curves.items()):
        moved = [max(0.0, value) for value in curve.moved]
        parts.append(plot.polyline([(0, 0), *zip(curve.strengths, moved, strict=True)], css))
        for strength, y, value, cosine in zip(curve.strengths, moved, curve.moved, curve.cosines, strict=True):
            title = f"<title>{strength:g}: {value:.0%} of the way to another picture, cosine {cosine:.3f}</title>"
            circle = f'<circle class="{css}" cx="{plot.x(strength)}" cy="{plot.y(y)}" r="3.2">'
            parts.append(f"{circle}{title}</circle>")
    moved_last = f"h moves {first.moved[-1]:.0%} of the way to another picture at {end:g}"
    return plot.svg(parts, f"{first.augmentation}, {first.unit}: {moved_last}")


def _table(kinds: Sequence[Kind]) -> str:
    head = "".join(f'<th scope="col">{escape(kind.legend)}</th>' for kind in kinds)
    rows = ""
    for curves in zip(*(kind.curves for kind in kinds), strict=True):  # of one augmentation
        for j, strength in enumerate(curves[0].strengths):
            cells = "".join(f"<td>{curve.moved[j]:.0%} ({curve.cosines[j]:.3f})</td>" for curve in curves)
            rows += f'<tr><th scope="row">{escape(curves[0].augmentation)}</th><td>{strength:g}</td>{cells}</tr>'
    return (
        '<details class="numbers"><summary>The numbers: share of the way to another picture, and the cosine</summary>'
        f'<table><thead><tr><th scope="col">Augmentation</th><th scope="col">Strength</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></details>"
    )
