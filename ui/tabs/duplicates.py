"""The tab Duplicates: groups of near-duplicates. All pictures of a group but one can be marked and removed."""

from html import escape
from pathlib import PurePosixPath
from typing import Any

import gradio as gr

from serving.client import COLLECTION, AsyncClient, Duplicates, Match, ServiceError
from serving.protocol.shown import counted
from ui.api import EACH, ON_TRAIL, QUIET, publish
from ui.assets import raw_html
from ui.search import rank, selection
from ui.search.picture import clicked, notice, thumbnail_url, warn
from ui.search.query import Query, SearchSettings, Trail
from ui.tabs.tab import Tab, to_similar
from ui.widgets import computing
from ui.widgets.large import open_button_html
from ui.widgets.results import EMPTY

PAGE = 20  # groups at a time
AT_ONCE = 1000  # groups in one request
LEAST = 0.9  # lowest end of the slider before it is known
NONE = (
    "The pictures of this collection have not been compared yet. Comparing every pair takes seconds, even for "
    "100,000 pictures."
)
EXPLANATION = "Mark the pictures to remove. The first of each group has the most pixels: keeping it is suggested."
TOO_MANY = (
    "More than a tenth of the collection are near-duplicates at this threshold, so they are probably different "
    "pictures. Only exact copies were marked; raise the threshold to have near-duplicates marked too."
)
ALONE = "No two pictures have a cosine of {threshold:.5g} or more. Lower the threshold to see less similar pictures."
FRAME = """
<div class="mark-bar" hidden>
  <b class="marked" role="status"></b>
  <button type="button" class="small" data-do="suggested" title="In all groups, on all pages">Mark as suggested</button>
  <button type="button" class="small" data-do="exact"
    title="Files with the same pixels, in all groups, on all pages">Mark exact copies</button>
  <span class="of-some">
    <button type="button" class="small" data-do="clear">Clear</button>
    <button type="button" class="small" data-do="csv">Save as CSV</button>
    <button type="button" class="small" data-do="paths" title="One path a line">Save paths</button>
    <button type="button" class="small" data-do="ask">Remove from the collection</button>
  </span>
</div>
<p class="message" role="status"></p>
${value}
"""


def groups_html(duplicates: Duplicates, threshold: float, offset: int, collection: str) -> str:
    """One row per group. Everything is escaped here: Gradio's own templating would run a `${...}` in a file name."""
    start = f'<div class="copies-all" data-collection="{escape(collection)}" data-threshold="{threshold!r}">'
    if duplicates.made is None:
        return f"{start}</div>"
    if not duplicates.groups:
        return f"{start}{notice(ALONE.format(threshold=threshold))}</div>"
    total, last = duplicates.total or 0, offset + len(duplicates.groups)
    extent = f"Groups {offset + 1:,} to {last:,} of {total:,}" if total > PAGE else counted(total, "group")
    numbered = zip(duplicates.groups, duplicates.exact, strict=True)
    rows = "".join(_group(group, exact, collection) for group, exact in numbered)
    return f'{start}<div class="heading"><p>{extent}, the largest first.</p></div>{rows}</div>'


def _group(group: list[Match], exact: int, collection: str) -> str:
    """exact: how many after the first are exact copies"""
    copies = "".join(_copy(item, collection, i == 0, 0 < i <= exact) for i, item in enumerate(group))
    others = "the other" if len(group) == 2 else f"the other {len(group) - 1}"
    return (
        f'<section class="copies" aria-label="{len(group)} alike"><header><b>{len(group)} pictures</b>'
        f'<button type="button" class="link others">Mark {others}</button></header><ol>{copies}</ol></section>'
    )


def _copy(item: Match, collection: str, first: bool, exact: bool) -> str:
    name, id = escape(item.name), escape(item.id)
    label = f' data-label="{escape(item.label)}"' if item.label else ""
    size = f"{item.width} × {item.height}" if item.width else ""
    cosine = "" if first else f'<span class="score">{"exact copy" if exact else f"{item.similarity:.3f}"}</span>'
    ranked = "" if first or exact else rank.rank_html(item.closer_than)
    image = f'<img loading="lazy" alt="" src="{escape(thumbnail_url(item.id, collection))}">'
    return (
        f'<li><button type="button" class="copy" data-id="{id}"{" data-first=yes" if first else ""}'
        f' aria-pressed="false" aria-label="Remove {name}">{image}<span class="verdict"></span></button>'
        f'<span class="facts">{cosine}<span>{size}</span>{ranked}</span>'
        f'<button type="button" class="link search" title="Search for pictures like {name}" data-id="{id}"'
        f' data-name="{name}"{label} data-collection="{escape(collection)}">'
        f"{escape(PurePosixPath(item.name).name)}</button>{open_button_html(name)}</li>"
    )


async def suggest(client: AsyncClient, threshold: float, collection: str, near: bool = True) -> dict[str, Any]:
    """Returns {ids: of the pictures that are suggested to go, problem: why near-duplicates are not among them}.

    near    with near-duplicates, unless they are too many
    raises  ServiceError
    """
    ids, offset, problem = [], 0, None
    while True:
        duplicates = await client.duplicates(threshold, AT_ONCE, offset, collection=collection)
        if near and duplicates.too_many:
            near, problem = False, TOO_MANY
        for group, exact in zip(duplicates.groups, duplicates.exact, strict=True):
            ids += [item.id for item in (group[1:] if near else group[1 : 1 + exact])]
        offset += AT_ONCE
        if offset >= (duplicates.total or 0):
            return {"ids": ids, "problem": problem}


async def export_text(client: AsyncClient, ids: list[str], format: str, collection: str) -> str:
    """These items as CSV or as a list of paths. Raises ServiceError."""
    items = await selection.items_of(client, ids, SearchSettings(collection=collection))
    return selection.as_csv([(item, None) for item in items]) if format == "csv" else selection.as_paths(items)


def to_dict(duplicates: Duplicates) -> dict[str, Any]:
    """The result for programs. A path is called `file`: gradio_client would try to download from a `path`."""

    def facts(item: Match) -> dict[str, Any]:
        names = ("id", "name", "label", "width", "height", "similarity", "closer_than")
        return {name: getattr(item, name) for name in names} | {"file": item.path}

    names = ("state", "stage", "share", "problem", "count", "new", "gone", "threshold", "own", "closer_than", "least")
    names += ("total", "too_many", "exact")
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
                value=1,
                step=0.001,
                label="Minimum cosine",
                elem_id="threshold",
                visible=False,
                interactive=True,
            )
            self.closer = gr.Dropdown(
                rank.choices(), value=None, label="Or closer than", elem_id="closer-pairs", visible=False
            )
        functions = [self.suggested, self.export_text]
        self.groups = raw_html("", ["save", "tabs/duplicates"], functions, html_template=FRAME, elem_id="duplicates")
        with gr.Row(elem_id="duplicate-pager"):
            self.previous = gr.Button("Previous", size="sm", visible=False, elem_id="previous-groups")
            self.more = gr.Button("More", size="sm", visible=False, elem_id="more-groups")
        self.timer = gr.Timer(computing.POLL_S, active=False)
        self.offset = gr.State(0)
        self.chosen = gr.State(None)  # the user's threshold; None for the collection's own

    def connect(self) -> None:
        outputs = [self.status, self.compare, self.threshold, self.closer, self.groups, self.previous, self.more]
        outputs += [self.offset, self.timer]
        inputs = [self.selected, self.collection, self.chosen, self.offset]
        refreshing: dict[str, Any] = {"fn": self.refresh, "inputs": inputs, "outputs": outputs, **QUIET}
        self.selected.change(**refreshing)
        self.compare.click(self.start, self.collection, None, **QUIET).then(**refreshing)
        self.timer.tick(**refreshing)
        self.changed.change(**refreshing)
        closer: dict[str, Any] = {"inputs": [self.collection, self.closer], "outputs": [self.chosen, self.offset]}
        self.closer.input(self.limit_by_rank, **closer, **QUIET).then(**refreshing)
        chosen: dict[str, Any] = {"outputs": [self.chosen, self.closer, self.offset], **QUIET}
        self.threshold.release(lambda threshold: (threshold, None, 0), self.threshold, **chosen).then(**refreshing)
        self.collection.change(lambda: (None, None, 0), None, **chosen).then(**refreshing)
        pages: dict[str, Any] = {"inputs": self.offset, "outputs": self.offset, **EACH}
        self.previous.click(lambda offset: max(0, offset - PAGE), **pages).then(**refreshing)
        self.more.click(lambda offset: offset + PAGE, **pages).then(**refreshing)
        self.groups.search(self.search, self.trail, [self.trail, self.tabs], **ON_TRAIL)
        publish(self.duplicates, "duplicates")

    async def suggested(self, data: dict[str, Any]) -> dict[str, Any]:
        try:
            return await suggest(self.client, float(data["threshold"]), data["collection"], bool(data["near"]))
        except ServiceError as error:
            return {"ids": [], "problem": str(error)}

    async def export_text(self, data: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"text": await export_text(self.client, data["ids"], data["format"], data["collection"])}
        except ServiceError as error:
            return {"problem": str(error)}

    async def refresh(self, selected: str, collection: str, chosen: float | None, offset: int) -> tuple[Any, ...]:
        if selected != self.title:
            return *[gr.skip()] * 7, offset, gr.Timer(active=False)
        try:
            least = (await self.client.duplicates(1.0, 1, collection=collection)).least
            rank_of_least = (await self.client.duplicates(least, 1, collection=collection)).closer_than
            threshold = None if chosen is None else max(chosen, least or 0)
            duplicates = await self.client.duplicates(threshold, PAGE, offset, collection=collection)
        except ServiceError as error:
            hidden = gr.update(visible=False)
            words = EMPTY if error.status == 404 else str(error)
            return notice(words), hidden, hidden, hidden, "", hidden, hidden, 0, computing.retry(error)
        known, threshold = duplicates.made is not None, duplicates.threshold or 1.0
        words = None if duplicates.closer_than is None else rank.in_words(duplicates.closer_than)
        stops = [] if rank_of_least is None else rank.choices(rank_of_least)
        return (
            computing.status_html(duplicates, "The comparison", NONE, EXPLANATION),
            computing.start_button(duplicates, "Compare all", "Rebuild"),
            gr.update(visible=known, minimum=duplicates.least or LEAST, value=round(threshold, 5), info=words),
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
            await self.client.compute_duplicates(least, collection=collection)
        except ServiceError as error:
            warn(error)

    async def limit_by_rank(self, collection: str, closer_than: float) -> tuple[Any, int]:
        """The cosine of this rank, and the first page."""
        try:
            found = await self.client.duplicates(limit=1, closer_than=closer_than, collection=collection)
        except ServiceError as error:
            warn(error)
            return gr.skip(), 0
        return found.threshold, 0

    def search(self, trail: Trail, event: gr.EventData) -> tuple[Trail, gr.Tabs]:
        return (*trail, Query((clicked(event),))), to_similar()

    async def duplicates(
        self, threshold: float | None = None, limit: int = 100, offset: int = 0, collection: str = COLLECTION
    ) -> dict[str, Any]:
        return to_dict(await self.client.duplicates(threshold, limit, offset, collection=collection))
