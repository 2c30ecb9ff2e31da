"""Asks before pictures are removed, labelled or put into another collection, adds pictures, and offers to undo each.

Tabs say what is to be done by an event `act` of the document (see acts.js). When it is done, the component's event
`changed` lets all tabs show the collection as it is now, and the document's event `acted` tells their scripts.
"""

from typing import Any

import gradio as gr

from serving.access import MAY_WRITE, READ_ONLY
from serving.client import AsyncClient
from ui.api import EACH, PROBLEMS
from ui.assets import raw_html
from ui.search import acts

FRAME = """
<dialog class="confirm" aria-labelledby="ask-title">
  <form method="dialog">
    <h3 id="ask-title"></h3>
    <p class="ask-words"></p>
    <label class="ask-field"><span></span> <input autocomplete="off"></label>
    <p class="buttons"><button type="button" class="small" data-ask="cancel">Cancel</button>
      <button class="small strong" data-ask="do"></button></p>
  </form>
</dialog>
<dialog class="confirm adding" aria-labelledby="adding-title">
  <h3 id="adding-title"></h3>
  <p class="adding-words"></p>
  <p class="adding-choose"><label class="another small">Choose pictures<input type="file" accept="image/*" multiple
      data-add="files"></label> <label class="another small">Choose a folder<input type="file" webkitdirectory
      data-add="folder"></label></p>
  <progress hidden></progress>
  <ul class="adding-failed" aria-label="Not added"></ul>
  <p class="buttons"><button type="button" class="small" data-adding="search" hidden>Search by them</button>
    <button type="button" class="small" data-adding="close">Cancel</button>
    <button type="button" class="small strong" data-adding="add" hidden>Add them</button></p>
</dialog>
<div class="did" hidden><span role="status"></span>
  <button type="button" class="small" data-did="undo">Undo</button>
  <button type="button" class="small" data-did="close" aria-label="Close">&times;</button></div>
"""


def overlay(client: AsyncClient, changed: gr.State) -> None:
    """Build it. `changed` counts the changes."""

    async def act(data: dict[str, Any]) -> acts.Answer:
        collection = str(data["collection"])
        if MAY_WRITE.get() is False:
            return {"message": READ_ONLY, "ids": [], "undo": None}
        try:
            if data["kind"] == "confirm":
                return await acts.confirm(client, data["labels"], collection)
            ids = await acts.chosen_ids(client, data["chosen"] | {"collection": collection})
            if data["kind"] == "remove":
                return await acts.remove(client, ids, collection)
            if data["kind"] == "label":
                return await acts.label(client, ids, str(data["text"]), collection)
            return await acts.copy(client, ids, collection, str(data["text"]))
        except (*PROBLEMS, ValueError) as error:
            return {"message": str(error), "ids": [], "undo": None}

    async def add(data: dict[str, Any]) -> acts.Answer:
        try:
            return await acts.add(client, data["files"], str(data["collection"]))
        except PROBLEMS as error:
            return {"message": str(error), "failed": [], "ids": [], "undo": None}

    async def undo(data: dict[str, Any]) -> acts.Answer:
        return await acts.undo(client, data)

    frame = raw_html(None, ["widgets/upload", "widgets/acts"], [act, add, undo], html_template=FRAME, elem_id="acts")
    frame.changed(lambda count: count + 1, changed, changed, **EACH)
