"""How far h moves under each augmentation, as SVG: a panel for each, and beneath it the picture that is followed,
at each strength. Sharp at any size, in the page's own colours, and nothing to load."""

from collections.abc import Mapping, Sequence
from html import escape

from serving.client import Curve, Invariance

WIDTH, HEIGHT = 240, 160
LEFT, RIGHT, TOP, BOTTOM = 34, 10, 10, 34  # around the plot
CSS = """
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(222px, 1fr)); gap: 26px 24px; }
.panel { margin: 0; min-width: 0; }
.panel h3 { margin: 0 0 2px; font-size: 14px; font-weight: 600; text-transform: capitalize; }
.panel svg { width: 100%; display: block; overflow: visible; }
.panel text { font-size: 10px; fill: var(--body-text-color-subdued); }
.panel .axis { stroke: var(--border-color-primary); }
.panel .whole { stroke: var(--neutral-400); stroke-dasharray: 3 3; }
.panel polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.panel circle { stroke: var(--background-fill-primary); stroke-width: 1; }
.panel circle:hover { r: 5px; }
.line-trained { stroke: var(--primary-700); color: var(--primary-700); }
.dark .line-trained { stroke: var(--primary-400); color: var(--primary-400); }
.line-untrained { stroke: var(--neutral-400); color: var(--neutral-400); stroke-dasharray: 5 3; }
.line-own { stroke: #d97706; color: #d97706; }
.panel circle { fill: currentColor; stroke-dasharray: none; }
.legend {
  display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0 0 16px; padding: 0; list-style: none; font-size: 13px;
}
.legend li { display: flex; align-items: center; gap: 8px; margin: 0; }
.legend svg { width: 26px; height: 8px; }
.legend line { stroke-width: 2.5; }
.strip { display: flex; gap: 3px; margin: 6px 0 0; padding: 0; list-style: none; }
.strip li { flex: 1 1 0; min-width: 0; max-width: 64px; margin: 0; font-size: 10px; text-align: center; }
.strip li { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.strip img { width: 100%; aspect-ratio: 1; display: block; border-radius: 4px; margin-bottom: 2px; }
.numbers { margin-top: 24px; font-size: 13px; }
.numbers summary { cursor: pointer; color: var(--body-text-color-subdued); }
.numbers table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 10px; }
.numbers th, .numbers td { text-align: left; padding: 3px 22px 3px 0; font-weight: 400; }
.numbers thead th { color: var(--body-text-color-subdued); border-bottom: 1px solid var(--border-color-primary); }
"""


def lines_of(found: Invariance, own: str | None) -> dict[str, tuple[str, list[Curve]]]:
    """By kind: the words of the legend, and a curve an augmentation. own: name of a picture to show on its own."""
    pictures = found.trained.pictures
    lines = {"trained": (f"This encoder, mean of {pictures} pictures", found.trained.curves)}
    if found.untrained:
        lines["untrained"] = ("The same before training", found.untrained.curves)
    if own is not None:
        lines["own"] = (f"This encoder, {own.rpartition('/')[2]} alone", found.picture.curves)
    return lines


def panels_html(found: Invariance, own: str | None) -> str:
    lines = lines_of(found, own)
    highest = max(1.0, *(value for _, curves in lines.values() for curve in curves for value in curve.moved))
    panels = "".join(
        _panel({kind: curves[i] for kind, (_, curves) in lines.items()}, highest, found)
        for i in range(len(found.trained.curves))
    )
    legend = "".join(
        f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><line class="line-{kind}" x1="0" x2="26" y1="4" y2="4"/></svg>'
        f"{escape(words)}</li>"
        for kind, (words, _) in lines.items()
    )
    return f'<ul class="legend">{legend}</ul><div class="panels">{panels}</div>{_numbers(lines)}'


def _panel(curves: Mapping[str, Curve], highest: float, found: Invariance) -> str:
    curve = curves["trained"]
    strip = "".join(
        f'<li><img src="{escape(source)}" alt="{escape(_alt(curve, strength))}">{strength:g}</li>'
        for strength, source in zip(
            (0, *curve.strengths), (found.picture.pixels, *found.picture.strips[curve.augmentation]), strict=True
        )
    )
    return (
        f'<figure class="panel"><h3>{escape(curve.augmentation)}</h3>{chart_svg(curves, highest)}'
        f'<ul class="strip">{strip}</ul></figure>'
    )


def _alt(curve: Curve, strength: float) -> str:
    return f"{curve.augmentation} {strength:g}" if strength else "as it is"


def chart_svg(curves: Mapping[str, Curve], highest: float) -> str:
    """One augmentation. curves: by kind; highest: the top of the scale, at least 1."""
    first = curves["trained"]
    most = first.strengths[-1]

    def at(strength: float, moved: float) -> tuple[float, float]:
        x = LEFT + strength / most * (WIDTH - LEFT - RIGHT)
        return round(x, 1), round(HEIGHT - BOTTOM - max(0.0, moved) / highest * (HEIGHT - TOP - BOTTOM), 1)

    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for level, words in ((0, "0"), (0.5, "50%"), (1, "100%")):
        y = at(0, level)[1]
        kind = "whole" if level == 1 else "axis"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{words}</text>')
    for strength in (0, *first.strengths):
        x = at(strength, 0)[0]
        parts.append(f'<text x="{x}" y="{bottom + 14}" text-anchor="middle">{strength:g}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(first.unit)}</text>')
    for kind, curve in reversed(curves.items()):  # what matters most comes last, and so lies on top
        points = [at(0, 0), *map(at, curve.strengths, curve.moved)]
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline class="line-{kind}" points="{path}"/>')
        for (x, y), strength, moved, cosine in zip(
            points[1:], curve.strengths, curve.moved, curve.cosines, strict=True
        ):
            told = f"{strength:g}: {moved:.0%} of the way to another picture, cosine {cosine:.3f}"
            parts.append(f'<circle class="line-{kind}" cx="{x}" cy="{y}" r="3.2"><title>{told}</title></circle>')
    label = (
        f"{first.augmentation}, {first.unit}: h goes {first.moved[-1]:.0%} of the way to another picture at {most:g}"
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _numbers(lines: Mapping[str, tuple[str, Sequence[Curve]]]) -> str:
    """All of it as a table."""
    head = "".join(f'<th scope="col">{escape(words)}</th>' for words, _ in lines.values())
    rows = ""
    for same in zip(*(curves for _, curves in lines.values()), strict=True):
        for j, strength in enumerate(same[0].strengths):
            cells = "".join(f"<td>{curve.moved[j]:.0%} ({curve.cosines[j]:.3f})</td>" for curve in same)
            rows += f'<tr><th scope="row">{escape(same[0].augmentation)}</th><td>{strength:g}</td>{cells}</tr>'
    return (
        '<details class="numbers"><summary>The numbers: how far of the way to another picture, and the cosine</summary>'
        f'<table><thead><tr><th scope="col">Augmentation</th><th scope="col">Strength</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></details>"
    )
