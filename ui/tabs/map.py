"""The map: the whole collection in the plane, what is alike close together. What is chosen on it is shown below it.

The browser draws it (map.js), of columns that it gets once. It sends the outline of what was chosen, not the ids.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np
import orjson
from fastapi.responses import Response

from serving.client import Item, Map, ServiceError
from serving.client.calls import COLLECTION
from ui.api import publish
from ui.search import selection
from ui.search.choice import Choice
from ui.search.picture import Chosen, clicked, notice, warn
from ui.search.query import Query, Settings
from ui.widgets import computing
from ui.widgets.grid import grid_html
from ui.widgets.results import EMPTY

TITLE = "Map"
SHOWN = 200  # pictures of a choice
JS = Path(__file__).with_name("map.js").read_text(encoding="utf-8")
NONE = (
    "There is no map of this collection yet. On it each picture has a place close to those that look like it. "
    "It takes seconds for some thousand pictures, and minutes for 100,000."
)
EXPLANATION = "What looks alike stands close together. Draw around some to see them; choose one to search."
TOOLS = """
<div class="map" hidden>
  <div class="map-tools" role="toolbar" aria-label="Map">
    <span class="map-set">
      <button type="button" data-mode="move" aria-pressed="true" title="Shift and drag draws">Move</button>
      <button type="button" data-mode="lasso" aria-pressed="false" title="Draw around pictures">Lasso</button>
      <button type="button" data-mode="box" aria-pressed="false" title="Draw a box around pictures">Box</button>
    </span>
    <span class="map-set">
      <button type="button" data-do="farther" aria-label="Farther">&minus;</button>
      <button type="button" data-do="closer" aria-label="Closer">+</button>
      <button type="button" data-do="whole">Whole map</button>
    </span>
    <button type="button" data-do="view" title="Show the pictures of this part below">Gather these</button>
    <button type="button" data-do="pictures" aria-pressed="false">Thumbnails</button>
    <span class="map-set map-by" hidden>
      <button type="button" data-by="label" aria-pressed="true">Labels</button>
      <button type="button" data-by="group" aria-pressed="false" title="By k-means of the embeddings">Groups</button>
    </span>
  </div>
  <div class="map-frame">
    <div class="map-stage">
      <canvas tabindex="0" role="img" data-keys="Arrow keys move, plus and minus zoom, 0 shows the whole map, Enter
        gathers the pictures of this part."></canvas>
      <div class="map-pictures" aria-hidden="true"></div>
      <div class="map-tip" hidden><img alt=""><span></span></div>
    </div>
    <div class="map-side">
      <div class="map-legend" role="group" aria-label="What stands out"></div>
      <button type="button" data-do="picked" hidden>Gather these</button>
      <button type="button" data-do="all" hidden>All again</button>
    </div>
  </div>
</div>
"""
CHOICE_JS = """
element.addEventListener("click", async (event) => {
    const tile = event.target.closest("button[data-id]"), list = event.target.closest("button[data-choice]");
    if (tile) trigger("click", { ...tile.dataset });
    if (!list) return;
    list.disabled = true;
    const text = await server.listed(JSON.parse(list.dataset.choice)).catch(() => null);
    list.disabled = false;
    if (text === null) return void (list.textContent = "The list could not be made; try again");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "chosen.csv";
    link.click();
    URL.revokeObjectURL(link.href);
});
"""

CSS = """
.map[hidden], .map [hidden] { display: none; }
.map-tools { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 10px; }
.map button {
  font-size: 13px; padding: 4px 11px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-primary); color: var(--body-text-color); cursor: pointer;
}
.map button:hover { border-color: var(--primary-600); }
.map button:focus-visible, .map canvas:focus-visible { outline: 2px solid var(--primary-500); outline-offset: 2px; }
.map-tools [aria-pressed="true"] { background: var(--primary-700); border-color: var(--primary-700); color: white; }
.map-set { display: inline-flex; }
.map-set button { border-radius: 0; margin-left: -1px; }
.map-set button:first-child { border-radius: 8px 0 0 8px; margin: 0; }
.map-set button:last-child { border-radius: 0 8px 8px 0; }
.map-by { margin-left: auto; }
.map-frame { display: grid; grid-template-columns: minmax(0, 1fr) 190px; gap: 18px; }
.map-stage {
  position: relative; height: min(68vh, 680px); min-height: 340px; overflow: hidden; border-radius: 14px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-primary);
}
.map canvas { display: block; width: 100%; height: 100%; touch-action: none; cursor: grab; border-radius: 13px; }
.map-pictures { position: absolute; inset: 0; pointer-events: none; }
.map-pictures img {
  position: absolute; top: 0; left: 0; width: 54px; height: 54px; object-fit: cover; border: 2px solid;
  border-radius: 8px;
  background: var(--neutral-200); animation: appear 0.15s both;
}
.map-tip {
  position: absolute; top: 0; left: 0; width: 148px; padding: 6px; border-radius: 12px; pointer-events: none;
  font-size: 13px; background: var(--background-fill-primary); border: 1px solid var(--border-color-primary);
  box-shadow: 0 6px 22px rgb(0 0 0 / 0.2);
}
.map-tip img {
  display: block; width: 100%; aspect-ratio: 1; object-fit: contain; margin-bottom: 4px; border-radius: 7px;
}
.map-tip span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.map-side { display: flex; flex-direction: column; gap: 8px; align-items: stretch; max-height: min(68vh, 680px); }
.map-legend { overflow-y: auto; min-height: 0; }
.map .map-legend button {
  display: grid; grid-template-columns: 10px minmax(0, 1fr) auto; gap: 8px; align-items: center; width: 100%;
  padding: 3px 8px; border-color: transparent; background: none; text-align: left; line-height: 1.5;
}
.map .map-legend button:hover { background: var(--neutral-200); }
.dark .map .map-legend button:hover { background: var(--neutral-800); }
.map .map-legend [aria-pressed="true"] { border-color: var(--primary-600); }
.map-legend i { width: 10px; height: 10px; border-radius: 50%; }
.map-legend span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.map-legend b { font-weight: 400; font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); }
.map-legend .faint { opacity: 0.45; }
#map-choice { margin-top: 18px; }
#map-choice .pick, #map-choice .signs { display: none; }
#map-choice .grid { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 14px 12px; }
#map-choice .heading { margin-bottom: 14px; }
@media (max-width: 760px) {
  .map-frame { grid-template-columns: minmax(0, 1fr); gap: 10px; }
  .map-stage { height: 62vh; }
  .map-side { max-height: 150px; }
  .map-by { margin-left: 0; }
}
"""


async def columns(client, collection: str) -> Response:
    """What the browser draws of. raises ServiceError"""
    found = await client.map(collection=collection)
    packed = {name: base64.b64encode(getattr(found, name)).decode() for name in ("x", "y", "group", "label")}
    return Response(orjson.dumps(packed | {"ids": found.ids, "labels": found.labels}), media_type="application/json")


async def gathered(client, wanted: Choice) -> str:
    """The first SHOWN of what was chosen, and how many there are. raises ServiceError"""
    ids = wanted.of(await client.map(collection=wanted.collection))
    if not ids:
        return notice("No picture lies there. Draw around some, or choose labels beside the map.")
    found = await items(client, ids[:SHOWN], wanted.collection)
    count = "1 picture" if len(ids) == 1 else f"{len(ids):,} pictures"
    part = f"The first {SHOWN} are shown. " if len(ids) > SHOWN else ""
    told = escape(json.dumps(asdict(wanted)))
    words = f'{part}Choose one to find others like it. <button type="button" class="link" data-choice="{told}">'
    heading = f'<div class="heading"><h2>{count} chosen</h2><p>{words}List all as CSV</button></p></div>'
    return heading + grid_html(found, wanted.collection)


async def items(client, ids: Sequence[str], collection: str) -> list[Item]:
    """Those that are still there. raises ServiceError"""
    told = {"chosen": [(id, None) for id in ids]}
    rows = await selection.selected(client, told, Settings(collection=collection), lambda done, of: None)
    return [item for item, _ in rows]


def plain(found: Map) -> dict:
    """For programs: columns of numbers, and how far the next map is."""
    labels = [found.labels[number] if number >= 0 else None for number in found.label]
    numbers = {name: np.asarray(getattr(found, name)).tolist() for name in ("x", "y", "group")}
    told = {name: getattr(found, name) for name in ("state", "stage", "share", "problem", "count", "new", "gone")}
    return told | {"ids": found.ids, "label": labels} | numbers


def tab(client, trail: gr.State, collection: gr.Dropdown, tabs: gr.Tabs) -> None:
    """Build the tab. It asks how its map is when it comes in sight, and while one is made."""

    async def places(collection: str) -> Response | None:
        try:
            return await columns(client, collection)
        except ServiceError:
            return None  # the next look says why

    async def listed(told: dict) -> str | None:
        try:
            wanted = Choice.parse(told)
            ids = wanted.of(await client.map(collection=wanted.collection))
            return selection.as_csv([(item, None) for item in await items(client, ids, wanted.collection)])
        except (ServiceError, ValueError):
            return None

    with gr.Row(elem_classes="computing"):
        status = gr.HTML(apply_default_css=False, elem_id="map-status")
        make = gr.Button("Make the map", size="sm", elem_id="make-map", visible=False)
    stage = gr.HTML(
        None,
        html_template=TOOLS,
        js_on_load=JS,
        apply_default_css=False,
        elem_id="map",
        server_functions=[places],
    )
    gathering = gr.HTML(js_on_load=CHOICE_JS, apply_default_css=False, elem_id="map-choice", server_functions=[listed])
    timer = gr.Timer(computing.POLL_S, active=False)
    in_sight = gr.State(False)

    async def look(in_sight: bool, collection: str):
        if not in_sight:
            return gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)
        try:
            found = await client.map(places=False, collection=collection)
        except ServiceError as error:
            words = EMPTY if error.status == 404 else str(error)
            return notice(words), gr.update(visible=False), None, gr.Timer(active=False)
        shown = {"collection": collection, "made": found.made, "new": found.new, "gone": found.gone}
        words = computing.told(found, "The map", NONE, EXPLANATION)
        button = computing.button(found, "Make the map", "Make it anew")
        return words, button, shown if found.made else None, computing.ticking(found)

    async def start(collection: str) -> None:
        try:
            await client.compute_map(collection=collection)
        except ServiceError as error:
            warn(error)

    async def gather(event: gr.EventData) -> str:
        try:
            return await gathered(client, Choice.parse(event._data or {}))
        except (ServiceError, ValueError) as error:
            return notice(str(error))

    async def seek(trail: tuple[Query, ...], collection: str, event: gr.EventData):
        """Search from a point. Its name is not among the columns."""
        try:
            item = await client.item(str((event._data or {}).get("id")), collection=collection)
        except ServiceError as error:
            warn(error)
            return gr.skip()
        return (*trail, Query((Chosen(item.name, item.label, item.id, collection=collection),))), to_similar()

    def click(trail: tuple[Query, ...], event: gr.EventData):
        return (*trail, Query((clicked(event),))), to_similar()

    def came(event: gr.SelectData) -> bool:
        return event.value == TITLE

    async def map_(collection: str = COLLECTION) -> dict:
        return plain(await client.map(collection=collection))

    silent = {"show_progress": "hidden", "api_visibility": "private"}
    looking = {"fn": look, "inputs": [in_sight, collection], "outputs": [status, make, stage, timer]} | silent
    tabs.select(came, None, in_sight, **silent).then(**looking)
    make.click(start, collection, None, **silent).then(**looking)
    timer.tick(**looking)
    collection.change(**looking).then(lambda: "", None, gathering, **silent)
    stage.gather(gather, None, gathering, trigger_mode="always_last", **silent)
    stage.seek(seek, [trail, collection], [trail, tabs], **silent)
    gathering.click(click, trail, [trail, tabs], **silent)
    publish(map_, "map")


def to_similar() -> gr.Tabs:
    return gr.Tabs(selected="similar")
