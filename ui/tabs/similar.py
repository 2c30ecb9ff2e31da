"""The first tab: the collection, and the nearest of it to a picture. A click on any picture searches from there."""

from dataclasses import replace

import gradio as gr

from serving.client import Item, ServiceError
from serving.client.calls import COLLECTION
from ui.api import PROBLEMS, publish
from ui.search import link, selection
from ui.search.conditions import hint, offered, parsed
from ui.search.picture import Chosen, UploadFailed, clicked, from_path, notice, warn
from ui.search.query import Query, Settings, nearest
from ui.widgets.grid import JS
from ui.widgets.results import PAGE, browse, neighbours

MOST_K = 200
REFUSED = (413, 415, 422)  # statuses that speak of the picture
CSS = """
#similar-bar { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 12px 24px; align-items: start; }
#link [role=status] { margin-right: 8px; font-size: 13px; color: var(--primary-700); }
.dark #link [role=status] { color: var(--primary-400); }
#narrow { display: block; }
#narrow .form {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px 28px; align-items: start;
}
#narrow #where { grid-column: span 2; min-width: 0 !important; }
#narrow .container > .wrap, #collection .wrap {
  border: 1px solid var(--neutral-300); border-radius: 8px; background: var(--background-fill-primary);
}
.dark #narrow .container > .wrap, .dark #collection .wrap { border-color: var(--neutral-700); }
#narrow [data-testid="block-info"] { margin-bottom: 4px; }
#where:not(:focus-within) .info-text { display: none; }
@media (max-width: 760px) {
  #narrow .form { grid-template-columns: 1fr 1fr; gap: 10px 20px; }
  #narrow .reset-button { display: none; }
  #narrow .head span { font-size: 13px; }
}
#pager { justify-content: center; }
#pager button { flex: 0 0 130px; }
"""


def tab(client, trail: gr.State, collection: gr.Dropdown, page: gr.Blocks) -> None:
    """Build the tab. It shows the last query of the `trail`, whoever has put it there."""
    with gr.Row(elem_id="similar-bar"):
        heading = gr.HTML(apply_default_css=False, elem_id="heading", elem_classes="heading")
        shared = link.button()
    with gr.Row(elem_id="narrow"):
        where = gr.Dropdown(
            [], multiselect=True, allow_custom_value=True, label="Only pictures with", elem_id="where", min_width=220
        )
        k = gr.Slider(1, MOST_K, value=24, step=1, label="How many", elem_id="k", visible=False, min_width=150)
        least = gr.Slider(
            0, 1, value=0, step=0.01, label="Least similarity", elem_id="least", visible=False, min_width=150
        )
        encoder = gr.Dropdown([], label="Encoder", elem_id="encoder", visible=False, min_width=150)
        beside = gr.Dropdown([], label="Compare with", elem_id="beside", visible=False, min_width=150)
    grid = gr.HTML(js_on_load=JS, apply_default_css=False, elem_id="grid")
    with gr.Row(elem_id="pager"):
        previous = gr.Button("Previous", size="sm", elem_id="previous", visible=False)
        more = gr.Button("More", size="sm", elem_id="more", visible=False)
    saved = selection.download()
    offset = gr.State(0)
    controls = [k, least, where, collection, encoder, beside]
    shown = [trail, offset, heading, grid, shared, k, least, previous, more]

    async def start(request: gr.Request):
        """What there is to choose from, and the search that the address names."""
        params = request.query_params.multi_items() if request else []
        settings = link.settings_of(params, MOST_K)
        try:
            names = sorted({one.name for one in await client.collections()})
            encoders = [model["id"] for model in await client.models()]
        except ServiceError:
            names, encoders = [], []  # what is shown next says why
        if settings.collection not in names and names and "in" not in dict(params):
            settings = replace(settings, collection=names[0])
        names = sorted({*names, settings.collection})
        try:
            query = await link.query_of(client, params, settings.collection)
        except ServiceError as error:
            query = None
            warn(error)
        several = len(encoders) > 1
        chosen = settings.encoder if settings.encoder in encoders else encoders[0] if several else None
        other = settings.beside if settings.beside in encoders else None
        nothing = [("nothing", "")]
        return (
            (query,) if query else (),
            settings.k,
            settings.least,
            gr.update(value=list(settings.where)),
            gr.update(choices=names, value=settings.collection, visible=len(names) > 1),
            gr.update(choices=encoders, value=chosen, visible=several),
            gr.update(choices=nothing + encoders, value=other or "", visible=several),
        )

    async def offer(collection: str):
        try:
            keys = await client.keys(collection=collection)
        except ServiceError:
            keys = []
        return gr.update(choices=offered(keys), info=hint(keys))

    async def show(trail: tuple[Query, ...], offset: int, *controls):
        """Everything this tab shows. What goes wrong is said in words, and leaves what was there."""
        settings, query, count = _settings(*controls), (trail[-1] if trail else None), 0
        try:
            if query:
                title, tiles = await neighbours(client, query, settings)
            else:
                title, tiles, count = await browse(client, offset, settings)
        except PROBLEMS as error:
            if isinstance(error, UploadFailed) or getattr(error, "status", 0) in REFUSED:
                warn(error)
                return trail[:-1], *[gr.skip()] * (len(shown) - 1)
            title, tiles = "", notice(str(error))
        visible = [gr.update(visible=v) for v in (*[query is not None] * 2, offset > 0, offset + PAGE < count)]
        return gr.skip(), offset, title, tiles, link.html(query, settings), *visible

    async def narrow(trail, *controls):
        return await show(trail, 0, *controls)

    async def turn_back(offset, *controls):
        return await show((), max(0, offset - PAGE), *controls)

    async def turn_on(offset, *controls):
        return await show((), offset + PAGE, *controls)

    def click(trail, event: gr.EventData):
        return (*trail, Query((clicked(event),)))

    def like(trail, event: gr.EventData):
        chosen = clicked(event)
        return (*trail, trail[-1].like(chosen) if trail else Query((chosen,)))

    def unlike(trail, event: gr.EventData):
        if not trail:
            warn(ValueError("Search by a picture first; then what it is not to be like can be told."))
            return gr.skip()
        return (*trail, trail[-1].unlike(clicked(event)))

    async def export(event: gr.EventData, progress=gr.Progress(), *controls):  # noqa: B008
        told = event._data or {}

        def report(done: int, total: int) -> None:
            progress((done, total), desc="Collecting what is known of them")

        try:
            rows = await selection.selected(client, told, _settings(*controls), report)
        except PROBLEMS as error:
            warn(error)
            return gr.skip()
        return selection.download_html(selection.written(rows, "csv" if told.get("format") == "csv" else "paths"))

    def refuse() -> None:
        warn(ValueError(link.UPLOADS))

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    seen = {"show_progress_on": grid, "api_visibility": "private"}
    page.load(start, None, [trail, *controls], **quiet).then(show, [trail, offset, *controls], shown, **seen).then(
        offer, collection, where, **quiet
    )
    trail.change(show, [trail, offset, *controls], shown, trigger_mode="always_last", **seen)
    changed = [k.release, least.release, where.change, collection.input, encoder.input, beside.input]
    gr.on(changed, narrow, [trail, *controls], shown, trigger_mode="always_last", **seen)
    collection.input(offer, collection, where, **quiet)
    previous.click(turn_back, [offset, *controls], shown, **seen)
    more.click(turn_on, [offset, *controls], shown, **seen)
    grid.click(click, trail, trail, **quiet)
    grid.like(like, trail, trail, **quiet)
    grid.unlike(unlike, trail, trail, **quiet)
    grid.export(export, controls, saved, **seen)
    shared.refuse(refuse, None, None, **quiet)
    programs(client)


def programs(client) -> None:
    """The same for programs."""

    async def similar(
        picture: gr.FileData | None = None,
        like: list[str] = [],  # noqa: B006
        unlike: list[str] = [],  # noqa: B006
        k: int = 24,
        threshold: float = 0.0,
        where: list[str] = [],  # noqa: B006
        collection: str = COLLECTION,
        encoder: str | None = None,
    ) -> list[dict]:
        """The items nearest to a picture and to the items `like`, and unlike the items `unlike`, with their cosine."""
        given = [from_path(picture["path"])] if picture else []
        query = Query((*given, *_items(like, collection)), _items(unlike, collection))
        settings = Settings(k, threshold, tuple(where), collection, encoder)
        return [_plain(item) for item in await nearest(client, query, settings)]

    async def collection_(
        where: list[str] = [],  # noqa: B006
        limit: int = 60,
        offset: int = 0,
        collection: str = COLLECTION,
        encoder: str | None = None,
    ) -> dict:
        """How many items hold to the conditions, and `limit` of them."""
        answer = await client.items(limit, offset, parsed(where), collection=collection, model=encoder)
        return {"count": answer.count, "items": [_plain(item) for item in answer.items]}

    publish(similar, "similar")
    publish(collection_, "collection")


def _items(ids: list[str], collection: str) -> tuple[Chosen, ...]:
    return tuple(Chosen(id, id=id, collection=collection) for id in ids)


def _plain(item: Item) -> dict:
    """A path is called `file`: what is called path gradio_client would fetch."""
    facts = {name: value for name, value in vars(item).items() if name not in ("vector", "path")}
    return facts | {"file": item.path}


def _settings(k, least, where, collection, encoder, beside) -> Settings:
    return Settings(int(k), float(least), tuple(where or ()), collection or COLLECTION, encoder or None, beside or None)
