"""The tab Duplicates: groups of near-duplicates. All pictures of a group but one can be marked and removed."""

from html import escape
from math import ceil
from pathlib import PurePosixPath
from typing import Any

import gradio as gr

from serving.client import COLLECTION, AsyncClient, Duplicates, Match, ServiceError
from ui.api import QUIET, publish
from ui.assets import raw_html
from ui.search import rank, selection
from ui.search.picture import clicked, counted, notice, thumbnail_url, warn
from ui.search.query import Query, SearchSettings, Trail
from ui.tabs.tab import Tab, to_similar
from ui.widgets import computing
from ui.widgets.large import open_button_html
from ui.widgets.results import EMPTY

PAGE = 20  # groups at a time
AT_ONCE = 1000  # groups or ids in one request
LEAST = 0.9  # lowest cosine of the pairs that are stored, unless a lower one was used before
NONE = (
    "The pictures of this collection have not been compared yet. Comparing every pair takes seconds, even for "
    "100,000 pictures."
)
EXPLANATION = "Mark the pictures to remove. The first of each group has the most pixels: keeping it is suggested."
ALONE = "No two pictures have a cosine of {threshold:.3f} or more. Lower the threshold to see less similar pictures."
FRAME = """
<div class="mark-bar" hidden>
  <b class="marked" role="status"></b>
  <button type="button" class="small" data-do="suggested" title="In all groups, on all pages">Mark as suggested</button>
  <span class="of-some">
    <button type="button" class="small" data-do="clear">Clear</button>
    <button type="button" class="small" data-do="csv">Save as CSV</button>
    <button type="button" class="small" data-do="paths" title="One path a line">Save paths</button>
    <button type="button" class="small" data-do="ask">Remove from the collection</button>
  </span>
</div>
<p class="message" role="status"></p>
${value}
<dialog class="confirm" aria-label="Remove pictures from the collection">
  <h3>Remove <span class="pictures"></span> from the collection <span class="collection"></span>?</h3>
  <p>Searches will not find them any more. The files on disk are not touched.
    Within an hour <code>twinview index undo --collection <span class="collection"></span></code> takes this back.</p>
  <label>Type <b class="number"></b> to confirm <input inputmode="numeric" autocomplete="off"></label>
  <p class="buttons"><button type="button" class="small" data-do="keep">Keep them</button>
    <button type="button" class="small danger" data-do="remove" disabled>Remove them</button></p>
</dialog>
"""


def groups_html(duplicates: Duplicates, threshold: float, offset: int, collection: str) -> str:
    """One row per group. Everything is escaped here: Gradio's own templating would run a `${...}` in a file name."""
    start = f'<div class="copies-all" data-collection="{escape(collection)}" data-threshold="{threshold:g}">'
    if duplicates.made is None:
        return f"{start}</div>"
    if not duplicates.groups:
        return f"{start}{notice(ALONE.format(threshold=threshold))}</div>"
    total, last = duplicates.total or 0, offset + len(duplicates.groups)
    several = f"Groups {offset + 1:,} to {last:,} of {total:,}" if total > PAGE else f"{total:,} groups"
    extent = "1 group" if total == 1 else several
    rows = "".join(_group(group, collection) for group in duplicates.groups)
    return f'{start}<div class="heading"><p>{extent}, the largest first.</p></div>{rows}</div>'


def _group(group: list[Match], collection: str) -> str:
    copies = "".join(_copy(item, collection, item is group[0]) for item in group)
    others = "the other" if len(group) == 2 else f"the other {len(group) - 1}"
    return (
        f'<section class="copies" aria-label="{len(group)} alike"><header><b>{len(group)} pictures</b>'
        f'<button type="button" class="link others">Mark {others}</button></header><ol>{copies}</ol></section>'
    )


def _copy(item: Match, collection: str, first: bool) -> str:
    name, id = escape(item.name), escape(item.id)
    label = f' data-label="{escape(item.label)}"' if item.label else ""
    size = f"{item.width} × {item.height}" if item.width else ""
    cosine = "" if first else f'<span class="score">{item.similarity:.3f}</span>'
    ranked = "" if first else rank.rank_html(item.closer_than)
    image = f'<img loading="lazy" alt="" src="{escape(thumbnail_url(item.id, collection))}">'
    return (
        f'<li><button type="button" class="copy" data-id="{id}"{" data-first=yes" if first else ""}'
        f' aria-pressed="false" aria-label="Remove {name}">{image}<span class="verdict"></span></button>'
        f'<span class="facts">{cosine}<span>{size}</span>{ranked}</span>'
        f'<button type="button" class="link search" title="Search for pictures like {name}" data-id="{id}"'
        f' data-name="{name}"{label} data-collection="{escape(collection)}">'
        f"{escape(PurePosixPath(item.name).name)}</button>{open_button_html(name)}</li>"
    )


async def suggest(client: AsyncClient, threshold: float, collection: str) -> list[str]:
    """Ids of all pictures but the first of each group. Raises ServiceError."""
    ids, offset = [], 0
    while True:
        duplicates = await client.duplicates(threshold, AT_ONCE, offset, collection=collection)
        ids += [item.id for group in duplicates.groups for item in group[1:]]
        offset += AT_ONCE
        if offset >= (duplicates.total or 0):
            return ids


async def remove(client: AsyncClient, ids: list[str], collection: str) -> dict[str, Any]:
    """Returns {deleted: ids that are no longer in the collection, message: what happened}."""
    deleted: list[str] = []
    try:
        for at in range(0, len(ids), AT_ONCE):
            deleted += await client.delete_items(ids[at : at + AT_ONCE], collection=collection)
    except ServiceError as error:
        return {"deleted": deleted, "message": f"{counted(len(deleted))} removed, then an error: {error}"}
    back = "this back" if len(ids) <= AT_ONCE else f"the last {len(ids) % AT_ONCE or AT_ONCE:,} back"
    undo = f"Within an hour, twinview index undo --collection {collection} takes {back}."
    return {"deleted": ids, "message": f"{counted(len(deleted))} removed; files were not touched. {undo}"}


async def export_text(client: AsyncClient, ids: list[str], format: str, collection: str) -> str:
    """These items as CSV or as a list of paths. Raises ServiceError."""
    items = await selection.items_of(client, ids, SearchSettings(collection=collection))
    return selection.as_csv([(item, None) for item in items]) if format == "csv" else selection.as_paths(items)


def to_dict(duplicates: Duplicates) -> dict[str, Any]:
    """The result for programs. A path is called `file`: gradio_client would try to download from a `path`."""

    def facts(item: Match) -> dict[str, Any]:
        names = ("id", "name", "label", "width", "height", "similarity", "closer_than")
        return {name: getattr(item, name) for name in names} | {"file": item.path}

    names = ("state", "stage", "share", "problem", "count", "new", "gone", "threshold", "closer_than", "least", "total")
    groups = [[facts(item) for item in group] for group in duplicates.groups]
    return {name: getattr(duplicates, name) for name in names} | {"groups": groups}


class DuplicatesTab(Tab):
    """Loads the groups when it is selected, and repeatedly while they are computed."""

    title = "Duplicates"

    def build(self) -> None:
        with gr.Row(elem_classes="computing"):
            self.status = raw_html(elem_id="duplicates-status")
            self.compare = gr.Button("Compare all", size="sm", elem_id="compare", visible=False)
        with gr.Row(elem_id="limits"):
            self.threshold = gr.Slider(
                LEAST,
                1,
                value=0.95,
                step=0.005,
                label="Min. cosine",
                elem_id="threshold",
                visible=False,
                interactive=True,
            )
            self.closer = gr.Dropdown(
                rank.choices(), value=None, label="Or closer than", elem_id="closer-pairs", visible=False
            )
        functions = [self.suggested, self.export_text, self.remove]
        self.groups = raw_html("", ["save", "tabs/duplicates"], functions, html_template=FRAME, elem_id="duplicates")
        with gr.Row(elem_id="duplicate-pager"):
            self.previous = gr.Button("Previous", size="sm", visible=False, elem_id="previous-groups")
            self.more = gr.Button("More", size="sm", visible=False, elem_id="more-groups")
        self.timer = gr.Timer(computing.POLL_S, active=False)
        self.offset = gr.State(0)

    def connect(self) -> None:
        outputs = [self.status, self.compare, self.threshold, self.closer, self.groups, self.previous, self.more]
        outputs += [self.offset, self.timer]
        inputs = [self.is_open, self.collection, self.threshold, self.offset]
        refreshing: dict[str, Any] = {"fn": self.refresh, "inputs": inputs, "outputs": outputs, **QUIET}
        self.tabs.select(self.is_selected, None, self.is_open, **QUIET).then(**refreshing)
        self.compare.click(self.start, self.collection, None, **QUIET).then(**refreshing)
        self.timer.tick(**refreshing)
        self.groups.removed(**refreshing)
        self.threshold.release(lambda: None, None, self.closer, **QUIET)
        closer: dict[str, Any] = {"inputs": [self.collection, self.closer], "outputs": [self.threshold, self.offset]}
        self.closer.input(self.limit_by_rank, **closer, **QUIET).then(**refreshing)
        others = [self.collection.change, self.threshold.release]
        gr.on(others, lambda: 0, None, self.offset, **QUIET).then(**refreshing)
        pages: dict[str, Any] = {"inputs": self.offset, "outputs": self.offset, **QUIET}
        self.previous.click(lambda offset: max(0, offset - PAGE), **pages).then(**refreshing)
        self.more.click(lambda offset: offset + PAGE, **pages).then(**refreshing)
        self.groups.search(self.search, self.trail, [self.trail, self.tabs], **QUIET)
        publish(self.duplicates, "duplicates")

    async def suggested(self, data: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"ids": await suggest(self.client, float(data["threshold"]), data["collection"])}
        except ServiceError as error:
            return {"ids": [], "problem": str(error)}

    async def export_text(self, data: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"text": await export_text(self.client, data["ids"], data["format"], data["collection"])}
        except ServiceError as error:
            return {"problem": str(error)}

    async def remove(self, data: dict[str, Any]) -> dict[str, Any]:
        return await remove(self.client, [str(id) for id in data["ids"]], data["collection"])

    async def refresh(self, is_open: bool, collection: str, threshold: float, offset: int) -> tuple[Any, ...]:
        if not is_open:
            return *[gr.skip()] * 7, offset, gr.Timer(active=False)
        try:
            least = (await self.client.duplicates(1.0, 1, collection=collection)).least
            rank_of_least = (await self.client.duplicates(least, 1, collection=collection)).closer_than
            threshold = max(threshold, least or 0)
            duplicates = await self.client.duplicates(threshold, PAGE, offset, collection=collection)
        except ServiceError as error:
            hidden = gr.update(visible=False)
            words = EMPTY if error.status == 404 else str(error)
            return notice(words), hidden, hidden, hidden, "", hidden, hidden, 0, gr.Timer(active=False)
        known = duplicates.made is not None
        words = None if duplicates.closer_than is None else rank.in_words(duplicates.closer_than)
        stops = [] if rank_of_least is None else rank.choices(rank_of_least)
        return (
            computing.status_html(duplicates, "The comparison", NONE, EXPLANATION),
            computing.start_button(duplicates, "Compare all", "Compare again"),
            gr.update(visible=known, minimum=duplicates.least or LEAST, value=threshold, info=words),
            gr.update(visible=bool(stops), choices=stops),
            groups_html(duplicates, threshold, offset, collection),
            gr.update(visible=offset > 0),
            gr.update(visible=known and offset + PAGE < (duplicates.total or 0)),
            offset,
            computing.timer(duplicates),
        )

    async def start(self, collection: str) -> None:
        try:
            least = (await self.client.duplicates(1.0, 1, collection=collection)).least
            await self.client.compute_duplicates(min(LEAST, least or LEAST), collection=collection)
        except ServiceError as error:
            warn(error)

    async def limit_by_rank(self, collection: str, closer_than: float) -> tuple[Any, int]:
        """The cosine of this rank for the slider, and the first page."""
        try:
            found = await self.client.duplicates(limit=1, closer_than=closer_than, collection=collection)
        except ServiceError as error:
            warn(error)
            return gr.skip(), 0
        return min(1.0, ceil(found.threshold * 1e4) / 1e4), 0

    def search(self, trail: Trail, event: gr.EventData) -> tuple[Trail, gr.Tabs]:
        return (*trail, Query((clicked(event),))), to_similar()

    async def duplicates(
        self, threshold: float = 0.95, limit: int = 100, offset: int = 0, collection: str = COLLECTION
    ) -> dict[str, Any]:
        return to_dict(await self.client.duplicates(threshold, limit, offset, collection=collection))
