"""The address that brings a search back: `?like=ID&unlike=ID&k=24&least=0.5&where=label=shirt&in=NAME&encoder=ID`.

A picture from the user's disk cannot stand in it. A part of an item is `like=ID@left,top,right,bottom`.
"""

from collections.abc import Iterable
from urllib.parse import urlencode

import gradio as gr

from serving.client.calls import COLLECTION
from ui.search.crop import Box
from ui.search.picture import Chosen
from ui.search.query import Query, Settings

UPLOADS = (
    "A link cannot carry a picture from your disk. Search from one of the results, or put the picture into the "
    "collection (twinview index add) and search from there; then copy the link."
)
MOST = 20  # pictures of a link, on each side

# The address follows the search, so that reloading the page keeps it.
JS = """
const address = () => {
    const { query } = element.querySelector("button").dataset, theirs = new URLSearchParams(location.search);
    const all = new URLSearchParams(query ?? "");
    for (const [name, value] of theirs) if (name.startsWith("__")) all.append(name, value);  // Gradio's
    const text = all.toString().replaceAll("%2C", ",").replaceAll("%3D", "=").replaceAll("%40", "@");
    return location.pathname + (text && `?${text}`);
};
watch("value", () => history.replaceState(history.state, "", address()));
element.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const say = element.querySelector("[role=status]");
    if (button.dataset.query === undefined) return void trigger("refuse");
    const link = new URL(address(), location.href).href;
    try {
        await navigator.clipboard.writeText(link);  // which only a safe origin may
        say.textContent = "Copied";
    } catch {
        prompt("The browser does not let this page copy. The link is:", link);
    }
    setTimeout(() => (say.textContent = ""), 2000);
});
"""


def button() -> gr.HTML:
    """Its `refuse` event says that there is no link."""
    return gr.HTML(html(None, Settings()), js_on_load=JS, apply_default_css=False, elem_id="link")


def html(query: Query | None, settings: Settings) -> str:
    address = written(query, settings)
    carried = "" if address is None else f' data-query="{address.replace("&", "&amp;")}"'
    return f'<span role="status"></span><button class="small"{carried}>Copy link</button>'


def written(query: Query | None, settings: Settings) -> str | None:
    """The query string; None where it would need a file, or items of another collection."""
    pictures = query.pictures if query else ()
    if any(one.id is None or one.collection != settings.collection for one in pictures):
        return None
    default, found = Settings(), []
    for name, some in (("like", query.positive), ("unlike", query.negative)) if query else ():
        found += [(name, one.id if one.box is None else f"{one.id}@{one.box}") for one in some]
    if settings.k != default.k:
        found.append(("k", settings.k))
    if settings.least:
        found.append(("least", f"{settings.least:g}"))
    found += [("where", one) for one in settings.where]
    if settings.collection != COLLECTION:
        found.append(("in", settings.collection))
    found += [(name, id) for name, id in (("encoder", settings.encoder), ("beside", settings.beside)) if id]
    return urlencode(found)


def settings_of(params: Iterable[tuple[str, str]], most_k: int) -> Settings:
    """Numbers that are none are passed over."""
    given = dict(params)
    return Settings(
        k=round(_number(given.get("k"), Settings.k, 1, most_k)),
        least=_number(given.get("least"), Settings.least, 0, 1),
        where=tuple(value for name, value in params if name == "where"),
        collection=given.get("in", COLLECTION),
        encoder=given.get("encoder"),
        beside=given.get("beside"),
    )


async def query_of(client, params: Iterable[tuple[str, str]], collection: str) -> Query | None:
    """raises ServiceError: an item is no longer there."""

    async def chosen(told: str) -> Chosen:
        id, _, edges = told.partition("@")
        try:
            box = Box.of(edges.split(",")) if edges else None
        except ValueError:
            box = None
        item = await client.item(id, collection=collection)
        return Chosen(item.name, item.label, id=item.id, collection=collection, box=box)

    sides = {side: [value for name, value in params if name == side][:MOST] for side in ("like", "unlike")}
    positive, negative = [tuple([await chosen(one) for one in some]) for some in sides.values()]
    return Query(positive, negative) if positive else None


def _number(text: str | None, default: float, least: float, most: float) -> float:
    try:
        number = float(text)
    except (TypeError, ValueError):
        return default
    return min(max(number, least), most) if number == number else default
