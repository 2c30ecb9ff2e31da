"""The tab Similar: the pictures of the collection, or those nearest to a picture. A click on one searches from it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import gradio as gr

from serving.client import COLLECTION, Item, Match, ServiceError
from serving.protocol.filters import parse_conditions
from ui.api import PROBLEMS, QUIET, publish
from ui.assets import raw_html
from ui.search import link, rank, selection
from ui.search.conditions import condition_choices, condition_hint
from ui.search.picture import Picture, UploadFailed, clicked, from_path, notice, warn
from ui.search.query import Query, SearchSettings, Trail, nearest
from ui.tabs.tab import Tab
from ui.widgets.results import PAGE, browse, neighbours

MOST_K = 200
REFUSED = (413, 415, 422)  # the service's statuses for a picture that it cannot read


class SimilarTab(Tab):
    title = "Similar"

    def build(self) -> None:
        with gr.Row(elem_id="similar-bar"):
            self.heading = raw_html(elem_id="heading", elem_classes="heading")
            self.link = link.link_button()
        with gr.Row(elem_id="narrow"):
            self.where = gr.Dropdown(
                [],
                multiselect=True,
                allow_custom_value=True,
                label="Only pictures with",
                elem_id="where",
                min_width=220,
            )
            self.k = gr.Slider(1, MOST_K, value=24, step=1, label="Results", elem_id="k", visible=False, min_width=150)
            self.least = gr.Slider(
                0, 1, value=0, step=0.01, label="Min. similarity", elem_id="least", visible=False, min_width=150
            )
            self.closer = gr.Dropdown(
                [("no limit", 0.0), *rank.choices()],
                value=0.0,
                label="Only closer than",
                elem_id="closer",
                visible=False,
                min_width=150,
            )
            self.encoder = gr.Dropdown([], label="Encoder", elem_id="encoder", visible=False, min_width=150)
            self.other = gr.Dropdown([], label="Compare with", elem_id="beside", visible=False, min_width=150)
        self.grid = raw_html(scripts=["widgets/grid"], elem_id="grid")
        with gr.Row(elem_id="pager"):
            self.previous = gr.Button("Previous", size="sm", elem_id="previous", visible=False)
            self.more = gr.Button("More", size="sm", elem_id="more", visible=False)
        self.saved = selection.download()
        self.offset = gr.State(0)

    def connect(self) -> None:
        controls = [self.k, self.least, self.closer, self.where, self.collection, self.encoder, self.other]
        outputs = [self.trail, self.offset, self.heading, self.grid, self.link]
        outputs += [self.k, self.least, self.closer, self.previous, self.more]
        loading: dict[str, Any] = {"show_progress_on": self.grid, "api_visibility": "private"}
        showing: dict[str, Any] = {
            "fn": self.show,
            "inputs": [self.trail, self.offset, *controls],
            "outputs": outputs,
            **loading,
        }
        offering: dict[str, Any] = {"fn": self.conditions, "inputs": self.collection, "outputs": self.where, **QUIET}

        self.page.load(self.start, None, [self.trail, *controls], **QUIET).then(**showing).then(**offering)
        self.trail.change(trigger_mode="always_last", **showing)
        changes = [self.k.release, self.least.release, self.closer.input, self.where.change]
        changes += [self.collection.input, self.encoder.input, self.other.input]
        gr.on(changes, self.show_first_page, [self.trail, *controls], outputs, trigger_mode="always_last", **loading)
        self.collection.input(**offering)
        self.previous.click(self.previous_page, [self.offset, *controls], outputs, **loading)
        self.more.click(self.next_page, [self.offset, *controls], outputs, **loading)
        self.grid.click(self.click, self.trail, self.trail, **QUIET)
        self.grid.like(self.like, self.trail, self.trail, **QUIET)
        self.grid.unlike(self.unlike, self.trail, self.trail, **QUIET)
        self.grid.export(self.export, controls, self.saved, **loading)
        self.link.refuse(self.refuse_link, None, None, **QUIET)
        publish(self.similar, "similar")
        publish(self.collection_items, "collection")

    async def start(self, request: gr.Request) -> tuple[Any, ...]:
        """The collections and encoders to choose from, and the search in the page's address."""
        params = request.query_params.multi_items() if request else []
        settings = link.parse_settings(params, MOST_K)
        try:
            names = {collection.name for collection in await self.client.collections()}
            encoders = [model["id"] for model in await self.client.models()]
        except ServiceError:
            names, encoders = set(), []  # `show` comes next and says why
        if settings.collection not in names and names and "in" not in dict(params):
            settings = replace(settings, collection=min(names))
        try:
            query = await link.load_query(self.client, params, settings.collection)
        except ServiceError as error:
            query = None
            warn(error)
        collections = sorted({*names, settings.collection})
        several = len(encoders) > 1
        encoder = settings.encoder if settings.encoder in encoders else encoders[0] if several else None
        other = settings.other_encoder if settings.other_encoder in encoders else ""
        return (
            (query,) if query else (),
            settings.k,
            settings.min_similarity,
            gr.update(
                choices=[("no limit", 0.0), *rank.choices(chosen=settings.closer_than)], value=settings.closer_than
            ),
            # Setting [] would count as a change, and show the collection that was chosen before.
            gr.update(value=list(settings.where)) if settings.where else gr.skip(),
            gr.update(choices=collections, value=settings.collection, visible=len(collections) > 1),
            gr.update(choices=encoders, value=encoder, visible=several),
            gr.update(choices=[("nothing", ""), *encoders], value=other, visible=several),
        )

    async def conditions(self, collection: str) -> dict[str, Any]:
        """The conditions to choose from."""
        try:
            keys = await self.client.keys(collection=collection)
        except ServiceError:
            keys = []
        return gr.update(choices=condition_choices(keys), info=condition_hint(keys))

    async def show(self, trail: Trail, offset: int, *controls: Any) -> tuple[Any, ...]:
        """The results of the last search, or the collection from `offset` on. A picture that the service refuses is
        removed from the trail."""
        settings, query, count, by_rank = _settings(*controls), trail[-1] if trail else None, 0, False
        try:
            if query:
                heading, tiles, by_rank = await neighbours(self.client, query, settings)
            else:
                heading, tiles, count = await browse(self.client, offset, settings)
        except PROBLEMS as error:
            if isinstance(error, UploadFailed) or getattr(error, "status", 0) in REFUSED:
                warn(error)
                return trail[:-1], *[gr.skip()] * 9
            heading, tiles = "", notice(str(error))
        searching = query is not None
        visible = [searching, searching and not by_rank, searching and by_rank, offset > 0, offset + PAGE < count]
        updates = [gr.update(visible=value) for value in visible]
        return gr.skip(), offset, heading, tiles, link.link_html(query, settings), *updates

    async def show_first_page(self, trail: Trail, *controls: Any) -> tuple[Any, ...]:
        return await self.show(trail, 0, *controls)

    async def previous_page(self, offset: int, *controls: Any) -> tuple[Any, ...]:
        return await self.show((), max(0, offset - PAGE), *controls)

    async def next_page(self, offset: int, *controls: Any) -> tuple[Any, ...]:
        return await self.show((), offset + PAGE, *controls)

    def click(self, trail: Trail, event: gr.EventData) -> Trail:
        return (*trail, Query((clicked(event),)))

    def like(self, trail: Trail, event: gr.EventData) -> Trail:
        picture = clicked(event)
        return (*trail, trail[-1].like(picture) if trail else Query((picture,)))

    def unlike(self, trail: Trail, event: gr.EventData) -> Any:
        if not trail:
            warn(ValueError("Search by a picture first; then choose pictures that the results should not be like."))
            return gr.skip()
        return (*trail, trail[-1].unlike(clicked(event)))

    async def export(self, event: gr.EventData, progress: gr.Progress = gr.Progress(), *controls: Any) -> Any:  # noqa: B008
        data = event._data or {}

        def report(done: int, total: int) -> None:
            progress((done, total), desc="Loading the selected pictures")

        try:
            rows = await selection.selected_rows(self.client, data, _settings(*controls), report)
        except PROBLEMS as error:
            warn(error)
            return gr.skip()
        return selection.download_html(selection.write(rows, "csv" if data.get("format") == "csv" else "paths"))

    def refuse_link(self) -> None:
        warn(ValueError(link.UPLOADS))

    # For programs

    async def similar(
        self,
        picture: gr.FileData | None = None,
        like: list[str] = [],  # noqa: B006
        unlike: list[str] = [],  # noqa: B006
        k: int = 24,
        threshold: float = 0.0,
        where: list[str] = [],  # noqa: B006
        collection: str = COLLECTION,
        encoder: str | None = None,
    ) -> list[dict[str, Any]]:
        """The items nearest to a picture and to the items `like`, and unlike the items `unlike`, with their cosine and
        its rank among random pairs."""
        uploads = [from_path(cast("dict[str, str]", picture)["path"])] if picture else []  # Gradio passes a dict
        positive, negative = ([Picture(id, id=id, collection=collection) for id in ids] for ids in (like, unlike))
        settings = SearchSettings(k, threshold, tuple(where), collection, encoder)
        found = await nearest(self.client, Query((*uploads, *positive), tuple(negative)), settings)
        return [_to_dict(item) for item in found.results]

    async def collection_items(
        self,
        where: list[str] = [],  # noqa: B006
        limit: int = 60,
        offset: int = 0,
        collection: str = COLLECTION,
        encoder: str | None = None,
    ) -> dict[str, Any]:
        """How many items match the conditions, and `limit` of them."""
        conditions = parse_conditions(where)
        answer = await self.client.items(limit, offset, conditions, collection=collection, model=encoder)
        return {"count": answer.count, "items": [_to_dict(item) for item in answer.items]}


def _to_dict(item: Item | Match) -> dict[str, Any]:
    """The item for programs. Its path is called `file`: gradio_client would try to download from a `path`."""
    facts = {name: value for name, value in vars(item).items() if name != "path"}
    return facts | {"file": item.path}


def _settings(
    k: float,
    least: float,
    closer_than: float | None,
    where: Sequence[str] | None,
    collection: str | None,
    encoder: str | None,
    other: str | None,
) -> SearchSettings:
    return SearchSettings(
        int(k),
        float(least),
        tuple(where or ()),
        collection or COLLECTION,
        encoder or None,
        other or None,
        float(closer_than or 0),
    )
