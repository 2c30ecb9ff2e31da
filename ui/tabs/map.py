"""The tab Map: the whole collection in the plane, with similar pictures close together.

map.js draws it from columns that the browser loads once. When pictures are chosen, the browser sends the outline, not
their ids; the pictures inside are listed below the map.
"""

import base64
import json
from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr
import numpy as np
import orjson
from fastapi.responses import Response

from serving.client import COLLECTION, AsyncClient, Map, ServiceError
from serving.protocol.shown import counted
from ui.api import EACH, ON_TRAIL, QUIET, publish
from ui.assets import raw_html
from ui.search import selection
from ui.search.choice import Choice
from ui.search.picture import Picture, clicked, notice, warn
from ui.search.query import Query, SearchSettings, Trail
from ui.tabs.tab import Tab, to_similar
from ui.widgets import computing
from ui.widgets.grid import ACTS_HTML, grid_html
from ui.widgets.results import EMPTY

MOST_SHOWN = 200  # pictures of a choice
NONE = (
    "There is no map of this collection yet. On it, pictures that look alike are close together. "
    "It takes seconds for some thousand pictures, and minutes for 100,000."
)
EXPLANATION = "Similar pictures are close together. Draw around some to list them; click one to search."
TOOLS = """
<div class="map" hidden>
  <div class="map-tools" role="toolbar" aria-label="Map">
    <span class="map-set">
      <button type="button" data-mode="move" aria-pressed="true" title="Drag with Shift to draw">Move</button>
      <button type="button" data-mode="lasso" aria-pressed="false" title="Draw around pictures">Lasso</button>
      <button type="button" data-mode="box" aria-pressed="false" title="Draw a box around pictures">Box</button>
    </span>
    <span class="map-set">
      <button type="button" data-do="farther" aria-label="Zoom out">&minus;</button>
      <button type="button" data-do="closer" aria-label="Zoom in">+</button>
      <button type="button" data-do="whole">Whole map</button>
    </span>
    <button type="button" data-do="view" title="Show the pictures of this part below">Show these</button>
    <button type="button" data-do="pictures" aria-pressed="false">Thumbnails</button>
    <span class="map-set map-by" hidden>
      <button type="button" data-by="label" aria-pressed="true">Labels</button>
      <button type="button" data-by="group" aria-pressed="false" title="By k-means of the embeddings">Groups</button>
    </span>
  </div>
  <div class="map-frame">
    <div class="map-stage">
      <canvas tabindex="0" role="img" data-keys="Arrow keys move, plus and minus zoom, 0 shows the whole map, Enter
        lists the pictures of this part."></canvas>
      <div class="map-pictures" aria-hidden="true"></div>
      <div class="map-tip" hidden><img alt=""><span></span></div>
    </div>
    <div class="map-side">
      <div class="map-legend" role="group" aria-label="Labels to highlight"></div>
      <button type="button" data-do="picked" hidden>Show these</button>
      <button type="button" data-do="all" hidden>Show all</button>
    </div>
  </div>
</div>
"""


async def columns(client: AsyncClient, collection: str) -> Response:
    """The map as map.js reads it. Raises ServiceError."""
    map = await client.map(collection=collection)
    arrays = {name: base64.b64encode(getattr(map, name)).decode() for name in ("x", "y", "group", "label")}
    return Response(orjson.dumps(arrays | {"ids": map.ids, "labels": map.labels}), media_type="application/json")


async def choice_html(client: AsyncClient, choice: Choice) -> str:
    """The first MOST_SHOWN of the chosen pictures, and how many there are. Raises ServiceError."""
    ids = choice.ids(await client.map(collection=choice.collection))
    if not ids:
        return notice("No picture is in this part. Draw around some pictures, or choose labels next to the map.")
    items = await selection.items_of(client, ids[:MOST_SHOWN], SearchSettings(collection=choice.collection))
    part = f"The first {MOST_SHOWN} are shown. " if len(ids) > MOST_SHOWN else ""
    heading = f'<div class="heading"><h2>{counted(len(ids))} chosen</h2><p>{part}Click one to find others like it.</p>'
    bar = f'<div class="selection some" data-choice="{escape(json.dumps(asdict(choice)))}" data-count="{len(ids)}">'
    return f"{heading}</div>{bar}{ACTS_HTML}</div>{grid_html(items, choice.collection)}"


def to_dict(map: Map) -> dict[str, Any]:
    """The map for programs: columns of numbers, and the progress of the next map."""
    names = ("state", "stage", "share", "problem", "count", "new", "gone")
    numbers = {name: np.asarray(getattr(map, name)).tolist() for name in ("x", "y", "group")}
    labels = [map.labels[number] if number >= 0 else None for number in map.label]
    return {name: getattr(map, name) for name in names} | {"ids": map.ids, "label": labels} | numbers


class MapTab(Tab):
    """Loads the map's state when it is selected, and repeatedly while a map is computed."""

    title = "Map"

    def build(self) -> None:
        with gr.Row(elem_classes="computing"):
            self.status = raw_html(elem_id="map-status")
            self.make = gr.Button("Make the map", size="sm", elem_id="make-map", visible=False)
        self.stage = raw_html(None, ["tabs/map"], [self.places], html_template=TOOLS, elem_id="map")
        self.choice = raw_html("", ["save", "tabs/choice"], [self.export_text], elem_id="map-choice")
        self.timer = gr.Timer(computing.POLL_S, active=False)

    def connect(self) -> None:
        outputs = [self.status, self.make, self.stage, self.timer]
        refreshing: dict[str, Any] = {
            "fn": self.refresh,
            "inputs": [self.selected, self.collection],
            "outputs": outputs,
            **QUIET,
        }
        self.selected.change(**refreshing)
        self.make.click(self.start, self.collection, None, **QUIET).then(**refreshing)
        self.timer.tick(**refreshing)
        self.changed.change(**refreshing)
        self.collection.change(**refreshing).then(lambda: "", None, self.choice, **QUIET)
        self.stage.choose(self.choose, None, self.choice, **EACH)
        self.stage.search(self.search, [self.trail, self.collection], [self.trail, self.tabs], **ON_TRAIL)
        self.choice.click(self.click, self.trail, [self.trail, self.tabs], **ON_TRAIL)
        publish(self.map, "map")

    async def places(self, collection: str) -> Response | None:
        try:
            return await columns(self.client, collection)
        except ServiceError:
            return None  # the browser asks again

    async def export_text(self, data: dict[str, Any]) -> str | None:
        """The chosen pictures as a CSV or a list of paths; None if that fails. data: the choice and the format"""
        try:
            choice = Choice.parse(data["choice"])
            ids = choice.ids(await self.client.map(collection=choice.collection))
            items = await selection.items_of(self.client, ids, SearchSettings(collection=choice.collection))
        except (ServiceError, ValueError):
            return None
        if data["format"] == "csv":
            return selection.as_csv([(item, None) for item in items])
        return selection.as_paths(items)

    async def refresh(self, selected: str, collection: str) -> tuple[Any, ...]:
        if selected != self.title:
            return gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)
        try:
            map = await self.client.map(places=False, collection=collection)
        except ServiceError as error:
            words = EMPTY if error.status == 404 else str(error)
            return notice(words), gr.update(visible=False), None, computing.retry(error)
        shown = {"collection": collection, "made": map.made, "new": map.new, "gone": map.gone}
        return (
            computing.status_html(map, "The map", NONE, EXPLANATION),
            computing.start_button(map, "Make the map", "Rebuild"),
            shown if map.made else None,
            computing.timer(map),
        )

    async def start(self, collection: str) -> None:
        try:
            await self.client.compute_map(collection=collection)
        except ServiceError as error:
            warn(error)

    async def choose(self, event: gr.EventData) -> str:
        try:
            return await choice_html(self.client, Choice.parse(event._data or {}))
        except (ServiceError, ValueError) as error:
            return notice(str(error))

    async def search(self, trail: Trail, collection: str, event: gr.EventData) -> Any:
        """Search from a point of the map. The browser knows its id only."""
        try:
            item = await self.client.item(str((event._data or {}).get("id")), collection=collection)
        except ServiceError as error:
            warn(error)
            return gr.skip()
        picture = Picture(item.name, item.label, item.id, collection=collection)
        return (*trail, Query((picture,))), to_similar()

    def click(self, trail: Trail, event: gr.EventData) -> tuple[Trail, gr.Tabs]:
        return (*trail, Query((clicked(event),))), to_similar()

    async def map(self, collection: str = COLLECTION) -> dict[str, Any]:
        return to_dict(await self.client.map(collection=collection))
