"""The tab of what the encoder overlooks: how far h moves as one augmentation grows."""

from dataclasses import asdict
from html import escape

import gradio as gr

from serving.client import ServiceError
from serving.client.calls import COLLECTION
from ui.api import publish
from ui.search.picture import Chosen, UploadFailed, notice, read
from ui.search.query import Query
from ui.widgets.curves import panels_html

TITLE = "Invariance"
EXPLANATION = (
    "Each picture is changed in one way only, more and more: how far does its embedding h go? At 0 % it stays where it "
    "was, at 100 % it has gone as far as to another picture. A flat line: the encoder overlooks it."
)
WORKING = "Looking at {count} pictures, each changed in 26 ways. The first time, PyTorch has to be loaded for it."
EMPTY = "Pictures of the collection are compared, and it holds fewer than two. Fill it, then come back."
CSS = """
#examining { display: grid; grid-template-columns: minmax(0, 1fr) 220px 120px; gap: 12px 32px; align-items: end; }
#examining button { align-self: end; }
.finding { margin: 4px 0 16px; max-width: 90ch; line-height: 1.5; text-wrap: pretty; }
.finding::first-letter { text-transform: uppercase; }
@media (max-width: 760px) { #examining { grid-template-columns: minmax(0, 1fr); } }
"""


async def examined(client, chosen: Chosen | None, count: int, seed: int, collection: str) -> str:
    """What is noticed most and least in words, and the curves. raises ServiceError, UploadFailed."""
    image = await read(client, chosen) if chosen else None
    found = await client.invariance(image, int(count), int(seed), collection=collection)
    return f'<p class="finding">{escape(found.sentence)}</p>' + panels_html(found, chosen and chosen.name)


def tab(client, trail: gr.State, collection: gr.Dropdown, tabs: gr.Tabs) -> None:
    """Build the tab. It looks at pictures only while it is the one in sight."""
    with gr.Row(elem_id="examining"):
        gr.HTML(f'<p class="explanation">{EXPLANATION}</p>', apply_default_css=False)
        count = gr.Slider(2, 64, value=16, step=1, label="Pictures", elem_id="examined-count")
        others = gr.Button("Other pictures", size="sm", elem_id="others")
    curves = gr.HTML(apply_default_css=False, elem_id="curves")
    in_sight, seed = gr.State(False), gr.State(0)

    async def look(trail: tuple[Query, ...], in_sight: bool, count: int, seed: int, collection: str):
        if not in_sight:
            yield gr.skip()
            return
        yield f'<p class="notice working" role="status">{WORKING.format(count=int(count))}</p>'
        try:
            yield await examined(client, trail[-1].picture if trail else None, count, seed, collection)
        except (ServiceError, UploadFailed) as error:
            empty = isinstance(error, ServiceError) and error.param in ("collection", "name")
            yield notice(EMPTY if empty else str(error))

    def came(event: gr.SelectData) -> bool:
        return event.value == TITLE

    async def invariance(id: str = "", collection: str = COLLECTION, count: int = 16, seed: int = 0) -> dict:
        """id: of an item to follow; by default the first of the sample."""
        image = await client.thumbnail(id, collection=collection) if id else None
        return asdict(await client.invariance(image, count, seed, collection=collection))

    silent = {"show_progress": "hidden", "api_visibility": "private"}
    looking = {"fn": look, "inputs": [trail, in_sight, count, seed, collection], "outputs": curves} | silent
    looking |= {"trigger_mode": "always_last"}
    tabs.select(came, None, in_sight, **silent).then(**looking)
    others.click(lambda seed: seed + 1, seed, seed, **silent).then(**looking)
    gr.on([trail.change, count.release, collection.change], **looking)
    publish(invariance, "invariance")
