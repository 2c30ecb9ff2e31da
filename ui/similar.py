"""The first tab: the collection, and the nearest of it to a picture. A click on any picture searches from there."""

from html import escape

import gradio as gr

from serving.client import Item, Match, ServiceError
from ui.picture import (
    Chosen,
    UploadFailed,
    clicked,
    described,
    facts_html,
    notice,
    read,
    thumbnail_url,
    uploaded,
    warn,
    well_html,
)

PAGE = 60  # pictures of the collection at a time
EMPTY = "The collection is empty. Fill it with `python serving/bulk.py --data ~/Pictures`, then open this page again."
ALONE = "There is no other picture in the collection yet."
ALIKE = "<h2>Most alike</h2><p>Nearest first, with the cosine of the embeddings. Choose one to go on from there.</p>"

GRID_JS = """
element.addEventListener("click", (event) => {
    const tile = event.target.closest("button[data-id]");
    if (tile) trigger("click", { ...tile.dataset });
});
watch("value", () => window.scrollTo({ top: 0, behavior: "smooth" }));
"""


async def collection(client, offset: int) -> tuple[str, str, int]:
    """Heading, grid and size of the collection, from `offset` on. raises ServiceError."""
    try:
        answer = await client.items(limit=PAGE, offset=offset)
    except ServiceError as error:
        if error.status != 404:
            raise
        return "", notice(EMPTY), 0  # nobody has put anything into it yet
    count, items = answer.count, answer.items
    if not count:
        return "", notice(EMPTY), 0
    if count > PAGE:
        extent = f"{offset + 1:,} to {offset + len(items):,} of {count:,} pictures"
    else:
        extent = "1 picture" if count == 1 else f"{count:,} pictures"
    heading = f"<h2>Your collection</h2><p>{extent}. Choose one to find others like it.</p>"
    return heading, grid_html(items), count


async def neighbours(client, chosen: Chosen, k: int) -> tuple[str, str]:
    """Heading and grid of the k nearest. raises ServiceError, UploadFailed."""
    query = {"positive": [chosen.id]} if chosen.id is not None else {"image": await read(client, chosen)}
    try:
        results = (await client.search(**query, k=k)).results
    except ServiceError as error:
        if error.status != 404 or chosen.id is not None:
            raise
        results = []
    if not results:
        return "", notice(EMPTY if chosen.id is None else ALONE)
    return ALIKE, grid_html(results)


def grid_html(items: list[Item]) -> str:
    """Tiles of a picture with its name and label, and its similarity where it has one.

    Made here, with everything escaped: Gradio's own template language would run a `${...}` in a file name.
    """
    return f'<ul class="grid">{"".join(map(_tile, items))}</ul>'


def _tile(item: Item) -> str:
    data = f'data-id="{escape(item.id)}" data-name="{escape(item.name)}"'
    if item.label:
        data += f' data-label="{escape(item.label)}"'
    score = f'<span class="score">{item.similarity:.2f}</span>' if isinstance(item, Match) else ""
    return (
        f'<li><button class="tile" {data}>'
        f'<img loading="lazy" src="{escape(thumbnail_url(item.id))}" alt="{escape(described(item.name, item.label))}">'
        f'<span class="caption">{score}{facts_html(item.name, item.label)}</span></button></li>'
    )


def tab(client, trail: gr.State, well: gr.HTML, back: gr.Button, everything: gr.Button, page: gr.Blocks) -> None:
    """Build the tab, and wire whatever changes the `trail`: the pictures looked at, the last being the present one."""
    with gr.Row(elem_id="similar-bar"):
        heading = gr.HTML(apply_default_css=False, elem_id="heading", elem_classes="heading")
        k = gr.Slider(1, 100, value=24, step=1, label="How many", elem_id="k", visible=False)
    grid = gr.HTML(js_on_load=GRID_JS, apply_default_css=False, elem_id="grid")
    with gr.Row(elem_id="pager"):
        previous = gr.Button("Previous", size="sm", elem_id="previous", visible=False)
        more = gr.Button("More", size="sm", elem_id="more", visible=False)
    offset = gr.State(0)
    shown = [trail, offset, well, heading, grid, k, back, everything, previous, more]

    async def show(trail: tuple[Chosen, ...], k: int, offset: int):
        """Everything this tab shows. What goes wrong is said in words, and leaves what was there."""
        chosen, count = (trail[-1] if trail else None), 0
        try:
            if chosen:
                title, tiles = await neighbours(client, chosen, int(k))
            else:
                title, tiles, count = await collection(client, offset)
        except (ServiceError, UploadFailed) as error:
            if chosen:
                warn(error)
                return gr.skip()
            title, tiles = "", notice(str(error))
        visible = [gr.update(visible=v) for v in (*[chosen is not None] * 3, offset > 0, offset + PAGE < count)]
        return trail, offset, well_html(chosen), title, tiles, *visible

    async def upload(trail, k, offset, event: gr.EventData):
        try:
            chosen = uploaded(event)
        except UploadFailed as error:
            warn(error)
            return gr.skip()
        return await show((*trail, chosen), k, offset)

    async def click(trail, k, offset, event: gr.EventData):
        return await show((*trail, clicked(event)), k, offset)

    async def step_back(trail, k, offset):
        return await show(trail[:-1], k, offset)

    async def show_everything(k, offset):
        return await show((), k, offset)

    async def turn(k, offset, pages: int):
        return await show((), k, max(0, offset + pages * PAGE))

    async def turn_back(k, offset):
        return await turn(k, offset, -1)

    async def turn_on(k, offset):
        return await turn(k, offset, 1)

    quiet = {"outputs": shown, "show_progress": "hidden", "api_visibility": "private"}
    page.load(show, [trail, k, offset], **quiet)
    well.upload(upload, [trail, k, offset], **quiet)
    grid.click(click, [trail, k, offset], **quiet)
    k.release(show, [trail, k, offset], trigger_mode="always_last", **quiet)
    back.click(step_back, [trail, k, offset], **quiet)
    everything.click(show_everything, [k, offset], **quiet)
    previous.click(turn_back, [k, offset], **quiet)
    more.click(turn_on, [k, offset], **quiet)
