"""Pictures of a collection as tiles: to search from, to add to the search, to select."""

import json
from collections.abc import Iterable, Sequence
from html import escape

from serving.client import Item, Match, OddItem, SuggestedItem
from ui.search.picture import Picture, facts_html
from ui.search.query import SearchSettings
from ui.search.rank import rank_html
from ui.widgets.large import open_button_html

ACTS_HTML = (
    '<button class="small of-some" data-act="label">Label</button>'
    '<button class="small of-some" data-act="copy" title="Put them into another collection">Put into…</button>'
    '<button class="small of-some" data-export="csv" title="Ids, names, labels, similarity, paths, metadata">'
    'Save as CSV</button><button class="small of-some" data-export="paths" title="One path a line">Save paths</button>'
    '<button class="small of-some" data-act="remove">Remove</button>'
)
"""The buttons of a bar that do something with the selected pictures."""


def grid_html(
    items: Sequence[Item], collection: str, encoder: str | None = None, both: Iterable[str] = (), score: str = ""
) -> str:
    """One tile per picture, with its name, label, and similarity if it has one; or a suggested label and its share; or
    what is odd about it.

    encoder  id of the one whose items they are; None for the service's default
    both     ids to mark, of items that both encoders found
    score    what the number is called, if it is not a similarity

    Everything is escaped here: Gradio's own template language would run a `${...}` in a file name.
    """
    both = set(both)
    data = f' data-encoder="{escape(encoder)}"' if encoder else ""
    data += f' data-score="{escape(score)}"' if score else ""
    return f'<ul class="grid"{data}>{"".join(_tile(item, collection, item.id in both) for item in items)}</ul>'


def selection_html(total: int, shown: SearchSettings, view: str, offer: str = "") -> str:
    """The bar above the tiles.

    total  number of pictures, shown or not
    view   names what is shown
    offer  further buttons
    """
    where, encoder = escape(json.dumps(shown.where)), escape(shown.encoder or "")
    return (
        f'<div class="selection" data-total="{total}" data-view="{escape(shown.collection)}\n{escape(view)}"'
        f' data-collection="{escape(shown.collection)}" data-where="{where}" data-encoder="{encoder}">'
        '<button class="small" data-select="all">Select all</button>'
        '<button class="small of-some" data-select="none">Clear</button>'
        f'{ACTS_HTML}<button class="small" data-add>Add pictures</button>{offer}'
        '<span class="count" role="status"></span></div>'
    )


def columns_html(titles: Sequence[str], grids: Sequence[str]) -> str:
    parts = (f"<section><h3>{escape(title)}</h3>{grid}</section>" for title, grid in zip(titles, grids, strict=True))
    return f'<div class="columns">{"".join(parts)}</div>'


def _tile(item: Item, collection: str, both: bool) -> str:
    picture = Picture(item.name, item.label, id=item.id, collection=collection)
    data = f'data-id="{escape(item.id)}" data-name="{escape(item.name)}" data-collection="{escape(collection)}"'
    if item.label:
        data += f' data-label="{escape(item.label)}"'
    score, rank, name = "", "", escape(picture.description)
    if isinstance(item, Match):
        data += f' data-similarity="{item.similarity:.6f}"'
        score = f'<span class="score">{item.similarity:.2f}</span>'
        rank = rank_html(item.closer_than)
    label = item.label
    if isinstance(item, SuggestedItem):
        data += f' data-suggested="{escape(item.suggested)}"'
        score, label = f'<span class="score">{item.share:.0%}</span>', f"{item.suggested}?"
    if isinstance(item, OddItem):
        score = f'<span class="score">{escape(item.reason or f"{item.value:.2f}")}</span>'
    return (
        f'<li{" class=both" if both else ""}><button class="tile" {data}>'
        f'<img loading="lazy" src="{escape(picture.url)}" alt="{name}">'
        f'<span class="caption">{score}{facts_html(item.name, label)}</span>{rank}</button>'
        f'<input type="checkbox" class="pick" aria-label="Select {name}" title="Select (x); with Shift a row of them">'
        '<span class="signs">'
        f'<button class="sign" value="like" aria-label="More like {name}" title="More like this (+)">+</button>'
        f'<button class="sign" value="unlike" aria-label="Less like {name}" title="Less like this (-)">−</button>'
        f"</span>{open_button_html(name)}</li>"
    )
