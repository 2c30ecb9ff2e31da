"""Beside the tabs: the picture that is looked at, those that it is searched with, and the way that led there."""

from dataclasses import replace
from html import escape

import gradio as gr

from ui.search.crop import Box
from ui.search.picture import Chosen, UploadFailed, described, uploaded, warn
from ui.search.query import Query
from ui.widgets.camera import camera
from ui.widgets.well import well, well_html

SHOWN = 16  # steps of the way, the last of them

JS = """
element.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-at]");
    if (button) trigger("choose", { at: Number(button.dataset.at) });
});
"""

CSS = """
.chips, .steps { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 6px; }
.chips li, .steps li { margin: 0; }
.chips + h4, #side h4 { margin: 0 0 6px; font-size: 12px; font-weight: 500; color: var(--body-text-color-subdued); }
.chip, .step { position: relative; padding: 0; border: 0; background: none; cursor: pointer; border-radius: 8px; }
.chip { margin-bottom: 8px; }
.chip img, .step img { display: block; object-fit: cover; border-radius: 7px; background: var(--neutral-200); }
.chip img { width: 46px; height: 46px; }
.step img { width: 34px; height: 34px; }
.chip::after {
  content: "×"; position: absolute; top: -5px; right: -5px; width: 17px; height: 17px; border-radius: 50%;
  font: 600 13px/16px var(--font); color: white; background: var(--neutral-600);
}
.chip:hover::after { background: var(--primary-700); }
.unlike .chip img { filter: grayscale(0.7); opacity: 0.75; }
.chip:focus-visible, .step:focus-visible { outline: 3px solid var(--primary-500); outline-offset: 2px; }
.step { opacity: 0.65; }
.step:hover, .step[aria-current] { opacity: 1; }
.step[aria-current] img { box-shadow: 0 0 0 2px var(--primary-600); }
#way { gap: 8px; }
/* What has nothing to show takes no room. */
#chips:not(:has(li)), #steps:not(:has(li)), #camera:has(button[hidden]) { display: none; }
#way button { flex: 0 0 auto; }
"""


def column(trail: gr.State) -> None:
    """Build it, and wire whatever changes the `trail`."""
    place, lens = well(), camera()
    chips = gr.HTML(js_on_load=JS, apply_default_css=False, elem_id="chips")
    steps = gr.HTML(js_on_load=JS, apply_default_css=False, elem_id="steps")
    with gr.Row(elem_id="way"):
        back = gr.Button("Back", size="sm", min_width=60, elem_id="back", visible=False)
        everything = gr.Button("All pictures", size="sm", min_width=60, elem_id="all", visible=False)

    def look(trail: tuple[Query, ...]):
        there = gr.update(visible=bool(trail))
        return well_html(trail[-1].picture if trail else None), chips_html(trail), steps_html(trail), there, there

    def upload(trail, event: gr.EventData):
        try:
            return (*trail, Query(uploaded(event)))
        except UploadFailed as error:
            warn(error)
            return gr.skip()

    def part(trail, event: gr.EventData):
        try:
            return _with_box(trail, Box.of((event._data or {}).get("box") or ()))
        except (ValueError, TypeError):  # no browser sends that
            return gr.skip()

    def whole(trail):
        return _with_box(trail, None)

    def remove(trail, event: gr.EventData):
        left = trail[-1].without(trail[-1].pictures[int(event._data["at"])])
        return (*trail, left) if left else trail[:-1]

    def walk(trail, event: gr.EventData):
        return trail[: int(event._data["at"]) + 1]

    def step_back(trail):
        return trail[:-1]

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    trail.change(look, trail, [place, chips, steps, back, everything], **quiet)
    gr.on([place.upload, lens.upload], upload, trail, trail, **quiet)
    place.part(part, trail, trail, **quiet)
    place.whole(whole, trail, trail, **quiet)
    chips.choose(remove, trail, trail, **quiet)
    steps.choose(walk, trail, trail, **quiet)
    back.click(step_back, trail, trail, **quiet)
    everything.click(lambda: (), None, trail, **quiet)


def _with_box(trail: tuple[Query, ...], box: Box | None) -> tuple[Query, ...]:
    return (*trail, trail[-1].instead(replace(trail[-1].picture, box=box))) if trail else trail


def chips_html(trail: tuple[Query, ...]) -> str:
    """Of a search by several pictures, each with a way to take it out."""
    if not trail or len(trail[-1].pictures) < 2:
        return ""
    query, count = trail[-1], len(trail[-1].positive)
    html = f'<h4>Like these</h4><ul class="chips">{_chips(query.positive, 0)}</ul>'
    if query.negative:
        html += f'<h4>Not like these</h4><ul class="chips unlike">{_chips(query.negative, count)}</ul>'
    return html


def _chips(pictures: tuple[Chosen, ...], first: int) -> str:
    chips = []
    for at, chosen in enumerate(pictures, first):
        words = escape(f"Take out {described(chosen.name, chosen.label)}")
        image = f'<img src="{escape(chosen.url)}" alt="{words}">'
        chips.append(f'<li><button class="chip" data-at="{at}" title="{words}">{image}</button></li>')
    return "".join(chips)


def steps_html(trail: tuple[Query, ...]) -> str:
    """Small pictures to walk back to; nothing before there is a way back."""
    if len(trail) < 2:
        return ""
    steps, first = [], max(0, len(trail) - SHOWN)
    for at, query in enumerate(trail[first:], first):
        chosen, more = query.picture, len(query.pictures) - 1
        words = described(chosen.name, chosen.label) + (" and others" if more else "")
        words += ", a part" if chosen.box else ""
        now = ' aria-current="step"' if at == len(trail) - 1 else ""
        steps.append(
            f'<li><button class="step" data-at="{at}" title="{escape(words)}"{now}>'
            f'<img src="{escape(chosen.url)}" alt="{escape(f"Back to {words}")}"></button></li>'
        )
    return f'<h4>The way here</h4><ul class="steps">{"".join(steps)}</ul>'
