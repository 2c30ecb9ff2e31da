"""The tab of near-duplicates: groups of which one picture can stay, to be marked, listed and taken out."""

from html import escape
from pathlib import Path, PurePosixPath

import gradio as gr

from serving.client import Duplicates, Match, ServiceError
from serving.client.calls import COLLECTION
from ui.api import publish
from ui.search import selection
from ui.search.picture import clicked, notice, thumbnail_url, warn
from ui.search.query import Query, Settings
from ui.widgets import computing
from ui.widgets.results import EMPTY

TITLE = "Duplicates"
PAGE = 20  # groups at a time
AT_ONCE = 1000  # groups, and ids, of one request
LEAST = 0.9  # cosine that is compared from, unless it was less before
JS = Path(__file__).with_name("duplicates.js").read_text(encoding="utf-8")
NONE = (
    "The pictures of this collection have not been compared yet. Compare them: all with all, exactly. "
    "It takes seconds, also for 100,000."
)
EXPLANATION = "Mark what can go; of each group the first is suggested to stay, as it has the most pixels."
ALONE = "No two pictures are as alike as {threshold:.3f}. Lower the threshold to see those that are less alike."
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
<p class="said" role="status"></p>
${value}
<dialog class="sure" aria-label="Remove pictures from the collection">
  <h3>Remove <span class="pictures"></span> from the collection <span class="of"></span>?</h3>
  <p>Searches will not find them any more. The files on disk are not touched.
    Within an hour <code>twinview index undo --collection <span class="of"></span></code> takes this back.</p>
  <label>Type <b class="number"></b> to go on <input inputmode="numeric" autocomplete="off"></label>
  <p class="ways"><button type="button" class="small" data-do="keep">Keep them</button>
    <button type="button" class="small danger" data-do="remove" disabled>Remove them</button></p>
</dialog>
"""

CSS = """
.mark-bar {
  display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; padding: 10px 0; position: sticky; top: 0;
  z-index: 2; background: var(--body-background-fill);
}
.mark-bar[hidden], .mark-bar:not(.some) .of-some { display: none; }
.of-some { display: inline-flex; flex-wrap: wrap; gap: 8px; }
.marked { min-width: 150px; font-weight: 600; font-variant-numeric: tabular-nums; }
#threshold { max-width: 460px; margin: 0 auto 0 0; }
.said { margin: 0; }
.said:empty { display: none; }
.copies { padding: 12px 0 16px; border-top: 1px solid var(--border-color-primary); }
.copies header { display: flex; gap: 14px; align-items: baseline; margin-bottom: 8px; font-size: 13px; }
.copies header::after { content: ""; color: #b91c1c; }
.copies.none-stays header::after { content: "None of these would stay."; }
.dark .copies.none-stays header::after { color: #f87171; }
.copies ol { display: flex; gap: 14px; list-style: none; margin: 0; padding: 4px; overflow-x: auto; }
.copies li { flex: 0 0 150px; margin: 0; font-size: 12px; min-width: 0; }
.copy { position: relative; display: block; width: 100%; padding: 0; border: 0; background: none; cursor: pointer; }
.copy img {
  display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 10px;
  background: var(--neutral-200); transition: opacity 0.12s;
}
.dark .copy img { background: var(--neutral-800); }
.copy:focus-visible { outline: 3px solid var(--primary-500); outline-offset: 2px; border-radius: 10px; }
.verdict {
  position: absolute; left: 6px; bottom: 6px; padding: 1px 8px; border-radius: 99px; color: white; font-weight: 500;
  background: var(--primary-700);
}
.verdict:empty { display: none; }
.copy[aria-pressed="true"] .verdict { background: #b91c1c; }
.copy[aria-pressed="true"] img { opacity: 0.35; }
.copies .facts { margin-top: 5px; }
.copies .seek { display: block; max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.sure {
  max-width: 460px; padding: 22px 26px; border: 1px solid var(--border-color-primary); border-radius: 14px;
  background: var(--background-fill-primary); color: var(--body-text-color);
}
.sure::backdrop { background: rgb(0 0 0 / 0.45); }
.sure code { white-space: nowrap; }
.sure h3 { margin: 0 0 8px; font-size: 17px; }
.sure input { width: 9ch; padding: 4px 8px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: transparent; }
.ways { display: flex; justify-content: flex-end; gap: 10px; margin: 18px 0 0; }
.danger:not(:disabled) { background: #b91c1c !important; border-color: #b91c1c !important; color: white !important; }
.danger:disabled { opacity: 0.5; cursor: default; }
#duplicate-pager { justify-content: center; }
#duplicate-pager button { flex: 0 0 130px; }
"""


def groups_html(found: Duplicates, threshold: float, offset: int, collection: str) -> str:
    """A row a group. Everything is escaped here: Gradio's own templating would run a `${...}` in a file name."""
    whole = f'<div class="copies-all" data-collection="{escape(collection)}" data-threshold="{threshold:g}">'
    if found.made is None:
        return f"{whole}</div>"
    if not found.groups:
        return f"{whole}{notice(ALONE.format(threshold=threshold))}</div>"
    first, last = offset + 1, offset + len(found.groups)
    several = f"Groups {first:,} to {last:,} of {found.total:,}" if found.total > PAGE else f"{found.total:,} groups"
    extent = "1 group" if found.total == 1 else several
    rows = "".join(_group(group, collection) for group in found.groups)
    return f'{whole}<div class="heading"><p>{extent}, the largest first.</p></div>{rows}</div>'


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
    image = f'<img loading="lazy" alt="" src="{escape(thumbnail_url(item.id, collection))}">'
    return (
        f'<li><button type="button" class="copy" data-id="{id}"{" data-first=yes" if first else ""}'
        f' aria-pressed="false" aria-label="Remove {name}">{image}<span class="verdict"></span></button>'
        f'<span class="facts">{cosine}<span>{size}</span></span>'
        f'<button type="button" class="link seek" title="Search for pictures like {name}" data-id="{id}"'
        f' data-name="{name}"{label} data-collection="{escape(collection)}">'
        f"{escape(PurePosixPath(item.name).name)}</button></li>"
    )


async def suggested(client, threshold: float, collection: str) -> list[str]:
    """Ids of all that can go, of all groups. raises ServiceError"""
    ids, offset = [], 0
    while True:
        found = await client.duplicates(threshold, AT_ONCE, offset, collection=collection)
        ids += [item.id for group in found.groups for item in group[1:]]
        offset += AT_ONCE
        if offset >= (found.total or 0):
            return ids


async def removed(client, ids: list[str], collection: str) -> dict:
    """deleted: the ids that are gone; said: what has happened, in words."""
    deleted: list[str] = []
    try:
        for at in range(0, len(ids), AT_ONCE):
            deleted += await client.delete_items(ids[at : at + AT_ONCE], collection=collection)
    except ServiceError as error:
        return {"deleted": deleted, "said": f"{_pictures(len(deleted))} removed, then: {error}"}
    back = "this back" if len(ids) <= AT_ONCE else f"the last {len(ids) % AT_ONCE or AT_ONCE:,} back"
    undo = f"Within an hour, twinview index undo --collection {collection} takes {back}."
    return {"deleted": ids, "said": f"{_pictures(len(deleted))} removed; files were not touched. {undo}"}


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"


async def listed(client, ids: list[str], format: str, collection: str) -> str:
    """As the selection under Similar is saved: CSV, or paths. raises ServiceError"""
    told = {"chosen": [(id, None) for id in ids]}
    rows = await selection.selected(client, told, Settings(collection=collection), lambda done, of: None)
    return selection.as_csv(rows) if format == "csv" else selection.as_paths(rows)


def plain(found: Duplicates) -> dict:
    """For programs. A path is called `file`: what is called path gradio_client would fetch."""

    def of(item: Match) -> dict:
        facts = {name: getattr(item, name) for name in ("id", "name", "label", "width", "height", "similarity")}
        return facts | {"file": item.path}

    facts = ("state", "stage", "share", "problem", "count", "new", "gone", "least", "total")
    return {name: getattr(found, name) for name in facts} | {"groups": [[of(one) for one in g] for g in found.groups]}


def tab(client, trail: gr.State, collection: gr.Dropdown, tabs: gr.Tabs) -> None:
    """Build the tab. It asks what is known when it comes in sight, and while it is computed."""

    async def suggested_(told: dict) -> dict:
        try:
            return {"ids": await suggested(client, float(told["threshold"]), told["collection"])}
        except ServiceError as error:
            return {"ids": [], "problem": str(error)}

    async def remove(told: dict) -> dict:
        return await removed(client, [str(id) for id in told["ids"]], told["collection"])

    async def listed_(told: dict) -> dict:
        try:
            return {"text": await listed(client, told["ids"], told["format"], told["collection"])}
        except ServiceError as error:
            return {"problem": str(error)}

    suggested_.__name__, listed_.__name__ = "suggested", "listed"
    with gr.Row(elem_classes="computing"):
        status = gr.HTML(apply_default_css=False, elem_id="duplicates-status")
        compare = gr.Button("Compare all", size="sm", elem_id="compare", visible=False)
    threshold = gr.Slider(
        LEAST, 1, value=0.95, step=0.005, label="Least cosine", elem_id="threshold", visible=False, interactive=True
    )
    groups = gr.HTML(
        "",
        html_template=FRAME,
        js_on_load=JS,
        apply_default_css=False,
        elem_id="duplicates",
        server_functions=[suggested_, listed_, remove],
    )
    with gr.Row(elem_id="duplicate-pager"):
        previous = gr.Button("Previous", size="sm", visible=False, elem_id="previous-groups")
        more = gr.Button("More", size="sm", visible=False, elem_id="more-groups")
    timer = gr.Timer(computing.POLL_S, active=False)
    in_sight, offset = gr.State(False), gr.State(0)

    async def look(in_sight: bool, collection: str, threshold: float, offset: int):
        if not in_sight:
            return *[gr.skip()] * 6, offset, gr.Timer(active=False)
        hidden = [gr.update(visible=False)] * 3
        try:
            known = await client.duplicates(1.0, 1, collection=collection)
            threshold = max(threshold, known.least or 0)
            found = await client.duplicates(threshold, PAGE, offset, collection=collection)
        except ServiceError as error:
            words = EMPTY if error.status == 404 else str(error)
            return notice(words), hidden[0], hidden[1], "", *hidden[:2], 0, gr.Timer(active=False)
        there = found.made is not None
        return (
            computing.told(found, "The comparison", NONE, EXPLANATION),
            computing.button(found, "Compare all", "Compare anew"),
            gr.update(visible=there, minimum=found.least or LEAST, value=threshold),
            groups_html(found, threshold, offset, collection),
            gr.update(visible=offset > 0),
            gr.update(visible=there and offset + PAGE < found.total),
            offset,
            computing.ticking(found),
        )

    async def start(collection: str) -> None:
        try:
            least = (await client.duplicates(1.0, 1, collection=collection)).least
            await client.compute_duplicates(min(LEAST, least or LEAST), collection=collection)
        except ServiceError as error:
            warn(error)

    def seek(trail: tuple[Query, ...], event: gr.EventData):
        return (*trail, Query((clicked(event),))), gr.Tabs(selected="similar")

    def came(event: gr.SelectData) -> bool:
        return event.value == TITLE

    async def duplicates(
        threshold: float = 0.95, limit: int = 100, offset: int = 0, collection: str = COLLECTION
    ) -> dict:
        return plain(await client.duplicates(threshold, limit, offset, collection=collection))

    silent = {"show_progress": "hidden", "api_visibility": "private"}
    outputs = [status, compare, threshold, groups, previous, more, offset, timer]
    looking = {"fn": look, "inputs": [in_sight, collection, threshold, offset], "outputs": outputs} | silent
    tabs.select(came, None, in_sight, **silent).then(**looking)
    compare.click(start, collection, None, **silent).then(**looking)
    timer.tick(**looking)
    groups.removed(**looking)
    gr.on([collection.change, threshold.release], lambda: 0, None, offset, **silent).then(**looking)
    previous.click(lambda offset: max(0, offset - PAGE), offset, offset, **silent).then(**looking)
    more.click(lambda offset: offset + PAGE, offset, offset, **silent).then(**looking)
    groups.seek(seek, trail, [trail, tabs], **silent)
    publish(duplicates, "duplicates")
