"""The tab Similar: the pictures of the collection, or those nearest to a picture. A click on one searches from it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast
from urllib.parse import parse_qsl

import gradio as gr

from serving.client import COLLECTION, Item, Match, ServiceError
from serving.protocol.filters import FilterProblem, parse_conditions
from serving.protocol.queries import MOST_TEXT
from ui.api import EACH, ON_TRAIL, PRIVATE, PROBLEMS, QUIET, publish
from ui.assets import raw_html
from ui.search import link, quality, rank, selection
from ui.search.conditions import condition_choices, condition_hint
from ui.search.picture import Picture, UploadFailed, clicked, from_path, notice, warn
from ui.search.query import Query, SearchSettings, Trail, nearest
from ui.tabs.tab import Tab
from ui.widgets.results import PAGE, VIEWS, browse, drift_html, neighbours

MOST_K = 200
REFUSED = (413, 415, 422)  # the service's statuses for a picture that it cannot read


class SimilarTab(Tab):
    title = "Similar"

    def build(self) -> None:
        with gr.Row(elem_id="similar-bar"):
            self.heading = raw_html(elem_id="heading", elem_classes="heading")
            self.link = link.link_button()
        self.words = gr.Textbox(
            label="Search by words",
            show_label=False,
            container=False,
            placeholder="Describe pictures in words, then press Enter: a red shoe",
            max_length=MOST_TEXT,
            visible=False,
            elem_id="words",
        )
        with gr.Row(elem_id="narrow"):
            self.where = gr.Dropdown(
                [],
                multiselect=True,
                allow_custom_value=True,
                label="Filter",
                elem_id="where",
                min_width=220,
            )
            self.k = gr.Slider(1, MOST_K, value=24, step=1, label="Results", elem_id="k", visible=False, min_width=150)
            self.least = gr.Slider(
                0, 1, value=0, step=0.01, label="Minimum similarity", elem_id="least", visible=False, min_width=150
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
        self.problem = raw_html(elem_id="problem")
        self.grid = raw_html(scripts=["widgets/grid"], elem_id="grid")
        with gr.Row(elem_id="pager"):
            self.more = gr.Button("More", size="sm", elem_id="more", visible=False)
        self.saved = selection.download()
        self.shown = gr.State(PAGE)  # pictures of the collection
        self.picking = gr.State("")  # one of VIEWS; empty: all pictures
        self.conditions_set = gr.State(())  # those of `where`

    def connect(self) -> None:
        controls = [self.k, self.least, self.closer, self.where, self.collection, self.encoder, self.other]
        outputs = [self.trail, self.shown, self.picking, self.problem, self.heading, self.grid, self.link]
        outputs += [self.k, self.least, self.closer, self.words, self.more]
        loading: dict[str, Any] = {"show_progress_on": self.grid, **PRIVATE}
        showing: dict[str, Any] = {
            "fn": self.show,
            "inputs": [self.trail, self.shown, self.picking, *controls],
            "outputs": outputs,
            **loading,
        }
        offering: dict[str, Any] = {"fn": self.conditions, "inputs": self.collection, "outputs": self.where, **QUIET}

        self.page.load(self.start, None, [self.trail, *controls], **QUIET).then(**showing)
        gr.on([self.trail.change, self.picking.change], **showing)
        self.grid.pick(self.pick, None, self.picking, **EACH)
        # When `start` has set the conditions, the browser reports them with the collection that was chosen before; it
        # reports the change of a state later.
        self.where.change(lambda where: tuple(where or ()), self.where, self.conditions_set, **QUIET)
        changes = [self.k.release, self.least.release, self.closer.input, self.conditions_set.change]
        changes += [self.collection.input, self.encoder.input, self.other.input]
        gr.on(changes, self.show_first_page, [self.trail, self.picking, *controls], outputs, **loading)
        self.collection.input(**offering)
        self.more.click(lambda shown: shown + PAGE, self.shown, self.shown, **EACH).then(**showing)
        self.words.submit(self.search_words, [self.trail, self.words], self.trail, **ON_TRAIL)
        self.trail.change(lambda trail: trail[-1].text if trail else "", self.trail, self.words, **QUIET)
        self.grid.click(self.click, self.trail, self.trail, **ON_TRAIL)
        self.grid.like(self.like, self.trail, self.trail, **ON_TRAIL)
        self.grid.unlike(self.unlike, self.trail, self.trail, **ON_TRAIL)
        self.changed.change(**showing).then(**offering).then(self.names, self.collection, self.collection, **QUIET)
        self.grid.export(self.export, controls, self.saved, **loading | {"trigger_mode": "multiple"})
        self.link.navigate(self.navigate, [self.trail, self.collection], self.trail, **ON_TRAIL)
        self.link.refuse(self.refuse_link, None, None, **QUIET)
        publish(self.similar, "similar")
        publish(self.collection_items, "collection")

    async def start(self, request: gr.Request) -> tuple[Any, ...]:
        """The collections, encoders and conditions to choose from, and the search in the page's address. All of them
        before the first pictures, which would move away from the pointer as what is above them grows."""
        params = request.query_params.multi_items() if request else []
        settings = link.parse_settings(params, MOST_K)
        try:
            names = {collection.name for collection in await self.client.collections()}
        except ServiceError:
            names = set()  # `show` comes next and says why
        titles = quality.titles(await self.cards())
        if settings.collection not in names and names and "in" not in dict(params):
            settings = replace(settings, collection=min(names))
        try:
            query = await link.load_query(self.client, params, settings.collection)
        except ServiceError as error:
            query = None
            warn(error)
        collections = sorted({*names, settings.collection})
        several, choices = len(titles) > 1, [(title, id) for id, title in titles.items()]
        encoder = settings.encoder if settings.encoder in titles else next(iter(titles)) if several else None
        other = settings.other_encoder if settings.other_encoder in titles else ""
        return (
            (query,) if query else (),
            settings.k,
            settings.min_similarity,
            gr.update(
                choices=[("no limit", 0.0), *rank.choices(chosen=settings.closer_than)], value=settings.closer_than
            ),
            await self.conditions(settings.collection) | {"value": list(settings.where)},
            gr.update(choices=collections, value=settings.collection, visible=len(collections) > 1),
            gr.update(choices=choices, value=encoder, visible=several),
            gr.update(choices=[("nothing", ""), *choices], value=other, visible=several),
        )

    async def names(self, collection: str) -> dict[str, Any]:
        """The collections to choose from."""
        try:
            names = {one.name for one in await self.client.collections()}
        except ServiceError:
            return gr.skip()
        return gr.update(choices=sorted({*names, collection}), visible=len({*names, collection}) > 1)

    async def cards(self) -> list[dict[str, Any]]:
        """The model cards of the encoders, the default first."""
        try:
            return await self.client.models()
        except ServiceError:
            return []

    async def conditions(self, collection: str) -> dict[str, Any]:
        """The conditions to choose from."""
        try:
            keys = await self.client.keys(collection=collection)
        except ServiceError:
            keys = []
        return gr.update(choices=condition_choices(keys), info=condition_hint(keys))

    async def show(self, trail: Trail, shown: int, picking: str, *controls: Any) -> tuple[Any, ...]:
        """The results of the last search, what `picking` says, or the first `shown` of the collection. A picture that
        the service refuses is removed from the trail; a condition that it refuses leaves what is shown, and says why.
        """
        settings, query, count, by_rank = _settings(*controls), trail[-1] if trail else None, 0, False
        cards = await self.cards()
        encoder = settings.encoder or (cards[0]["id"] if cards else "")
        try:
            if query:
                heading, tiles, by_rank = await neighbours(self.client, query, settings, quality.titles(cards))
            elif picking:
                heading, tiles = await VIEWS[picking](self.client, settings.k, settings)
            else:
                heading, tiles, count = await browse(self.client, shown, settings)
                heading += await drift_html(self.client, settings) if heading else ""
        except PROBLEMS as error:
            if isinstance(error, UploadFailed) or getattr(error, "status", 0) in REFUSED:
                warn(error)
                return trail[:-1], *[gr.skip()] * 11
            if isinstance(error, FilterProblem) or getattr(error, "param", "") == "filter":
                return gr.skip(), gr.skip(), gr.skip(), notice(str(error)), *[gr.skip()] * 8
            heading, tiles = "", notice(str(error))
        else:
            used = [encoder] if encoder and heading else []
            heading += quality.quality_html(cards, [*used, settings.other_encoder or ""])
        searching = query is not None
        reads_text = any(card.get("text") for card in cards if card["id"] == encoder)
        visible = [searching or bool(picking), searching and not by_rank, searching and by_rank]
        visible += [reads_text, shown < count]
        updates = [gr.update(visible=value) for value in visible]
        updates[1]["label"] = "Minimum score" if query and query.negative else "Minimum similarity"
        return (
            gr.skip(),
            shown,
            "" if searching else picking,
            "",
            heading,
            tiles,
            link.link_html(query, settings, len(trail)),
            *updates,
        )

    async def show_first_page(self, trail: Trail, picking: str, *controls: Any) -> tuple[Any, ...]:
        return await self.show(trail, PAGE, picking, *controls)

    def pick(self, event: gr.EventData) -> str:
        show = (event._data or {}).get("show")
        return show if show in VIEWS else ""

    async def navigate(self, trail: Trail, collection: str, event: gr.EventData) -> Trail:
        """The searches so far, after the browser's Back or Forward."""
        steps, params = int(event._data["steps"]), parse_qsl(str(event._data["query"]).lstrip("?"))
        if steps < len(trail):
            return trail[:steps]
        try:
            query = await link.load_query(self.client, params, collection)
        except ServiceError as error:
            warn(error)
            query = None
        return (*trail[: max(0, steps - 1)], query) if query else trail

    def search_words(self, trail: Trail, words: str) -> Any:
        return (*trail, Query((), text=words.strip())) if words.strip() else gr.skip()

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
        text: str = "",
    ) -> list[dict[str, Any]]:
        """The items nearest to a picture, to the items `like` and to the words of `text`, and unlike the items
        `unlike`, with their cosine and its rank among random pairs."""
        uploads = [from_path(cast("dict[str, str]", picture)["path"])] if picture else []  # Gradio passes a dict
        positive, negative = ([Picture(id, id=id, collection=collection) for id in ids] for ids in (like, unlike))
        settings = SearchSettings(k, threshold, tuple(where), collection, encoder)
        found = await nearest(self.client, Query((*uploads, *positive), tuple(negative), text), settings)
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
