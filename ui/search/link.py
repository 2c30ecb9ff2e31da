"""The address of a search: `?like=ID&unlike=ID&k=24&least=0.5&closer=0.99&where=label=shirt&in=NAME&encoder=ID`, and
with words `&text=a+red+shoe`.

It cannot contain a picture from the user's disk. A part of an item is `like=ID@left,top,right,bottom`.
"""

from collections.abc import Sequence
from urllib.parse import urlencode

import gradio as gr

from serving.client import COLLECTION, AsyncClient
from ui.assets import raw_html
from ui.search.crop import Box
from ui.search.picture import Picture
from ui.search.query import Query, SearchSettings

UPLOADS = (
    "A link cannot carry a picture from your disk. Search from one of the results, or put the picture into the "
    "collection (twinview index add) and search from there; then copy the link."
)
MOST = 20  # most pictures to be like, and to be unlike, in a link


def link_button() -> gr.HTML:
    """Copies the link. Its `refuse` event means that the search has no link; `navigate`, that the browser went back or
    forward, with the number of searches there and the address's `query`."""
    return raw_html(link_html(None, SearchSettings(), 0), ["search/link"], elem_id="link")


def link_html(query: Query | None, settings: SearchSettings, steps: int) -> str:
    """steps: number of searches so far, with this one"""
    address = query_string(query, settings)
    data = "" if address is None else f' data-query="{address.replace("&", "&amp;")}"'
    return f'<span role="status"></span><button class="small" data-steps="{steps}"{data}>Copy link</button>'


def query_string(query: Query | None, settings: SearchSettings) -> str | None:
    """None if the search has a picture from disk or from another collection."""
    pictures = query.pictures if query else ()
    if any(picture.id is None or picture.collection != settings.collection for picture in pictures):
        return None
    params: list[tuple[str, str | int | None]] = []
    for name, side in (("like", query.positive), ("unlike", query.negative)) if query else ():
        params += [(name, picture.id if picture.box is None else f"{picture.id}@{picture.box}") for picture in side]
    if query and query.text:
        params.append(("text", query.text))
    if settings.k != SearchSettings.k:
        params.append(("k", settings.k))
    if settings.min_similarity:
        params.append(("least", f"{settings.min_similarity:g}"))
    if settings.closer_than:
        params.append(("closer", f"{settings.closer_than:g}"))
    params += [("where", condition) for condition in settings.where]
    if settings.collection != COLLECTION:
        params.append(("in", settings.collection))
    params += [(name, id) for name, id in (("encoder", settings.encoder), ("beside", settings.other_encoder)) if id]
    return urlencode(params)


def parse_settings(params: Sequence[tuple[str, str]], most_k: int) -> SearchSettings:
    """Numbers that cannot be read are ignored."""
    values = dict(params)
    return SearchSettings(
        k=round(_number(values.get("k"), SearchSettings.k, 1, most_k)),
        min_similarity=_number(values.get("least"), SearchSettings.min_similarity, 0, 1),
        where=tuple(value for name, value in params if name == "where"),
        collection=values.get("in", COLLECTION),
        encoder=values.get("encoder"),
        other_encoder=values.get("beside"),
        closer_than=_number(values.get("closer"), SearchSettings.closer_than, 0, 1),
    )


async def load_query(client: AsyncClient, params: Sequence[tuple[str, str]], collection: str) -> Query | None:
    """Raises ServiceError if an item no longer exists."""

    async def load(value: str) -> Picture:
        id, _, edges = value.partition("@")
        try:
            box = Box.from_edges(edges.split(",")) if edges else None
        except ValueError:
            box = None
        item = await client.item(id, collection=collection)
        return Picture(item.name, item.label, id=item.id, collection=collection, box=box)

    sides = [[value for name, value in params if name == side][:MOST] for side in ("like", "unlike")]
    positive, negative = [tuple([await load(value) for value in side]) for side in sides]
    text = dict(params).get("text", "").strip()
    return Query(positive, negative, text) if positive or text else None


def _number(text: str | None, default: float, least: float, most: float) -> float:
    try:
        number = float(text or "")
    except ValueError:
        return default
    return min(max(number, least), most) if number == number else default
