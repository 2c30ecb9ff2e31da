"""What the tab Similar shows of the collection or of a search: a heading, and tiles or a sentence."""

from dataclasses import replace

from serving.client import AsyncClient, ServiceError
from serving.protocol.filters import parse_conditions
from ui.search.picture import counted, notice
from ui.search.query import Query, SearchSettings, nearest
from ui.search.rank import in_words, percent
from ui.widgets.grid import columns_html, grid_html, selection_html

PAGE = 60  # pictures of the collection at a time
EMPTY = "The collection is empty. Fill it with `python serving/bulk.py --data ~/Pictures`, then open this page again."
ALONE = "There is no other picture in the collection yet."
FAR = "No picture has a similarity of {least:.2f} or more. Lower the limit to see the nearest pictures."
NOT_CLOSER = "No picture is closer than {share} of random pairs are. Lower the limit to see the nearest pictures."
NONE = "No picture matches {where}. Remove a condition."


async def browse(client: AsyncClient, offset: int, settings: SearchSettings) -> tuple[str, str, int]:
    """Heading and grid of the collection's pictures from `offset` on, and their number in all. Raises ServiceError,
    FilterProblem."""
    where, collection = parse_conditions(settings.where), settings.collection
    try:
        answer = await client.items(PAGE, offset, where, collection=collection, model=settings.encoder)
    except ServiceError as error:
        if error.status != 404:
            raise
        return "", notice(EMPTY), 0  # adding the first item creates the collection
    count, items = answer.count, answer.items
    if not count:
        return "", notice(_nothing(settings, EMPTY)), 0
    extent = f"{offset + 1:,} to {offset + len(items):,} of {count:,} pictures" if count > PAGE else counted(count)
    heading = f"<h2>Your collection</h2><p>{extent}. Choose one to find others like it.</p>"
    bar = selection_html(count, collection, f"all\n{settings.where}\n{settings.encoder}")
    return heading, bar + grid_html(items, collection, settings.encoder), count


async def neighbours(client: AsyncClient, query: Query, settings: SearchSettings) -> tuple[str, str, bool]:
    """Heading and grid of the nearest pictures, or two grids to compare two encoders; and whether a limit may be given
    as a rank among random pairs. Raises ServiceError, UploadFailed, FilterProblem."""
    collection, found = settings.collection, await nearest(client, query, settings)
    results, ranked = found.results, any(item.closer_than is not None for item in found.results)
    by_rank = not settings.min_similarity and (ranked or found.threshold is not None)
    if settings.other_encoder:
        encoder = replace(settings, encoder=settings.other_encoder, other_encoder=None)
        others = (await nearest(client, query, encoder)).results
        both = {item.id for item in results} & {item.id for item in others}
        columns = ((settings.encoder, results), (settings.other_encoder, others))
        grids = [grid_html(items, collection, id, both) if items else notice("No results.") for id, items in columns]
        tiles = columns_html([settings.encoder or "The service's own encoder", settings.other_encoder], grids)
        words = f"{len(both)} of {max(len(results), len(others))} results are found by both encoders; they are marked."
    elif results:
        tiles = grid_html(results, collection, settings.encoder)
        rank = " and its rank among random pairs of pictures" if ranked else ""
        words = f"Nearest first, with the cosine of the embeddings{rank}. Choose one to search from it."
        if by_rank and found.threshold is not None:
            words += f" Only those {in_words(settings.closer_than)}: with a cosine from {found.threshold:.2f} up."
    else:
        limit = FAR.format(least=settings.min_similarity) if settings.min_similarity else ""
        limit = NOT_CLOSER.format(share=percent(settings.closer_than)) if by_rank else limit
        return "", notice(limit or _nothing(settings, ALONE if query.picture.id else EMPTY)), by_rank
    bar = selection_html(len(results), collection, f"{query}{settings}")
    return f"<h2>Most similar</h2><p>{words}</p>", bar + tiles, by_rank


def _nothing(settings: SearchSettings, otherwise: str) -> str:
    conditions = " and ".join(f"`{condition}`" for condition in settings.where)
    return NONE.format(where=conditions) if conditions else otherwise
