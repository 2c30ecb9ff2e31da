"""A result, large: the original where the service can read its file, its facts, and a button to search from it.

large.js opens it by the button that `open_button_html` puts on a tile, and by Space or the key o.
"""

from html import escape
from pathlib import PurePosixPath
from typing import Any

import gradio as gr

from serving.client import AsyncClient, Item, ServiceError
from ui.api import ON_TRAIL
from ui.assets import raw_html
from ui.search.picture import clicked
from ui.search.query import Query, SearchSettings, Trail
from ui.search.selection import items_of
from ui.tabs.tab import to_similar

FRAME = """
<dialog class="large" aria-labelledby="large-name" tabindex="-1">
  <div class="large-stage">
    <img alt="">
    <button type="button" data-step="-1" aria-label="Previous result" title="Previous (left arrow)"></button>
    <button type="button" data-step="1" aria-label="Next result" title="Next (right arrow)"></button>
    <p class="large-note" role="status"></p>
  </div>
  <div class="large-about">
    <header><span class="large-place"></span>
      <button type="button" data-do="close" aria-label="Close" title="Close (Escape)">&times;</button></header>
    <h2 id="large-name" aria-live="polite"></h2>
    <p><span class="score large-score"></span> <span class="large-rank"></span></p>
    <button type="button" class="small strong" data-do="search">Search from this picture</button>
    <a class="large-original" target="_blank" rel="noopener" hidden>Open the original in a new tab</a>
    <dl></dl>
  </div>
</dialog>
"""


def overlay(client: AsyncClient, trail: gr.State, tabs: gr.Tabs) -> None:
    """Build the overlay of a page. It is hidden until a tile opens it."""

    async def facts(data: dict[str, Any]) -> str:
        return await look_up(client, str(data["id"]), str(data["collection"]), data.get("encoder"))

    def search(trail: Trail, event: gr.EventData) -> tuple[Trail, gr.Tabs]:
        return (*trail, Query((clicked(event),))), to_similar()

    frame = raw_html(None, ["widgets/large"], [facts], html_template=FRAME, elem_id="large")
    frame.search(search, trail, [trail, tabs], **ON_TRAIL)


def open_button_html(name: str) -> str:
    """The button on a tile that opens its picture large. name: of the picture, escaped."""
    return f'<button type="button" class="open" aria-label="Open {name} large" title="Open large (Space)"></button>'


async def look_up(client: AsyncClient, id: str, collection: str, encoder: str | None) -> str:
    """The `facts_html` of the item, or a row that says why there are none."""
    try:
        items = await items_of(client, [id], SearchSettings(collection=collection, encoder=encoder))
    except ServiceError as error:
        return _row("Problem", str(error))
    return facts_html(items[0]) if items else _row("Problem", "It has been deleted since it was found.")


def facts_html(item: Item) -> str:
    """What is known of an item, as rows of a list."""
    rows = [_row("Label", item.label)] if item.label else []
    if item.width:
        rows.append(_row("Size", f"{item.width:,} × {item.height:,} pixels, {_file_size(item.bytes)}"))
    rows += [_row(key, str(value)) for key, value in item.metadata.items()]
    place = item.path or item.name
    return "".join(rows) + _row("File" if item.path else "Name", place) * (place != PurePosixPath(place).name)


def _row(title: str, text: str) -> str:
    return f"<div><dt>{escape(title)}</dt><dd>{escape(text).replace('/', '/<wbr>')}</dd></div>"


def _file_size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} kB"
