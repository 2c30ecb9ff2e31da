"""The column next to the tabs: the current picture, all pictures and words of the search, and earlier searches."""

from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from ui.api import ON_TRAIL, QUIET
from ui.assets import raw_html
from ui.search.crop import Box
from ui.search.picture import Picture, UploadFailed, uploaded, warn
from ui.search.query import Query, Trail
from ui.widgets.camera import camera
from ui.widgets.well import well, well_html

MOST_STEPS = 16  # most earlier searches shown


def column(trail: gr.State) -> None:
    """Build the column. It shows the `trail`, and changes it by uploads and clicks."""
    place, lens = well(), camera()
    chips = raw_html(scripts=["widgets/side"], elem_id="chips")
    steps = raw_html(scripts=["widgets/side"], elem_id="steps")
    with gr.Row(elem_id="way"):
        back = gr.Button("Back", size="sm", min_width=60, elem_id="back", visible=False)
        everything = gr.Button("All pictures", size="sm", min_width=60, elem_id="all", visible=False)
    trail.change(show_trail, trail, [place, chips, steps, back, everything], **QUIET)
    gr.on([place.upload, lens.upload], upload, trail, trail, **ON_TRAIL)
    place.part(search_part, trail, trail, **ON_TRAIL)
    place.whole(search_whole, trail, trail, **ON_TRAIL)
    chips.choose(remove, trail, trail, **ON_TRAIL)
    steps.choose(return_to, trail, trail, **ON_TRAIL)
    back.click(step_back, trail, trail, **ON_TRAIL)
    everything.click(lambda: (), None, trail, **ON_TRAIL)


def show_trail(trail: Trail) -> tuple[Any, ...]:
    buttons = [gr.update(visible=bool(trail))] * 2
    return well_html(trail[-1].picture if trail else None), chips_html(trail), steps_html(trail), *buttons


def upload(trail: Trail, event: gr.EventData) -> Any:
    try:
        return (*trail, Query(uploaded(event)))
    except UploadFailed as error:
        warn(error)
        return gr.skip()


def search_part(trail: Trail, event: gr.EventData) -> Any:
    try:
        return _with_box(trail, Box.from_edges((event._data or {}).get("box") or ()))
    except (ValueError, TypeError):  # no browser sends that
        return gr.skip()


def search_whole(trail: Trail) -> Trail:
    return _with_box(trail, None)


def _with_box(trail: Trail, box: Box | None) -> Trail:
    picture = trail[-1].picture if trail else None
    return (*trail, trail[-1].replace_first(replace(picture, box=box))) if picture else trail


def remove(trail: Trail, event: gr.EventData) -> Trail:
    at, pictures = int(event._data["at"]), trail[-1].pictures
    query = trail[-1].without(pictures[at]) if at < len(pictures) else trail[-1].without_text()
    return (*trail, query) if query else trail[:-1]


def return_to(trail: Trail, event: gr.EventData) -> Trail:
    return trail[: int(event._data["at"]) + 1]


def step_back(trail: Trail) -> Trail:
    return trail[:-1]


def chips_html(trail: Trail) -> str:
    """The pictures and words of a search by several; each is a button that removes it."""
    if not trail or len(trail[-1].pictures) + bool(trail[-1].text) < 2:
        return ""
    query = trail[-1]
    chips = _chips(query.positive, 0)
    if query.text:
        title = escape(f"Remove {_quoted(query.text)}")
        words = f'<span class="words">{escape(query.text)}</span>'
        chips += f'<li><button class="chip" data-at="{len(query.pictures)}" title="{title}">{words}</button></li>'
    html = f'<h4>Like these</h4><ul class="chips">{chips}</ul>'
    if query.negative:
        chips = _chips(query.negative, len(query.positive))
        html += f'<h4>Not like these</h4><ul class="chips unlike">{chips}</ul>'
    return html


def _chips(pictures: tuple[Picture, ...], first: int) -> str:
    chips = []
    for at, picture in enumerate(pictures, first):
        title = escape(f"Remove {picture.description}")
        image = f'<img src="{escape(picture.url)}" alt="{title}">'
        chips.append(f'<li><button class="chip" data-at="{at}" title="{title}">{image}</button></li>')
    return "".join(chips)


def steps_html(trail: Trail) -> str:
    """The searches so far as small pictures to return to; empty for the first search."""
    if len(trail) < 2:
        return ""
    first = max(0, len(trail) - MOST_STEPS)
    steps = [_step(query, at, at == len(trail) - 1) for at, query in enumerate(trail[first:], first)]
    return f'<h4>History</h4><ul class="steps">{"".join(steps)}</ul>'


def _step(query: Query, at: int, current: bool) -> str:
    picture, others = query.picture, " and others" * (len(query.pictures) + bool(query.text) > 1)
    if picture is None:
        title = _quoted(query.text) + others
        shown = f'<span class="words">{escape(query.text)}</span>'
    else:
        title = picture.description + others + ", a part" * (picture.box is not None)
        shown = f'<img src="{escape(picture.url)}" alt="{escape(f"Back to {title}")}">'
    mark = ' aria-current="step"' if current else ""
    return f'<li><button class="step" data-at="{at}" title="{escape(title)}"{mark}>{shown}</button></li>'


def _quoted(text: str) -> str:
    return f"“{text}”"
