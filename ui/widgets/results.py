"""What the tab Similar shows of the collection or of a search: a heading, and tiles or a sentence."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from html import escape
from types import MappingProxyType

from export.suggest import program
from serving.client import AsyncClient, Item, ServiceError, SuggestedItem
from serving.protocol.filters import parse_conditions
from serving.protocol.queries import OddKind
from serving.protocol.shown import counted
from ui.search.picture import notice
from ui.search.query import Query, SearchSettings, nearest
from ui.search.rank import in_words, percent
from ui.widgets.computing import without
from ui.widgets.grid import columns_html, grid_html, selection_html

PAGE = 60  # pictures of the collection, and as many for each click on More
AT_ONCE = 1000  # most pictures that the service lists in an answer
FILL = f"{program('serving/bulk.py')} --data ~/Pictures"
EMPTY = f"The collection is empty. Fill it with `{FILL}`, then open this page again."
ALONE = "There is no other picture in the collection yet."
FAR = "No picture has a similarity of {least:.2f} or more. Lower the limit to see the nearest pictures."
NOT_CLOSER = "No picture is closer than {share} of random pairs are. Lower the limit to see the nearest pictures."
SCORED = (
    "Best first. The number is a score, no cosine: the cosine to the pictures with + minus the cosine to those with −."
)
ESTIMATED = " The collection is being embedded again, so some similarities are estimates and will change."
BY_WORDS = " The cosine of words and a picture is lower than that of two pictures."
LABELLED = "Every picture of the collection has a label."
FILTERED_LABELLED = "No picture that matches the filter is without a label."
PICKED = "each from the middle of a group of similar ones. Select those of a kind and label them; then others come."
PICK = (
    '<button class="small" data-pick="first" title="Pictures that say most about all">Suggest what to label</button>'
    '<button class="small" data-pick="suggested" title="By the pictures that have a label">Suggest labels</button>'
    '<button class="small" data-pick="outliers" title="Outliers, doubtful labels, broken ones">Odd pictures</button>'
)
SUGGESTED = "each by the labelled pictures that are most like it. Select those that are right, and confirm them."
CONFIRM = '<button class="small of-some" data-act="confirm" title="Label each as suggested">Confirm labels</button>'
ODD: dict[OddKind, tuple[str, str, str]] = {
    "outliers": (
        "Outliers",
        "most unlike the others first. The number is their outlier factor: about 1 is usual.",
        "No picture is odd.",
    ),
    "labels": (
        "Doubtful labels",
        "whose label the nearest pictures contradict. The number says how much speaks for the other label rather than "
        "their own. Select those where it is right, and confirm.",
        "No label is contradicted by the nearest pictures.",
    ),
    "broken": (
        "Broken pictures",
        "dark, over-exposed, empty or blurred, the worst first.",
        "No picture seems to be broken.",
    ),
}
"""What is odd: its title, what is said of the pictures, and what is said if there is none."""
BROWSE = '<button class="small" data-pick="off">All pictures</button>'
NONE = "No picture matches {where}. Remove a condition."


async def browse(client: AsyncClient, shown: int, settings: SearchSettings) -> tuple[str, str, int]:
    """Heading and grid of the collection's first pictures, and their number in all. Raises ServiceError,
    FilterProblem."""
    where, collection = parse_conditions(settings.where), settings.collection
    try:
        answer = await client.items(min(shown, AT_ONCE), 0, where, collection=collection, model=settings.encoder)
        count, items = answer.count, list(answer.items)
        while len(items) < min(shown, count):
            limit = min(shown - len(items), AT_ONCE)
            answer = await client.items(limit, len(items), where, collection=collection, model=settings.encoder)
            if not answer.items:  # some have been deleted meanwhile
                break
            items += answer.items
    except ServiceError as error:
        if error.status != 404:
            raise
        return "", notice(EMPTY), 0  # adding the first item creates the collection
    if not count:
        return "", notice(_nothing(settings, EMPTY)), 0
    extent = f"{len(items):,} of {count:,} pictures" if len(items) < count else counted(count)
    heading = f"<h2>Your collection</h2><p>{extent}. Choose one to find others like it.</p>"
    bar = selection_html(count, settings, f"all\n{settings.where}\n{settings.encoder}", PICK)
    return heading, bar + grid_html(items, collection, settings.encoder), count


async def drift_html(client: AsyncClient, settings: SearchSettings) -> str:
    """Whether the last pictures that were sent look like the collection; empty if that is not known."""
    try:
        drift = await client.drift(collection=settings.collection, model=settings.encoder)
    except ServiceError:
        return ""
    if drift.state == "unknown":
        return ""
    return f'<p class="{"doubt" if drift.state == "different" else "quality"}">{escape(drift.text)}.</p>'


async def picked(client: AsyncClient, k: int, settings: SearchSettings) -> tuple[str, str]:
    """Heading and grid of k pictures to label first. Raises ServiceError, FilterProblem."""
    where, collection = parse_conditions(settings.where), settings.collection
    answer = await client.pick(k, filter=where, collection=collection)
    if not answer.items:
        heading, tiles = "", notice(FILTERED_LABELLED if settings.where else LABELLED)
    else:
        of = f"the {answer.candidates:,} without a label" if answer.candidates > 1 else "the one without a label"
        heading = (
            f"<h2>To label first</h2><p>{counted(len(answer.items))} of {of}: {PICKED}{without(answer.missing)}</p>"
        )
        tiles = grid_html(answer.items, collection, settings.encoder)
    ids = [item.id for item in answer.items]
    return heading, selection_html(len(ids), settings, f"picked\n{ids}", BROWSE) + tiles


async def suggested(client: AsyncClient, k: int, settings: SearchSettings) -> tuple[str, str]:
    """Heading and grid of the k pictures whose labels are surest, those of a label together. Raises ServiceError,
    FilterProblem."""
    where, collection = parse_conditions(settings.where), settings.collection
    try:
        answer = await client.suggest(k, filter=where, collection=collection)
    except ServiceError as error:
        if (error.status, error.param) != (400, "name"):  # there are labels
            raise
        return "", selection_html(0, settings, "suggested", BROWSE) + notice(str(error))
    items = sorted(answer.items, key=lambda item: (item.suggested, -item.share))
    if not items:
        heading, tiles = "", notice(FILTERED_LABELLED if settings.where else LABELLED)
    else:
        of = f"{counted(len(items))} of the {answer.candidates:,} without a label"
        heading = f"<h2>Suggested labels</h2><p>For {of}, {SUGGESTED}{without(answer.missing)}</p>"
        tiles = grid_html(items, collection, settings.encoder)
    ids = [item.id for item in items]
    return heading, selection_html(len(ids), settings, f"suggested\n{ids}", CONFIRM + BROWSE) + tiles


async def odd(kind: OddKind, client: AsyncClient, k: int, settings: SearchSettings) -> tuple[str, str]:
    """Heading and grid of the k most odd pictures. Raises ServiceError, FilterProblem."""
    where, collection, (title, words, none) = parse_conditions(settings.where), settings.collection, ODD[kind]
    kinds = "".join(
        f'<button class="small" data-pick="{one}" aria-pressed="{str(one == kind).lower()}">{name}</button>'
        for one, (name, *_) in ODD.items()
    )
    offer = (CONFIRM if kind == "labels" else "") + kinds + BROWSE
    try:
        answer = await client.odd(kind, k, where, collection=collection)
    except ServiceError as error:
        if (error.status, error.param) != (400, "name"):  # there is enough to compare
            raise
        return "", selection_html(0, settings, kind, offer) + notice(str(error))
    items: list[Item] = list(answer.items)
    if kind == "labels":
        facts = [({one.name: getattr(item, one.name) for one in fields(Item)}, item) for item in answer.items]
        items = [SuggestedItem(**own, suggested=it.reason or "", share=it.value / (1 + it.value)) for own, it in facts]
    if not items:
        heading, tiles = "", notice(none)
    else:
        of = f" of {answer.odd:,}" if answer.odd > len(items) else ""
        heading = f"<h2>{title}</h2><p>{counted(len(items))}{of}, {words}{without(answer.missing)}</p>"
        tiles = grid_html(items, collection, settings.encoder)
    ids = [item.id for item in items]
    return heading, selection_html(len(ids), settings, f"{kind}\n{ids}", offer) + tiles


VIEWS: dict[str, Callable[[AsyncClient, int, SearchSettings], Awaitable[tuple[str, str]]]] = {
    "first": picked,
    "suggested": suggested,
    **{kind: partial(odd, kind) for kind in ODD},
}
"""What the collection's buttons show of it, by their data-pick."""


async def neighbours(
    client: AsyncClient, query: Query, settings: SearchSettings, titles: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, str, bool]:
    """Heading and grid of the nearest pictures, or two grids to compare two encoders, with their `titles` by id; and
    whether a limit may be given as a rank among random pairs. Raises ServiceError, UploadFailed, FilterProblem."""
    collection, found = settings.collection, await nearest(client, query, settings)
    results, ranked = found.results, any(item.closer_than is not None for item in found.results)
    score = "Score" if query.negative else ""
    by_rank = not settings.min_similarity and (ranked or found.threshold is not None)
    if settings.other_encoder:
        encoder = replace(settings, encoder=settings.other_encoder, other_encoder=None)
        others = (await nearest(client, query, encoder)).results
        both = {item.id for item in results} & {item.id for item in others}
        columns = ((settings.encoder, results), (settings.other_encoder, others))
        grids = [
            grid_html(items, collection, id, both, score) if items else notice("No results.") for id, items in columns
        ]
        ids = (settings.encoder or "The service's own encoder", settings.other_encoder)
        tiles = columns_html([titles.get(id, id) for id in ids], grids)
        words = f"{len(both)} of {max(len(results), len(others))} results are found by both encoders; they are marked."
    elif results:
        tiles = grid_html(results, collection, settings.encoder, score=score)
        rank = " and its rank among random pairs of pictures" if ranked else ""
        words = SCORED if query.negative else f"Nearest first, with the cosine of the embeddings{rank}."
        words += " Choose one to search from it."
        words += ESTIMATED if found.estimated else ""
        if by_rank and found.threshold is not None:
            words += f" Only those {in_words(settings.closer_than)}: with a cosine from {found.threshold:.2f} up."
        words += BY_WORDS if query.text else ""
    else:
        limit = FAR.format(least=settings.min_similarity) if settings.min_similarity else ""
        limit = NOT_CLOSER.format(share=percent(settings.closer_than)) if by_rank else limit
        alone = query.picture is not None and query.picture.id
        return "", notice(limit or _nothing(settings, ALONE if alone else EMPTY)), by_rank
    bar = selection_html(len(results), settings, f"{query}{settings}")
    return f"<h2>Most similar</h2><p>{words}</p>", bar + tiles, by_rank


def _nothing(settings: SearchSettings, otherwise: str) -> str:
    conditions = " and ".join(f"`{condition}`" for condition in settings.where)
    return NONE.format(where=conditions) if conditions else otherwise
